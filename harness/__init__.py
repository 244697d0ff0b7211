"""One run: data, DeepSpeed engine, training, checkpoints, validation, probes, metrics."""
