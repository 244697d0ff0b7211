"""Many runs: sweep files, planner, launchers, status, collection, and the command line."""
