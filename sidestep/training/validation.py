"""The held-out loss: fixed songs, noise and timesteps, no dropout, no windows; comparable between epochs and runs."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

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


def held_out_loss(model: Model, songs: Sequence[Song], law: Sampler) -> HeldOutLoss:
    """Measure the loss on `songs`, each at the mid-quantiles of the model's own law of timesteps, unweighted."""
    timesteps = law.quantiles((torch.arange(STRATA, dtype=torch.float64) + 0.5) / STRATA).float()
    per_song: list[float] = []
    per_band: dict[str, list[float]] = defaultdict(list)
    was_training = model.decoder.training
    model.decoder.eval()
    with torch.no_grad():
        for song in songs:
            losses = [model.losses(_question(song, place, t).to(model.device)) for place, t in enumerate(timesteps)]
            values = torch.cat(losses).tolist()
            per_song.append(sum(values) / len(values))
            for t, value in zip(timesteps.tolist(), values, strict=True):
                per_band[_band(t)].append(value)
    model.decoder.train(was_training)
    mean = sum(per_song) / len(per_song)
    bands = {band: sum(values) / len(values) for band, values in sorted(per_band.items())}
    return HeldOutLoss(mean, standard_error(per_song), bands, per_song)


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
