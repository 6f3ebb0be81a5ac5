"""Batches on the device before they are needed: read, and copied beside the running step."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from sidestep.errors import SidestepError
from sidestep.model.capabilities import capabilities
from sidestep.model.device import Mark, Stream, current_stream, queued_on
from sidestep.training.batches import Batch
from sidestep.training.objective import Task

Item = TypeVar("Item")
Begun = TypeVar("Begun")


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on a device with streams (CUDA, ROCm), each copied by one while the step before it runs.

    Their timesteps stay on the CPU, where the log reads them without waiting. For other devices the batches are yielded
    as they are.
    """
    if not capabilities(device).captures:
        yield from batches
        return
    stream = Stream(device)
    for arriving in one_ahead(batches, lambda batch: _begin(batch, device, stream)):
        yield arriving.wait()


def one_ahead(items: Iterable[Item], begin: Callable[[Item], Begun]) -> Iterator[Begun]:
    """Yield `begin(item)` of every item, called before the one before it is yielded.

    What goes wrong with an item is raised in its own place, after the one before it.
    """
    iterator, waiting = iter(items), None
    while True:
        try:
            begun = [begin(item) for item in _next(iterator)]
        except SidestepError:
            if waiting:
                yield waiting[0]
            raise
        if waiting:
            yield waiting[0]
        if not begun:
            return
        waiting = begun


def _next(iterator: Iterator[Item]) -> list[Item]:
    """The next item as a list of one; empty at the end."""
    for item in iterator:
        return [item]
    return []


@dataclass(frozen=True, slots=True)
class _Arriving:
    """A batch whose copy was begun, and the event that marks its end."""

    batch: Batch
    copied: Mark
    stream: Stream

    def wait(self) -> Batch:
        """Have the work queued from now on wait for the copy; the CPU does not wait."""
        stream = current_stream(self.stream.device)
        stream.wait_event(self.copied)
        for tensor in self.batch.task.parts():
            if tensor is not None and tensor.device == self.stream.device:
                # Or its memory could be given to the next copy while a step still reads it.
                tensor.record_stream(stream)
        return self.batch


def _begin(batch: Batch, device: torch.device, stream: Stream) -> _Arriving:
    timesteps_B = batch.task.timesteps_B
    with queued_on(stream):
        moved: list[Tensor | None] = [
            tensor if tensor is None or tensor is timesteps_B else tensor.to(device, non_blocking=True)
            for tensor in batch.task.parts()
        ]
        copied = Mark()
        copied.record(stream)
    return _Arriving(Batch(Task(*moved), batch.names), copied, stream)  # pyright: ignore[reportArgumentType]
