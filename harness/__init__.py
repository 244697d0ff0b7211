"""Everything about one run: data, DeepSpeed engine, training, checkpoints, validation, probes, metrics."""
