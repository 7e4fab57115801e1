"""How a comparison looks: the columns once, then a terminal's table, Markdown or JSON."""
