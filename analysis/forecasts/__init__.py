"""Forecasts of runs that are not trained yet, and the record of earlier ones."""
