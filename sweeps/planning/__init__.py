"""Plans: the runs of a sweep file, their checks and their cost cards."""
