"""Effects of single changes."""
