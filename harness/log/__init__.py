"""Records of a run during training: metrics, status and loggers."""
