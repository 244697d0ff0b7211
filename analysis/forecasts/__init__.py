"""What a run will reach before it is trained, and how earlier such forecasts fared."""
