"""Decoder blocks as few large products: linear layers that read the same input as one, their LoRA riding along.

A block with LoRA on its attention makes some seventy matrix products forward and backward, most of them so thin that
a large GPU idles. Here queries, keys and values are one product, gate and up are one, and a LoRA's thin products with
the layer's input and with its output's gradient are further rows and columns of the layer's own:

        K          R
    N [ W      |  s B ]      y = x W^T + h (s B)^T   and   h = x A^T       from rows    [W; A]
    R [ A      |      ]      dx = dy W + dh A        and   dh = dy (s B)   from columns [W | s B]

K inputs, N outputs of all layers of a group, R their ranks together; B is block-diagonal, s the layer's scale. The
numbers are PEFT's but for rounding; its modules keep the parameters, and the weights of both are the same memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.transformers.ace_step_transformer import AceStepTransformerBlock
from torch import Tensor, nn

from sidestep.model.attention import CrossAttention, SelfAttention


@dataclass(frozen=True, slots=True)
class Lora:
    """The LoRA of a linear layer: `down` A [r, in], `up` B [out, r], the scale of B A, and the dropout of its input."""

    down: nn.Parameter
    up: nn.Parameter
    scale: float
    dropout: nn.Module


@dataclass(frozen=True, slots=True)
class Layout:
    """How the outputs and ranks of a group of layers lie side by side; `ranks` as they are stored, filled up."""

    inputs: int
    outs: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def outputs(self) -> int:
        """Return N: the outputs of all layers."""
        return sum(self.outs)

    @property
    def rank(self) -> int:
        """Return R: the ranks of all layers."""
        return sum(self.ranks)

    @property
    def places(self) -> list[tuple[slice, slice]]:
        """Return for each layer where its outputs lie, and where its ranks."""
        outs, ranks = (
            [slice(*ends) for ends in pairwise(accumulate(sizes, initial=0))] for sizes in (self.outs, self.ranks)
        )
        return list(zip(outs, ranks, strict=True))


class FusedLinears(nn.Module):
    """Linear layers that read the same input, as one product."""

    stacked: Tensor

    def __init__(self, stacked: Tensor, layout: Layout, loras: Sequence[Lora | None]) -> None:
        super().__init__()
        self.layout = layout
        self.register_buffer("stacked", stacked, persistent=False)
        trained = [(place, lora) for place, lora in zip(layout.places, loras, strict=True) if lora]
        # Every A, then every B. A tuple, so that they stay the parameters of PEFT's modules alone.
        self.trained = (*(lora.down for _, lora in trained), *(lora.up for _, lora in trained))
        # Where each LoRA's outputs and ranks lie, how many of these are its own, and its scale.
        self.parts = tuple((*place, lora.down.shape[0], lora.scale) for place, lora in trained)
        # All of a group drop the same elements of their input.
        self.dropout = trained[0][1].dropout if trained else None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what each layer makes of x [..., K], in the dtype of the weights."""
        x = x.to(self.stacked.dtype)
        if self.dropout is None:
            return F.linear(x, self.stacked).split(self.layout.outs, dim=-1)
        dropped = self.dropout(x)
        y = _Product.apply(x, None if dropped is x else dropped, self.stacked, self, *self.trained)
        return cast("Tensor", y).split(self.layout.outs, dim=-1)


class _Product(torch.autograd.Function):
    """y = x W^T + h (s B)^T with h = x A^T, or of x with dropout; gradients of x, of each A and of each B."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, stacked: Tensor, linears: FusedLinears, *parameters: Tensor
    ) -> Tensor:
        outs, inputs = linears.layout.outputs, linears.layout.inputs
        rows = x.flatten(0, -2)
        if dropped is None:
            both = rows @ stacked[:, :inputs].T
            # A tensor of its own: a view would keep the whole product alive until the backward pass.
            y, hidden = both[:, :outs], both[:, outs:].contiguous()
        else:
            y, hidden = rows @ stacked[:outs, :inputs].T, dropped.flatten(0, -2) @ stacked[outs:, :inputs].T
        ctx.save_for_backward(x if dropped is None else dropped, hidden, stacked)
        ctx.linears, ctx.rides = linears, dropped is None
        return _sum(y, hidden @ stacked[:outs, inputs:].T).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dropped, hidden, stacked = ctx.saved_tensors
        linears: FusedLinears = ctx.linears
        outs, inputs = linears.layout.outputs, linears.layout.inputs
        dy = gradients[0].to(stacked.dtype).flatten(0, -2)
        dx = d_dropped = None
        if ctx.needs_input_grad[0]:
            both = dy @ stacked[:outs]
            dx, d_hidden = both[:, :inputs], both[:, inputs:]
            d_dropped = d_hidden @ stacked[outs:, :inputs]
            if ctx.rides:
                dx, d_dropped = _sum(dx, d_dropped), None
        else:  # The prompt: nothing before it is trained.
            d_hidden = dy @ stacked[:outs, inputs:]
        d_down, d_up = d_hidden.T @ dropped.flatten(0, -2), dy.T @ hidden
        downs, ups = [], []
        for out_at, rank_at, rank, scale in linears.parts:
            downs.append(d_down[rank_at][:rank].float())
            ups.append(d_up[out_at, rank_at][:, :rank].float() * scale)
        dx = None if dx is None else dx.view(dropped.shape)
        d_dropped = None if d_dropped is None else d_dropped.view(dropped.shape)
        return dx, d_dropped, None, None, *downs, *ups


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """Return a + b, where b is a product, in their dtype."""
    # Compiled, a product and a sum would become one call that first copies all of a; apart, the sum is part of what
    # reads it. In float32, as compiled code adds anyhow, the two are no longer taken for one.
    return (a.float() + b.float()).to(a.dtype) if torch.compiler.is_compiling() else a + b


class FusedBlock(nn.Module):
    """One block of the decoder: diffusers' own arithmetic in the same order, over fused linears."""

    def __init__(
        self,
        block: AceStepTransformerBlock,
        linears: Mapping[str, Sequence[FusedLinears]],
        cross_attention: CrossAttention,
    ) -> None:
        super().__init__()
        self.block = block
        self.self_qkv, self.self_out = linears["self_attn"]
        self.cross_q, self.cross_kv, self.cross_out = linears["cross_attn"]
        self.gate_up, self.down = linears["mlp"]
        self.self_attention = cast("SelfAttention", block.self_attn.processor)
        self.cross_attention = cross_attention

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], time_B6D: Tensor, _: None, condition: Tensor, __: None
    ) -> Tensor:
        """Return the residual stream [B, S, D] after this block; the arguments are those of diffusers' block."""
        block = self.block
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (block.scale_shift_table + time_B6D).chunk(6, dim=1)
        x = (block.self_attn_norm(hidden) * (1 + scale) + shift).type_as(hidden)
        query, key, value = self.self_qkv(x)
        out = self.self_attention.attend(block.self_attn, query, key, value, rotary)
        hidden = (hidden + self.self_out(out)[0] * gate).type_as(hidden)
        x = block.cross_attn_norm(hidden).type_as(hidden)
        key, value = self.cross_kv(condition)
        out = self.cross_attention.attend(block.cross_attn, self.cross_q(x)[0], key, value)
        hidden = hidden + self.cross_out(out)[0]
        x = (block.mlp_norm(hidden) * (1 + mlp_scale) + mlp_shift).type_as(hidden)
        gate, up = self.gate_up(x)
        return (hidden + self.down(F.silu(gate) * up)[0] * mlp_gate).type_as(hidden)
