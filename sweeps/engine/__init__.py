"""Starting what is missing: decisions, the queue, its devices, launches, cancellations."""
