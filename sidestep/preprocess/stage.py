"""One stage of preprocessing: songs are read ahead, encoded in their order, written behind; bad ones are left out."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from sidestep.errors import DataError
from sidestep.events import Emit, Notice, StageDone, StageStarted, TrackDone, TrackSkipped
from sidestep.model.device import works_beside_the_cpu
from sidestep.preprocess.tensors import is_finite

READ_AHEAD_SECONDS = 1200  # Of music: in memory 460 MB; a longer song is read alone.
THREADS = 6
ROWS_TOGETHER = 4096
LEAST_ROWS = 128  # That a song counts for: no more than 32 are in memory to be encoded together.


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
Read = TypeVar("Read")
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """How far the songs of a stage overlap; it changes neither their order nor, but for rounding, their numbers.

    `threads` read songs while others are encoded, and write those that were; 0 does one song after the other.
    Songs are encoded together up to `rows` rows, padding included; 0 encodes every song alone.
    """

    threads: int
    rows: int

    @classmethod
    def on(cls, device: torch.device) -> "Flow":
        """The flow for a device: on the CPU nothing overlaps, since encoding takes all of it."""
        if not works_beside_the_cpu(device):
            return cls(threads=0, rows=0)
        return cls(threads=min(THREADS, os.cpu_count() or 1), rows=ROWS_TOGETHER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What is to be said of a song that is done."""

    unchanged: bool = False
    notices: Sequence[Notice] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Work(Generic[Item, Read, Made]):
    """What a stage does for a song. `read` and `write` may run in threads, `encode` runs in the caller's alone.

    `rows` says how many rows of what was read are encoded; 0 or no such function: that song is encoded alone.
    A DataError leaves the song out (one that `encode` raises, all songs it was given); other errors end the stage.
    """

    read: Callable[[Item], Read]
    encode: Callable[[Sequence[Read]], Sequence[Made]]
    write: Callable[[Item, Made], Written]
    rows: Callable[[Read], int] | None = None


def run_stage(title: str, items: Sequence[Item], work: Work[Item, Read, Made], *, flow: Flow, emit: Emit) -> list[Item]:
    """Do `work` for every song, reporting each in its order; returns those it was done for.

    Nothing is reported of an empty stage. What is being written when the stage ends early is written whole.
    """
    if not items:
        return []
    emit(StageStarted(title=title, total=len(items)))
    began = time.monotonic()
    done: list[Item] = []
    lane = _Lane(flow)
    try:
        for item, outcome in lane.through(items, work):
            try:
                written = outcome.result()
            except DataError as error:
                emit(TrackSkipped(name=item.name, reason=error.message, hint=error.hint))
                continue
            done.append(item)
            for notice in written.notices:
                emit(notice)
            emit(TrackDone(name=item.name, seconds=item.seconds, unchanged=written.unchanged))
    finally:
        lane.pool.shutdown(wait=True, cancel_futures=True)
    seconds = time.monotonic() - began
    skipped = len(items) - len(done)
    emit(StageDone(title=title, done=len(done), skipped=skipped, seconds=seconds, waited_seconds=lane.waited))
    return done


def finite(tensor: Tensor, what: str) -> Tensor:
    """The tensor itself. Raises DataError when it holds a number that is not finite."""
    if not is_finite(tensor):
        raise DataError(
            f"Its {what} hold numbers that are not finite.",
            hint="Try --precision fp32; if it stays, leave this song out.",
        )
    return tensor


class _Inline(Executor):
    """Does what it is given at once, in the caller's thread; only a song's own error waits to be asked for."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except DataError as error:
            future.set_exception(error)
        return future


@dataclass(slots=True)
class _Lane:
    """Songs on their way through a stage; `waited` are the seconds in which none was there to be encoded."""

    flow: Flow
    waited: float = 0.0
    pool: Executor = field(init=False)

    def __post_init__(self) -> None:
        self.pool = ThreadPoolExecutor(self.flow.threads, "preprocess") if self.flow.threads else _Inline()

    def through(self, items: Sequence[Item], work: Work[Item, Read, Made]) -> Iterator[tuple[Item, Future[Written]]]:
        """Yield every song in its order, with what became of it."""
        writing: deque[tuple[Item, Future[Written]]] = deque()
        for item, outcome in self._encoded(items, work):
            writing.append((item, outcome))
            while len(writing) > self.flow.threads or (writing and writing[0][1].done()):
                yield writing.popleft()
        yield from writing

    def _timed(self, reads: Iterator[tuple[Item, Future[Read]]]) -> Iterator[tuple[Item, Future[Read]]]:
        """Yield songs whose reading is over, counting the seconds that it takes to get there."""
        while True:
            began = time.monotonic()
            item, reading = next(reads, (None, None))
            if item is None or reading is None:
                return
            wait([reading])
            self.waited += time.monotonic() - began
            yield item, reading

    def _read_ahead(self, items: Sequence[Item], read: Callable[[Item], Read]) -> Iterator[tuple[Item, Future[Read]]]:
        if not self.flow.threads:
            yield from ((item, self.pool.submit(read, item)) for item in items)
            return
        reading: deque[tuple[Item, Future[Read]]] = deque()
        seconds = 0.0
        for item in items:
            while reading and (len(reading) > self.flow.threads or seconds + item.seconds > READ_AHEAD_SECONDS):
                yield reading[0]
                # Only now is it encoded, or in the group that will be.
                seconds -= reading.popleft()[0].seconds
            reading.append((item, self.pool.submit(read, item)))
            seconds += item.seconds
        yield from reading

    def _encoded(self, items: Sequence[Item], work: Work[Item, Read, Made]) -> Iterator[tuple[Item, Future[Written]]]:
        group: list[tuple[Item, Read]] = []
        longest = 0
        for item, reading in self._timed(self._read_ahead(items, work.read)):
            try:
                read = reading.result()
            except DataError as error:
                yield from self._encode(group, work)
                group, longest = [], 0
                yield item, _failed(error)
                continue
            rows = (work.rows(read) if work.rows else 0) or self.flow.rows
            longest = max(longest, rows, LEAST_ROWS)
            if group and (len(group) + 1) * longest > self.flow.rows:
                yield from self._encode(group, work)
                group, longest = [], max(rows, LEAST_ROWS)
            group.append((item, read))
            if longest >= self.flow.rows:
                yield from self._encode(group, work)
                group, longest = [], 0
        yield from self._encode(group, work)

    def _encode(
        self, group: Sequence[tuple[Item, Read]], work: Work[Item, Read, Made]
    ) -> Iterator[tuple[Item, Future[Written]]]:
        if not group:
            return
        try:
            made = work.encode([read for _, read in group])
        except DataError as error:
            yield from ((item, _failed(error)) for item, _ in group)
            return
        for (item, _), result in zip(group, made, strict=True):
            yield item, self.pool.submit(work.write, item, result)


def _failed(error: DataError) -> Future[Written]:
    future: Future[Written] = Future()
    future.set_exception(error)
    return future
