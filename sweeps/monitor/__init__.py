"""Status of a sweep and its runs, and the layout of tables and lines on a terminal and in a log."""
