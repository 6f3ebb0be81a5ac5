"""A decoder's linear layers brought together in memory, for `fused` blocks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import torch
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from torch import Tensor, nn

from sidestep.model.attention import CrossAttention, blocks_of
from sidestep.model.fused import FusedBlock, FusedLinears, Layout, Lora
from sidestep.model.names import SAME_INPUT

# Blocks whose weights are moved into one allocation together: enough that updating it takes few kernels, few enough
# that a card which the weights nearly fill has room for the move.
STACKED = 6
# Ranks are filled up with zeros to whole 16 bytes of a 16-bit format: matrix kernels are slow on other strides.
RANK_STEP = 8


@dataclass(frozen=True, slots=True)
class Group:
    """Linear layers of one block that read the same input, and their LoRA."""

    linears: Sequence[nn.Linear]
    loras: Sequence[Lora | None]

    @property
    def layout(self) -> Layout:
        """Return how they lie side by side."""
        ranks = [-(-lora.down.shape[0] // RANK_STEP) * RANK_STEP if lora else 0 for lora in self.loras]
        return Layout(self.linears[0].in_features, tuple(linear.out_features for linear in self.linears), tuple(ranks))

    @property
    def kind(self) -> tuple[object, ...]:
        """Return what must be the same for the groups of two blocks to share an allocation."""
        return self.layout, *((lora.scale, lora.down.shape[0]) if lora else None for lora in self.loras)


@dataclass(frozen=True, slots=True)
class Stack:
    """The memory of a group in some successive blocks: its products' operands, and the values these are made of.

    `stacked` [blocks, N + R, K + R] in the weights' dtype; `downs` [blocks, R, K] and each `up` [blocks, out, r]
    float32, with where its s B lies in `stacked`.
    """

    stacked: Tensor
    layout: Layout
    downs: Tensor
    ups: Sequence[tuple[Tensor, Tensor, float]]

    def refresh(self) -> None:
        """Bring A and s B up to date with what was trained."""
        self.stacked[:, self.layout.outputs :, : self.layout.inputs].copy_(self.downs)
        for up, target, scale in self.ups:
            torch.mul(up, scale, out=target)


@dataclass(frozen=True, slots=True)
class Fused:
    """A decoder's blocks with fused linears."""

    blocks: Sequence[FusedBlock]
    stacks: Sequence[Stack]

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the products' operands up to date with the LoRA's values; due before every forward pass."""
        for stack in self.stacks:
            stack.refresh()


def fuse(decoder: AceStepTransformer1DModel, loras: Mapping[str, Lora], cross_attention: CrossAttention) -> Fused:
    """Fuse the linear layers of all blocks; `loras` by the names of their layers (diffusers').

    Weights and LoRA values move into shared memory, where the modules that had them go on seeing them. The decoder
    must stay on its device from then on.
    """
    blocks = blocks_of(decoder)
    linears: list[dict[str, list[FusedLinears]]] = [{part: [] for part in SAME_INPUT} for _ in blocks]
    stacks = []
    for part, names in ((part, names) for part, groups in SAME_INPUT.items() for names in groups):
        groups = [_group(decoder, loras, [f"layers.{at}.{part}.{name}" for name in names]) for at in range(len(blocks))]
        at = 0
        for alike in _runs(groups):
            stack = _stack(alike)
            stacks.append(stack)
            for group, stacked in zip(alike, stack.stacked, strict=True):
                linears[at][part].append(FusedLinears(stacked, group.layout, group.loras))
                at += 1
    fused = [FusedBlock(block, own, cross_attention) for block, own in zip(blocks, linears, strict=True)]
    return Fused(fused, [stack for stack in stacks if stack.layout.rank])


def _group(decoder: nn.Module, loras: Mapping[str, Lora], names: Sequence[str]) -> Group:
    found = [decoder.get_submodule(name) for name in names]
    # PEFT keeps the layer it wraps.
    linears = [linear if isinstance(linear, nn.Linear) else linear.get_submodule("base_layer") for linear in found]
    return Group([cast("nn.Linear", linear) for linear in linears], [loras.get(name) for name in names])


def _runs(groups: Sequence[Group]) -> Iterator[list[Group]]:
    for _, alike in groupby(groups, key=lambda group: group.kind):
        run = list(alike)
        for start in range(0, len(run), STACKED):
            yield run[start : start + STACKED]


@torch.no_grad()
def _stack(groups: Sequence[Group]) -> Stack:
    """Move the weights and values of these groups, which are all of one kind, into memory of their own."""
    layout, weight = groups[0].layout, groups[0].linears[0].weight
    shape = (len(groups), layout.outputs + layout.rank, layout.inputs + layout.rank)
    stacked = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
    downs = torch.zeros(len(groups), layout.rank, layout.inputs, device=weight.device)
    ups = []
    for place, (out_at, rank_at) in enumerate(layout.places):
        for group, own in zip(groups, stacked, strict=True):
            _move(cast("nn.Parameter", group.linears[place].weight), own[out_at, : layout.inputs])
        loras = [lora for group in groups if (lora := group.loras[place])]
        if loras:
            up = torch.zeros(len(groups), *loras[0].up.shape, device=weight.device)
            for lora, own_down, own_up in zip(loras, downs, up, strict=True):
                _move(lora.down, own_down[rank_at][: lora.down.shape[0]])
                _move(lora.up, own_up)
            columns = slice(layout.inputs + rank_at.start, layout.inputs + rank_at.start + up.shape[2])
            ups.append((up, stacked[:, out_at, columns], loras[0].scale))
    return Stack(stacked, layout, downs, ups)


def _move(parameter: nn.Parameter, place: Tensor) -> None:
    place.copy_(parameter)
    parameter.data = place
