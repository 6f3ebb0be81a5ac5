"""The processes that a launcher (torchrun, accelerate launch) started, joined while a command runs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from sidestep.config.processes import ALONE, Processes, launched_place
from sidestep.errors import ConfigError


@contextmanager
def joined_processes(what: str, *, trains: bool) -> Iterator[Processes]:
    """Join the processes that a launcher started, if it did; all but the first one print nothing.

    ConfigError, at once, when `what` runs does not train: that is for one process.
    """
    place = launched_place(os.environ)
    if place is None:
        yield ALONE
        return
    if not trains:
        raise ConfigError(
            f"{what} runs in one process, and a launcher started {place.count}.",
            hint="Start it without torchrun. Several processes are for training: fixed, vanilla.",
        )
    if place.rank == 0:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        print(f"Joining {place.count} processes at {address}.", flush=True)
    from sidestep.training.processes import joined

    with joined(place) as processes:
        if processes.is_first:
            yield processes
            return
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            yield processes
