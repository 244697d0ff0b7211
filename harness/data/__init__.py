"""Images on disk to batches: packing, indexing, the deterministic stream."""
