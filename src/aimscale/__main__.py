"""`python -m aimscale`: the command where no script is on the path, as for torchrun."""

from aimscale.sweeps.cli.main import main

main()
