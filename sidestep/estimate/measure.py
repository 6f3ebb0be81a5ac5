"""The passes of an estimate: sketches of the first half's mean gradient, then the second half along its directions.

N draws, M modules, R directions.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sidestep.errors import NonFiniteError
from sidestep.estimate.scores import Array
from sidestep.estimate.sketch import Directions, Probe, Sketch
from sidestep.estimate.taps import Shape, tapped
from sidestep.model.device import Graph, Stream, beside, capturing
from sidestep.training.accelerate import can_capture
from sidestep.training.objective import Task

Asked = tuple[Sequence[int], Task]
"""The songs of a batch, by number, and what the model is asked."""
NORM_WIDTH = 64  # Columns that estimate a norm to some percent.
FLOAT16_SCALE = 2.0**16  # Keeps gradients of a mean over a hundred thousand numbers inside float16.


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """What the passes found. `values_MR`, `right` and `norms_NM` of the first half, the others of the second."""

    values_MR: Array
    right: Mapping[str, Tensor]
    norms_NM: Array
    parts_NMR: Array
    songs_N: Sequence[int]


@dataclass(slots=True, kw_only=True)
class Passes:
    """Runs passes through frozen `layers`. `losses` are the model's, weighted as in training, [B]."""

    losses: Callable[[Task], Tensor]
    layers: Mapping[str, nn.Module]
    shapes: Mapping[str, Shape]
    device: torch.device
    dtype: torch.dtype
    after_batch: Callable[[Sequence[int]], None]

    def gradients(self, first: Iterable[Asked], second: Iterable[Asked], *, count: int, seed: int) -> Gradients:
        """Find up to `count` directions of each layer in the first half, and measure the second half along them."""
        sketch = self._sketch(count, seed)
        self._run(sketch, first)
        norms_NM = sketch.norms()
        _check(norms_NM)
        found = {module: sketch.directions(module, count) for module in self.layers}
        probe = Probe(found, scale=self._scale)
        songs = self._run(probe, second)
        parts_NMR = probe.parts()
        _check(parts_NMR)
        return Gradients(
            values_MR=_padded(found, parts_NMR.shape[2]),
            norms_NM=norms_NM.double().cpu().numpy(),
            right={module: directions.right_IR for module, directions in found.items()},
            parts_NMR=parts_NMR.double().cpu().numpy(),
            songs_N=songs,
        )

    def norms(self, asked: Iterable[Asked], *, seed: int) -> tuple[Array, Sequence[int]]:
        """Return the norm of each draw's gradient, [N, M], and the song of each draw."""
        sketch = self._sketch(NORM_WIDTH, seed)
        songs = self._run(sketch, asked)
        norms_NM = sketch.norms()
        _check(norms_NM)
        return norms_NM.double().cpu().numpy(), songs

    def _sketch(self, width: int, seed: int) -> Sketch:
        return Sketch(self.shapes, width=width, seed=seed, device=self.device, dtype=self.dtype, scale=self._scale)

    @property
    def _scale(self) -> float:
        return FLOAT16_SCALE if self.dtype == torch.float16 else 1.0

    def _run(self, recorder: Sketch | Probe, asked: Iterable[Asked]) -> list[int]:
        songs_N: list[int] = []
        with tapped(self.layers, recorder, dtype=self.dtype), torch.enable_grad():
            one_pass = Replayed(self._pass) if can_capture(self.device) else self._pass
            for songs, task in asked:
                recorder.samples.begin(len(songs))
                one_pass(task.to(self.device))
                recorder.samples.end()
                songs_N += songs
                self.after_batch(songs)
        return songs_N

    def _pass(self, task: Task) -> None:
        # Summed, not averaged: what a tap sees of a sample is the gradient of that sample's own loss.
        (self.losses(task).sum() * self._scale).backward()


class Replayed:
    """A pass that becomes a CUDA graph for each shape of task that comes again; the first of a shape runs eagerly."""

    def __init__(self, one_pass: Callable[[Task], None]) -> None:
        self._pass = one_pass
        self._seen: set[tuple[object, ...]] = set()
        self._graphs: dict[tuple[object, ...], tuple[Graph, Task]] = {}
        self._pool: Any = None
        self._stream = Stream()

    def __call__(self, task: Task) -> None:
        """Run the pass on this task."""
        key = tuple(None if part is None else tuple(part.shape) for part in task.parts())
        if key not in self._seen:
            self._seen.add(key)
            with beside(self._stream):
                self._pass(task)
            return
        if key not in self._graphs:
            graph = Graph()
            with capturing(graph, pool=self._pool):
                self._pass(task)
            self._pool = self._pool or graph.pool()
            self._graphs[key] = (graph, task)
        graph, own = self._graphs[key]
        if own is not task:
            own.copy_(task)
        graph.replay()


def _padded(found: Mapping[str, Directions], width: int) -> Array:
    rows = [torch.nn.functional.pad(one.values_R, (0, width - len(one.values_R))) for one in found.values()]
    return torch.stack(rows).double().cpu().numpy()


def _check(measured: Tensor) -> None:
    if not bool(measured.isfinite().all()):
        raise NonFiniteError(
            "A gradient is not a finite number, so nothing can be estimated from it.",
            hint="Try --precision bf16 or fp32.",
        )
