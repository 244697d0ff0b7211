"""The verbs that read a table."""
