"""Where an error comes from, and what follows for intervals: groups, variance components, lack of fit."""
