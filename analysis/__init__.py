"""Tables in, laws and pictures out. Imports neither torch nor the other rooms."""
