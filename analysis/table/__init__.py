"""Tables in: the results table, foreign tables, and the points of a fit."""
