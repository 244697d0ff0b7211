"""A run: its configuration, its directory, its schedule, its provenance."""
