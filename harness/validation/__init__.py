"""The loss on held-out images: of a budget, of a point during training, and what it costs."""
