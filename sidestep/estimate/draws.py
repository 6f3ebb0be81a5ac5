"""Which songs, windows, timesteps and noise an estimate looks at: two halves alike in everything but chance."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from sidestep.errors import ConfigError, SidestepError
from sidestep.training.batches import Collate, Draw, Draws, Plan, mix
from sidestep.training.objective import Task
from sidestep.training.timesteps import Sampler

_LEVELS = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096


@dataclass(frozen=True, slots=True)
class Asked:
    """One draw: a song's window with its seed, and the timestep that is not left to that seed."""

    draw: Draw
    timestep: float


@dataclass(frozen=True, slots=True)
class _Fixed:
    """A law of timesteps that knows one."""

    timestep: float

    def draw(self, count: int, generator: Generator) -> Tensor:
        return torch.full((count,), self.timestep)

    def quantiles(self, levels: Tensor) -> Tensor:
        return torch.full_like(levels, self.timestep)


def halves(
    plan: Plan, law: Sampler, *, batches: int, within: tuple[float, float], seed: int
) -> tuple[list[list[Asked]], list[list[Asked]]]:
    """Return the batches of both halves, `batches` in all.

    Both halves have the same timesteps, one from each of as many equal parts of the law (restricted to `within`), and
    go on through one shuffled list of the songs; which song meets which timestep, the windows and the noise are drawn
    anew. ConfigError where the law has no timestep in that range.
    """
    count = max(1, batches // 2) * plan.batch_size
    timesteps = _stratified(law, count, within, seed)
    songs = [at for at, song in enumerate(plan.songs) for _ in range(song.repeat)]
    random.Random(mix(seed, "songs")).shuffle(songs)
    return (
        _batches(plan, _half(plan, songs, timesteps, seed, half=0)),
        _batches(plan, _half(plan, songs, timesteps, seed, half=1)),
    )


def tasks(
    batches: Sequence[Sequence[Asked]], plan: Plan, *, cfg_ratio: float, rows: int
) -> Iterator[tuple[list[int], Task]]:
    """Yield the songs (by their place in the plan) and the task of each batch; DataError for a file that went bad.

    Prompts are padded to `rows` at least.
    """
    collate = Collate(rows)
    for batch in batches:
        items = [Draws(plan.songs, _Fixed(asked.timestep), cfg_ratio)[asked.draw] for asked in batch]
        result = collate(items)
        if isinstance(result, SidestepError):
            raise result
        yield [asked.draw.song for asked in batch], result.task


def _stratified(law: Sampler, count: int, within: tuple[float, float], seed: int) -> list[float]:
    # In float32, as they are drawn and trained: its 0.3 and 0.9 are not those of float64, which users type.
    timesteps = law.quantiles(_LEVELS).float()
    low, high = torch.tensor(within)
    inside = timesteps[(timesteps >= low) & (timesteps <= high)]
    if not len(inside):
        raise ConfigError(
            f"This run trains no timestep from {within[0]:g} to {within[1]:g}.",
            hint="Widen --timestep-focus, or set --timestep-mode continuous.",
        )
    jitter = random.Random(mix(seed, "timesteps"))
    return [float(inside[int((place + jitter.random()) / count * len(inside))]) for place in range(count)]


def _half(plan: Plan, songs: Sequence[int], timesteps: Sequence[float], seed: int, *, half: int) -> list[Asked]:
    frames = {song: group.frames for group in plan.groups for song in group.songs}
    order = list(timesteps)
    random.Random(mix(seed, half, "order")).shuffle(order)
    asked = []
    for place, timestep in enumerate(order):
        at = half * len(order) + place
        song = songs[at % len(songs)]
        draw_seed = mix(seed, "estimate", at)
        start = random.Random(draw_seed).randint(0, plan.songs[song].frames - frames[song])
        asked.append(Asked(Draw(song, start, frames[song], draw_seed), timestep))
    return asked


def _batches(plan: Plan, asked: Sequence[Asked]) -> list[list[Asked]]:
    """Fill batches of equal length in the order of the draws; what stays unfilled comes last."""
    batches: list[list[Asked]] = []
    filling: dict[int, list[Asked]] = {}
    for one in asked:
        batch = filling.setdefault(one.draw.frames, [])
        batch.append(one)
        if len(batch) == plan.batch_size:
            batches.append(filling.pop(one.draw.frames))
    return batches + list(filling.values())
