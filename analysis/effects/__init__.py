"""What one change does, where noise comes from, what a repeated image is worth."""
