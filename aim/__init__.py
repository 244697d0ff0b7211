"""The AIM model: configuration, layers, objective, probe heads, costs, official weight names."""
