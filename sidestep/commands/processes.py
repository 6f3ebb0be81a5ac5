"""The processes that a launcher (torchrun, accelerate launch) started, joined while a command runs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from sidestep.config.processes import ALONE, Processes, launched_place


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes that a launcher started, if it did; all but the first one print nothing."""
    place = launched_place(os.environ)
    if place is None:
        yield ALONE
        return
    from sidestep.training.processes import joined

    with joined(place) as processes:
        if processes.is_first:
            yield processes
            return
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            yield processes
