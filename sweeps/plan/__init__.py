"""From a sweep file to its runs and their cost cards."""
