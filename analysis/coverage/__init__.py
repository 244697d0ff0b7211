"""How often an interval that is called 95 % holds the truth, and how wide it is: measured on simulated tables."""
