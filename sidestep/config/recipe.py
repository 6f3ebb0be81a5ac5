"""The recipes `fixed` and `vanilla`, and what a run really trains once nothing is left to decide."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from sidestep.config.train import TrainConfig

CONDITION_DROPOUT = 0.15  # The ratio base and sft were trained with.
TURBO_SHIFT = 3.0  # The shift the turbo model is sampled with, in eight steps.
LEARNING_RATE = 1e-4
PRODIGY_LEARNING_RATE = 1.0  # Prodigy estimates the step size itself; its lr is a multiplier.


# `fixed` trains as the models were made; `vanilla` reproduces the official trainer. A pinned setting is no flag there.
RECIPE_PINS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "fixed": MappingProxyType({}),
        "vanilla": MappingProxyType(
            {"timestep_mode": "discrete", "shift": 3.0, "cfg_ratio": 0.0, "loss_weighting": "none", "snr_gamma": 5.0}
        ),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The objective of a run, with nothing left to decide."""

    name: str
    timestep_mode: Literal["continuous", "discrete"]
    shift: float
    cfg_ratio: float
    loss_weighting: Literal["none", "min_snr"]
    snr_gamma: float

    def __str__(self) -> str:
        if self.timestep_mode == "discrete":
            timesteps = f"the eight timesteps of shift {self.shift:g}"
        else:
            timesteps = "continuous logit-normal timesteps (the larger of two draws)"
        dropout = f"{self.cfg_ratio:.0%} condition dropout" if self.cfg_ratio else "no condition dropout"
        weighting = (
            f"min-SNR weighting (gamma {self.snr_gamma:g})" if self.loss_weighting == "min_snr" else "no weighting"
        )
        return f"{self.name}: {timesteps}, {dropout}, {weighting}"


def resolve_recipe(config: TrainConfig, *, name: str, is_turbo: bool) -> Recipe:
    """Decide what the settings leave to the model: turbo trains on its discrete timesteps and without dropout."""
    mode = config.timestep_mode
    if mode == "auto":
        mode = "discrete" if is_turbo else "continuous"
    cfg_ratio = config.cfg_ratio
    if cfg_ratio is None:
        cfg_ratio = 0.0 if is_turbo else CONDITION_DROPOUT
    return Recipe(
        name=name,
        timestep_mode=mode,
        shift=TURBO_SHIFT if config.shift is None else config.shift,
        cfg_ratio=cfg_ratio,
        loss_weighting=config.loss_weighting,
        snr_gamma=config.snr_gamma,
    )


def learning_rate_of(config: TrainConfig) -> float:
    """Return the learning rate that was given, else the optimizer's usual one."""
    if config.learning_rate is not None:
        return config.learning_rate
    return PRODIGY_LEARNING_RATE if config.optimizer_type == "prodigy" else LEARNING_RATE


def schedule_of(config: TrainConfig) -> str:
    """Return the schedule; prodigy adapts the step size itself and is always constant."""
    return "constant" if config.optimizer_type == "prodigy" else config.scheduler_type


def songs_held_out(count: int, share: float) -> int:
    """Return how many of `count` songs (two at least) `--val-split` holds out: one at least, and never all of them."""
    return min(max(1, round(count * share)), count - 1) if share else 0
