"""Images on disk: packing, indexing, reading shards."""
