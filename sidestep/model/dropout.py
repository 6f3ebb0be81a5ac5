"""Dropout whose mask is a pure function of a seed: the same eager, compiled, captured, and recomputed.

torch's own dropout draws from a generator: its masks differ between eager and compiled code, and a recomputed block
has to rewind the generator, which a CUDA graph cannot. Here the mask is a hash of (seed, module, element).
"""

import torch
from torch import Tensor, nn

from sidestep.model.names import SAME_INPUT

# Odd constants and shifts of the 32-bit finalizer "lowbias32" (C. Wellons, 2018), as signed 32-bit numbers.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32
_STRIDE = 0x9E3779B1 - 2**32


class SeededDropout(nn.Module):
    """Drops each element of its input with probability `p` while training, and scales the rest by 1 / (1 - p).

    `seed` is a tensor [] int32 that all modules of an adapter share: filling it anew draws new masks. `salt` tells
    the modules apart.
    """

    salt: Tensor
    seed: Tensor

    def __init__(self, p: float, seed: Tensor, salt: int) -> None:
        super().__init__()
        self.p = p
        # A tensor, not a number: compiled code serves all modules alike.
        mixed = torch.tensor((salt * 0x85EBCA6B + 0x27D4EB2F) % 2**31, dtype=torch.int32, device=seed.device)
        self.register_buffer("salt", mixed, persistent=False)
        self.register_buffer("seed", seed, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with elements dropped, in its dtype."""
        if not self.training or not self.p:
            return x
        place = torch.arange(x.numel(), device=x.device, dtype=torch.int32).view(x.shape)
        hashed = _hash((place ^ (self.seed ^ self.salt)) * _STRIDE)
        kept = (hashed & 0x7FFFFFFF) >= int(self.p * 2**31)
        return torch.where(kept, x * (1 / (1 - self.p)), 0)


def _hash(x: Tensor) -> Tensor:
    """Mix the bits of int32 numbers; `>>` keeps the sign, so the shifted-in bits are masked off."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _FIRST
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _SECOND
    return x ^ ((x >> 16) & 0xFFFF)


def seed_dropout(decoder: nn.Module, p: float) -> Tensor:
    """Put seeded dropout in place of every `nn.Dropout` with probability `p` in the decoder; return the shared seed.

    Layers that read the same input drop the same elements of it, so that their products can be made together.
    """
    device = next(decoder.parameters()).device
    seed = torch.zeros((), dtype=torch.int32, device=device)
    places = [
        (path, parent, name)
        for path, parent in decoder.named_modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Dropout) and child.p == p and p > 0
    ]
    salts: dict[str, int] = {}
    for path, parent, name in places:
        setattr(parent, name, SeededDropout(p, seed, salts.setdefault(_input_of(path), len(salts))))
    return seed


def _input_of(path: str) -> str:
    """Name the input of the linear layer that a module at `path` belongs to: the first layer that reads it."""
    for part, groups in SAME_INPUT.items():
        block, found, rest = path.partition(f".{part}.")
        for names in groups if found else ():
            if any(rest == name or rest.startswith(f"{name}.") for name in names):
                return f"{block}.{part}.{names[0]}"
    return path
