"""Starting what is missing: decisions, claims, attempts, the local queue."""
