"""Which image stands at which position of the training stream, and how it becomes a batch."""
