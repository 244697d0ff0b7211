"""What probes see: backbones, labelled images, tokens, pooled features and their statistics."""
