"""Laws of tuned settings: the best learning rate and batch by size and data, and what a run loses by another."""
