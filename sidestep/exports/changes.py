"""What an adapter does to a weight, in the forms adapters come in; the scale is folded into the factors.

Each form has a product, the change before magnitudes. With magnitudes m (DoRA) the weight W becomes
m (W + product) / |W + product|, the norm taken over each row (Liu et al. 2024, "DoRA", section 4.1; PEFT and LyCORIS
agree).
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


class Change(Protocol):
    """One module's change."""

    @property
    def magnitude(self) -> Tensor | None:
        """The norm [out] that each row of the changed weight has, or None where it is not trained."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """The rows and columns of the weight it changes, the kernel of a convolution counted as columns."""
        ...

    def product(self) -> Tensor:
        """Return the change before magnitudes, float64, in the weight's shape or [out, in x kernel]."""
        ...

    def with_magnitude(self, magnitude: Tensor) -> "Change":
        """Return the same change with other magnitudes."""
        ...


@dataclass(frozen=True, slots=True)
class LowRank:
    """LoRA and DoRA: up [out, rank] @ down [rank, in]."""

    down: Tensor
    up: Tensor
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """The number of rows of `down`."""
        return self.down.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """The rows of `up` and the columns of `down`."""
        return self.up.shape[0], self.down.flatten(1).shape[1]

    def product(self) -> Tensor:
        """Return up @ down."""
        return self.up.double().flatten(1) @ self.down.double().flatten(1)

    def with_magnitude(self, magnitude: Tensor) -> Change:
        """Return the same change with other magnitudes."""
        return replace(self, magnitude=magnitude)


@dataclass(frozen=True, slots=True)
class Kronecker:
    """LoKr: first [a, b] (x) second [c, d], where `second` is one matrix or the two it is the product of."""

    first: Tensor
    second: tuple[Tensor, ...]
    magnitude: Tensor | None = None

    def whole_second(self) -> Tensor:
        """Return the second factor as one matrix, float64."""
        matrices = [matrix.double() for matrix in self.second]
        return matrices[0] if len(matrices) == 1 else matrices[0] @ matrices[1].flatten(1)

    @property
    def size(self) -> tuple[int, int]:
        """The products of the factors' sizes."""
        (a, b), c, d = self.first.shape, self.second[0].shape[0], self.second[-1].flatten(1).shape[1]
        return a * c, b * d

    def product(self) -> Tensor:
        """Return the Kronecker product."""
        second = self.whole_second()
        first = self.first.double().reshape(*self.first.shape, *[1] * (second.ndim - 2))
        return torch.kron(first, second)

    def with_magnitude(self, magnitude: Tensor) -> Change:
        """Return the same change with other magnitudes."""
        return replace(self, magnitude=magnitude)


@dataclass(frozen=True, slots=True)
class Hadamard:
    """LoHa: (w1_a @ w1_b) * (w2_a @ w2_b), elementwise."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    magnitude: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """The size of both matrices."""
        return self.w1_a.shape[0], self.w1_b.shape[1]

    def product(self) -> Tensor:
        """Return the elementwise product."""
        return (self.w1_a.double() @ self.w1_b.double()) * (self.w2_a.double() @ self.w2_b.double())

    def with_magnitude(self, magnitude: Tensor) -> Change:
        """Return the same change with other magnitudes."""
        return replace(self, magnitude=magnitude)


def changed(weight: Tensor, product: Tensor, magnitude: Tensor | None) -> Tensor:
    """Return the weight (float64) after a change."""
    merged = weight + product.reshape(weight.shape)
    if magnitude is None:
        return merged
    rows = [-1, *[1] * (weight.ndim - 1)]
    return merged * (magnitude.double() / row_norms(merged)).reshape(rows)


def row_norms(weight: Tensor) -> Tensor:
    """Return the norm of each row, [out]."""
    return weight.flatten(1).norm(dim=1)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return |found - wanted| / |wanted|; 0 where both are nothing, infinity where only `wanted` is."""
    distance, size = (found - wanted).norm().item(), wanted.norm().item()
    if distance == 0:
        return 0.0
    return distance / size if size else float("inf")
