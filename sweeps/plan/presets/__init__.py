"""Sweep files that ship with aimscale; `aimscale plan NAME` takes their names."""
