"""How timesteps are drawn: t in [0, 1], where 1 is pure noise.

Continuous: ACE-Step's own training draws t = max(a, b) of two logit-normals a, b = sigmoid(sigma * N(0, 1) + mu), so
P(t <= x) = Phi((logit(x) - mu) / sigma) ** 2. Discrete: one of the eight points that turbo is sampled with.
Both are pinned by `timestep_stats.json` of the reference data.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from sidestep.config.recipe import Recipe

DISCRETE_STEPS = 8


class Sampler(Protocol):
    """A law of timesteps: draws from it, and its quantiles."""

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Return [count] float32 timesteps in [0, 1], from the CPU generator alone."""
        ...

    def quantiles(self, levels: Tensor) -> Tensor:
        """Return the timestep below which each share in `levels` (0 < level < 1) of the draws lies, in float64."""
        ...


@dataclass(frozen=True, slots=True)
class Continuous:
    """The larger of two logit-normal draws, with the model's own `timestep_mu` and `timestep_sigma`."""

    mu: float
    sigma: float

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Return [count] timesteps; the two normals are drawn in the original's order."""
        first = torch.sigmoid(torch.randn(count, generator=generator) * self.sigma + self.mu)
        second = torch.sigmoid(torch.randn(count, generator=generator) * self.sigma + self.mu)
        return torch.maximum(first, second)

    def quantiles(self, levels: Tensor) -> Tensor:
        """Invert the distribution function: sigmoid(mu + sigma * Phi^-1(sqrt(level)))."""
        return torch.sigmoid(self.mu + self.sigma * torch.special.ndtri(levels.double().sqrt()))


@dataclass(frozen=True, slots=True)
class Discrete:
    """Uniform over the eight points s * k / (1 + (s - 1) * k), k = 1, 7/8 .. 1/8, of shift s."""

    shift: float

    @property
    def points(self) -> Tensor:
        """The [8] float32 points, the noisiest first."""
        even = torch.arange(DISCRETE_STEPS, 0, -1, dtype=torch.float64) / DISCRETE_STEPS
        return (self.shift * even / (1 + (self.shift - 1) * even)).float()

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Return [count] of the points, each equally likely."""
        return self.points[torch.randint(DISCRETE_STEPS, (count,), generator=generator)]

    def quantiles(self, levels: Tensor) -> Tensor:
        """Return the point whose share of the draws covers each level."""
        ascending = self.points.double().flip(0)
        return ascending[(levels.double() * DISCRETE_STEPS).long().clamp(max=DISCRETE_STEPS - 1)]


# The keys are the resolved values of `timestep_mode`.
SAMPLERS: dict[str, Callable[[Recipe, float, float], Sampler]] = {
    "continuous": lambda recipe, mu, sigma: Continuous(mu, sigma),
    "discrete": lambda recipe, mu, sigma: Discrete(recipe.shift),
}


def sampler_of(recipe: Recipe, *, mu: float, sigma: float) -> Sampler:
    """Return the sampler that a recipe asks for, with the model's logit-normal parameters."""
    return SAMPLERS[recipe.timestep_mode](recipe, mu, sigma)
