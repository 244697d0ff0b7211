"""Effects of single changes, sources of noise, worth of repeated images, first plateaus."""
