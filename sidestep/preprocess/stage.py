"""One stage of preprocessing: song after song, going on after one that cannot be used."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from sidestep.errors import DataError
from sidestep.events import Emit, StageDone, StageStarted, TrackDone, TrackSkipped
from sidestep.preprocess.tensors import is_finite


class Named(Protocol):
    """What a stage goes through: something with the song's name and its length in seconds."""

    @property
    def name(self) -> str:
        """What the user calls the song."""
        ...

    @property
    def seconds(self) -> float:
        """How long it is."""
        ...


Item = TypeVar("Item", bound=Named)


def run_stage(title: str, items: Sequence[Item], work: Callable[[Item], bool | None], *, emit: Emit) -> list[Item]:
    """Do `work` for every song, reporting each; returns those it was done for. Nothing is reported of an empty stage.

    `work` gives True for a song that needed nothing; a DataError it raises is reported, and the next song follows.
    """
    if not items:
        return []
    emit(StageStarted(title=title, total=len(items)))
    began = time.monotonic()
    done: list[Item] = []
    for item in items:
        try:
            unchanged = bool(work(item))
        except DataError as error:
            emit(TrackSkipped(name=item.name, reason=error.message, hint=error.hint))
            continue
        done.append(item)
        emit(TrackDone(name=item.name, seconds=item.seconds, unchanged=unchanged))
    seconds = time.monotonic() - began
    emit(StageDone(title=title, done=len(done), skipped=len(items) - len(done), seconds=seconds))
    return done


def finite(tensor: Tensor, what: str) -> Tensor:
    """The tensor itself. Raises DataError when it holds a number that is not finite."""
    if not is_finite(tensor):
        raise DataError(
            f"Its {what} hold numbers that are not finite.",
            hint="Try --precision fp32; if it stays, leave this song out.",
        )
    return tensor
