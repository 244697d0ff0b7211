"""The command and the verbs of a sweep."""
