"""Any change as plain LoRA of a chosen rank: the best there is of that rank (Eckart and Young 1936)."""

import torch
from torch import Tensor
from torch.nn import functional

from sidestep.exports.changes import Change, Kronecker, LowRank

_SMALL = 512  # The side up to which a full decomposition costs nothing.
_OVERSAMPLING = 24
_POWER_ITERATIONS = 4


def as_low_rank(change: Change, rank: int, *, whole: Tensor | None = None) -> LowRank:
    """Return the closest LoRA of `rank` to a change, float32, padded with zeros where less is needed.

    `whole` is the change of the weight itself, needed where the change has magnitudes.
    """
    if isinstance(change, LowRank) and change.magnitude is None and change.rank <= rank:
        return _padded(change.up, change.down.flatten(1), rank)
    left, sizes, right = _decompose(change, rank, whole)
    kept = min(rank, sizes.numel())
    roots = sizes[:kept].sqrt()
    return _padded(left[:, :kept] * roots, roots[:, None] * right[:kept], rank)


def _decompose(change: Change, rank: int, whole: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return left [out, n], falling singular values [n] and right [n, in], n at least `rank` if there are so many."""
    if whole is not None:
        return _singular_values(whole.flatten(1), rank)
    if isinstance(change, LowRank):
        # The singular values of a product of thin factors are those of the small matrix between their bases.
        left, left_core = torch.linalg.qr(change.up.double().flatten(1))
        right, right_core = torch.linalg.qr(change.down.double().flatten(1).T)
        inner_left, sizes, inner_right = torch.linalg.svd(left_core @ right_core.T)
        return left @ inner_left, sizes, inner_right @ right.T
    if isinstance(change, Kronecker) and change.whole_second().ndim == 2:
        return _kronecker_values(change, rank)
    return _singular_values(change.product().flatten(1), rank)


def _kronecker_values(change: Kronecker, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors of a Kronecker product are the Kronecker products of its factors' singular vectors."""
    first_left, first_sizes, first_right = torch.linalg.svd(change.first.double(), full_matrices=False)
    second_left, second_sizes, second_right = torch.linalg.svd(change.whole_second(), full_matrices=False)
    sizes, order = torch.kron(first_sizes, second_sizes).sort(descending=True, stable=True)
    order = order[:rank]
    i, j = order // second_sizes.numel(), order % second_sizes.numel()
    left = torch.einsum("an,cn->acn", first_left[:, i], second_left[:, j]).flatten(0, 1)
    right = torch.einsum("nb,nd->nbd", first_right[i], second_right[j]).flatten(1)
    return left, sizes[:rank], right


def _singular_values(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    if min(matrix.shape) <= max(_SMALL, rank + _OVERSAMPLING):
        return torch.linalg.svd(matrix.double(), full_matrices=False)
    # Random projections find the leading part of a large matrix (Halko et al. 2011); the seed makes files repeatable.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, sizes, right = torch.svd_lowrank(matrix.float(), q=rank + _OVERSAMPLING, niter=_POWER_ITERATIONS)
    return left, sizes, right.T


def _padded(up: Tensor, down: Tensor, rank: int) -> LowRank:
    missing = rank - down.shape[0]
    return LowRank(
        down=functional.pad(down.float(), (0, 0, 0, missing)).contiguous(),
        up=functional.pad(up.float(), (0, missing)).contiguous(),
    )
