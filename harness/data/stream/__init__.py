"""The training stream: the order of images, their augmentation, and batches of them."""
