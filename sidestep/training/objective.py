"""The flow-matching loss, its weighting, and condition dropout.

B batch, T latent frames (25 a second), C latent channels (64), L condition rows, D condition width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sidestep.training.timesteps import Sampler

# How finely the law of the timesteps is read to norm a weighting: the mean of 4096 quantiles is exact to about 1e-4.
_LEVELS = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096


@dataclass(frozen=True, slots=True)
class MinSnr:
    """Min-SNR-gamma weighting of a velocity loss on the linear path.

    With x_t = (1 - t) x_0 + t x_1 and v = x_1 - x_0, the error of the implied x_0 = x_t - t v is t times that of v, and
    SNR = ((1 - t) / t)**2. Min-SNR (Hang et al. 2023, section 3.4) weights the x_0 error by min(SNR, gamma); on the
    velocity error that is t**2 min(SNR, gamma) = min((1 - t)**2, gamma t**2). Divided by its mean under the sampler in
    use, so that the learning rate keeps its meaning.
    """

    gamma: float
    mean: float

    @classmethod
    def normed(cls, gamma: float, sampler: Sampler) -> "MinSnr":
        """Return the weighting whose mean over the sampler's timesteps is 1."""
        return cls(gamma, float(_min_snr(sampler.quantiles(_LEVELS), gamma).mean()))

    def __call__(self, timesteps_B: Tensor) -> Tensor:
        """Return the weight of each sample's loss, [B]."""
        return _min_snr(timesteps_B, self.gamma) / self.mean


def _min_snr(timesteps: Tensor, gamma: float) -> Tensor:
    return torch.minimum((1 - timesteps).square(), gamma * timesteps.square())


@dataclass(frozen=True, slots=True)
class Task:
    """What the model is asked in one pass; every draw is already made, so that the same task gives the same loss.

    `latents_BTC`, `noise_BTC` and `timesteps_B` are float32. `condition_BLD` is padded to the longest of the batch;
    `rows_BL` says which rows count (None: all) and keeps the padding out of cross-attention. `is_dropped_B` marks the
    samples that are trained without their prompt.
    """

    latents_BTC: Tensor
    context_BTC: Tensor
    condition_BLD: Tensor
    rows_BL: Tensor | None
    noise_BTC: Tensor
    timesteps_B: Tensor
    is_dropped_B: Tensor

    def parts(self) -> tuple[Tensor | None, ...]:
        """Return the tensors in the order of their declaration."""
        return tuple(getattr(self, name) for name in self.__slots__)

    def to(self, device: torch.device, *, copy: bool = False) -> "Task":
        """Return the task on another device; copies from pinned memory do not block. `copy`: even if it is there."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True, copy=copy))

    def pin_memory(self) -> "Task":
        """Return the task in pinned memory; called by torch's DataLoader."""
        return self._map(Tensor.pin_memory)

    def copy_(self, other: "Task") -> None:
        """Take over the numbers of a task of the same shapes, in place."""
        for mine, theirs in zip(self.parts(), other.parts(), strict=True):
            if mine is not None and theirs is not None:
                mine.copy_(theirs, non_blocking=True)

    def _map(self, move: Callable[[Tensor], Tensor]) -> "Task":
        moved = [None if tensor is None else move(tensor) for tensor in self.parts()]
        return Task(*moved)  # pyright: ignore[reportArgumentType]  Only rows_BL can be None, and stays where it is.


def drop_conditions(condition_BLD: Tensor, null_condition: Tensor, is_dropped_B: Tensor) -> Tensor:
    """Put the null condition [1, 1, D] in place of every row of the dropped samples, as the original does."""
    return torch.where(is_dropped_B[:, None, None], null_condition.expand_as(condition_BLD), condition_BLD)


def noisy_latents(task: Task) -> Tensor:
    """Return x_t = t x_1 + (1 - t) x_0, [B, T, C] float32."""
    t_B11 = task.timesteps_B[:, None, None]
    return t_B11 * task.noise_BTC + (1 - t_B11) * task.latents_BTC


def flow_matching_losses(velocity_BTC: Tensor, task: Task) -> Tensor:
    """Return the mean squared error of each sample's velocity against x_1 - x_0, [B] float32."""
    target_BTC = task.noise_BTC - task.latents_BTC
    return (velocity_BTC.float() - target_BTC).square().mean(dim=(1, 2))
