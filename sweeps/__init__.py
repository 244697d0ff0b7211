"""Many runs: sweep files, planner, launchers, status, collection, and the command line.

    from aimscale.sweeps import collect, launch, plan

    planned = plan("mysweep.yaml")
    launch(planned)
    collect(planned).table   # results.parquet, for aimscale.analysis

Everything public is a name of this package, listed in `__init__.pyi` and loaded when it is first used, so that
`aimscale --help` stays quick.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
