"""`aimscale train`: one run by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[
        Path, typer.Argument(metavar="RUN_DIR|CONFIG.yaml", help="A run directory, or a configuration to start from.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Run directory to make from CONFIG.yaml; default: the run's id.")
    ] = None,
) -> None:
    """Train one run to its last budget, from wherever it stands.

    Started alone, by torchrun, or by srun. Exit codes: 0 finished, 2 a mistake in the input, 3 diverged, 75 stopped by
    Ctrl-C, SIGTERM, SIGUSR2 or a closed terminal after saving (start it again to go on).
    """
    from aimscale.harness.data.store.card import with_fingerprints
    from aimscale.harness.device.distributed import find_placement
    from aimscale.harness.run.config import ConfigError, load_run_config
    from aimscale.harness.run.directory import RunDir

    if run.is_dir():
        if out is not None:
            raise ConfigError(f"{run} is a run directory already; leave --out away")
        directory = run
    else:
        config = with_fingerprints(load_run_config(run))
        directory = out or Path(config.run_id)
        if find_placement().rank == 0:
            RunDir.create(directory, config)
    from aimscale.harness.train.attempt import train as train_run

    raise typer.Exit(train_run(directory))
