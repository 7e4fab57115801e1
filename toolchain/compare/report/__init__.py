"""Reports of a comparison: terminal table, Markdown, CSV, HTML and plots."""
