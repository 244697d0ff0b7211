"""Ranks of a job: their placement, what they exchange, and how a job begins and ends on each of them."""
