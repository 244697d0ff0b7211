"""A law and a table in, parameters with intervals and flags out."""
