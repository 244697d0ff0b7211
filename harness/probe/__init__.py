"""Frozen-feature evaluation: features, heads, protocol, scores, and the files they leave in a run directory."""
