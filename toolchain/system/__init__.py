"""Access to the operating system: hardware facts, file writing, and the log messages of libraries."""
