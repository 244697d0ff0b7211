"""Inputs of probes: backbones, labelled images, tokens, pooled features and their statistics."""
