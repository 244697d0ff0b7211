"""Effects of single changes, sources of noise, first plateaus."""
