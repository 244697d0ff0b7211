"""Decisions that a table allows: which law to trust, and which runs to buy next."""
