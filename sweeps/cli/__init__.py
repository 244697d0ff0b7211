"""Command line: the `aimscale` command and the verbs of a sweep."""
