"""The held-out loss: fixed songs, noise and timesteps, no dropout, no windows; comparable between epochs and runs."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sidestep.config.processes import ALONE, Processes
from sidestep.preprocess.tensors import read_sample
from sidestep.training.batches import Song, mix
from sidestep.training.objective import Task
from sidestep.training.passes import Model
from sidestep.training.timesteps import Sampler

STRATA = 8  # Timesteps a song: one for each eighth of the law the model was trained with.
BANDS = 5


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """The mean over held-out songs, its standard error (None for one song), and the mean in each band of timesteps.

    `songs` are the losses of the songs themselves, for comparing two adapters song by song.
    """

    mean: float
    standard_error: float | None
    bands: Mapping[str, float]
    songs: Sequence[float]


def held_out_loss(model: Model, songs: Sequence[Song], law: Sampler, *, processes: Processes = ALONE) -> HeldOutLoss:
    """Measure the loss on `songs`, each at the mid-quantiles of the model's own law of timesteps, unweighted.

    Several processes share the songs, and all return the same: what one alone would.
    """
    timesteps = law.quantiles((torch.arange(STRATA, dtype=torch.float64) + 0.5) / STRATA).float()
    losses_SK = _losses(model, songs, timesteps, processes)
    per_song = [sum(values) / len(values) for values in losses_SK]
    per_band: dict[str, list[float]] = defaultdict(list)
    for values in losses_SK:
        for t, value in zip(timesteps.tolist(), values, strict=True):
            per_band[_band(t)].append(value)
    mean = sum(per_song) / len(per_song)
    bands = {band: sum(values) / len(values) for band, values in sorted(per_band.items())}
    return HeldOutLoss(mean, standard_error(per_song), bands, per_song)


def _losses(model: Model, songs: Sequence[Song], timesteps: torch.Tensor, processes: Processes) -> list[list[float]]:
    """Return the losses of each song at each timestep. All processes measure as many songs, some of them twice."""
    turns = -(-len(songs) // processes.count)
    own = [songs[(turn * processes.count + processes.rank) % len(songs)] for turn in range(turns)]
    was_training = model.decoder.training
    model.decoder.eval()
    measured = []
    with torch.no_grad():
        for song in own:
            questions = [_question(song, place, t) for place, t in enumerate(timesteps)]
            with model.spread_over(processes):
                measured.append(torch.cat([model.losses(question.to(model.device)) for question in questions]))
    model.decoder.train(was_training)
    # [turns, processes, timesteps]: the songs in their order.
    gathered = torch.stack(processes.gather(torch.stack(measured)), dim=1)
    return gathered.flatten(0, 1)[: len(songs)].tolist()


def _question(song: Song, place: int, timestep: torch.Tensor) -> Task:
    sample = read_sample(song.path)
    # The song's name, not its place in the folder or the run's seed, fixes its noise.
    generator = torch.Generator().manual_seed(mix("validation", song.path.stem, place))
    latents_BTC = sample.target_latents.float()[None]
    return Task(
        latents_BTC=latents_BTC,
        context_BTC=sample.context_latents[None],
        condition_BLD=sample.encoder_hidden_states[None],
        rows_BL=None,
        noise_BTC=torch.randn(latents_BTC.shape, generator=generator),
        timesteps_B=timestep[None],
        is_dropped_B=torch.tensor([False]),
    )


def _band(timestep: float) -> str:
    band = min(int(timestep * BANDS), BANDS - 1)
    return f"{band / BANDS:.1f}-{(band + 1) / BANDS:.1f}"


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean of these values; None for a single one."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))
