"""Attention for diffusers' ACE-Step decoder: the window by a window kernel, the rest without masks, prompts trimmed.

B batch, S patches of two latent frames, L condition rows, H heads, D head channels. Self-attention of the even blocks
sees `|i - j| <= window` patches; the odd blocks and all cross-attention see everything. The results are diffusers' own;
only the dense [S, S] mask and its cost are gone.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.transformers.ace_step_transformer import (
    AceStepAttention,
    AceStepTransformer1DModel,
    AceStepTransformerBlock,
)
from torch import Tensor

from sidestep.model.device import has_flash_window

# Sliding attention of [B, S, H, D] queries over [B, S, KV, D] keys and values, within a window of patches.
WindowKernel = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class SelfAttention:
    """A processor for self-attention blocks: projections, norms, rotary positions, then the kernel that fits."""

    def __init__(self, window_kernel: WindowKernel) -> None:
        self.window_kernel = window_kernel

    def __call__(
        self,
        attn: AceStepAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend from each patch to the patches it sees; `attention_mask` is not needed and not read."""
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        return attn.to_out[0](self.attend(attn, query, key, value, image_rotary_emb))

    def attend(
        self, attn: AceStepAttention, query: Tensor, key: Tensor, value: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Attend with what the layer projected, [B, S, heads x channels] each; returns the same for its output."""
        query, key, value = _heads(attn, query, key, value)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        if attn.sliding_window is not None and query.shape[1] > attn.sliding_window + 1:
            out = self.window_kernel(query, key, value, attn.sliding_window)
        else:
            out = full_attention(query, key, value)
        return out.flatten(2).to(query.dtype)


class CrossAttention:
    """A processor for cross-attention blocks that leaves out the padding rows of shorter prompts.

    The model itself has no padding mask and would attend to them. `rows_BL` holds for the next forward pass and its
    backward pass; None means that every row counts. One instance serves all blocks of a decoder.
    """

    def __init__(self) -> None:
        self.mask_B11L: Tensor | None = None

    def set_rows(self, rows_BL: Tensor | None) -> None:
        """Say which condition rows count in the next pass."""
        self.mask_B11L = None if rows_BL is None else rows_BL[:, None, None, :]

    def __call__(
        self,
        attn: AceStepAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend from the latents to the condition rows that count."""
        assert encoder_hidden_states is not None
        query, key = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states)
        return attn.to_out[0](self.attend(attn, query, key, attn.to_v(encoder_hidden_states)))

    def attend(self, attn: AceStepAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend with what the layer projected from the latents and from the condition."""
        query, key, value = _heads(attn, query, key, value)
        out = full_attention(query, key, value, mask=self.mask_B11L)
        return out.flatten(2).to(query.dtype)


def use_processors(decoder: AceStepTransformer1DModel, *, device: torch.device, dtype: torch.dtype) -> CrossAttention:
    """Give the decoder's attention these processors and return the one that all cross-attention shares."""
    self_attention, cross_attention = SelfAttention(window_kernel_for(device, dtype)), CrossAttention()
    for block in blocks_of(decoder):
        # diffusers' list of processor types is closed; what it calls is only `processor(attn, ...)`.
        block.self_attn.processor = cast("Any", self_attention)
        block.cross_attn.processor = cast("Any", cross_attention)
    return cross_attention


def blocks_of(decoder: AceStepTransformer1DModel) -> list[AceStepTransformerBlock]:
    """Return the decoder's blocks, typed."""
    return [block for block in decoder.layers if isinstance(block, AceStepTransformerBlock)]


def window_kernel_for(device: torch.device, dtype: torch.dtype) -> WindowKernel:
    """Return the fastest window kernel there is: torch's own FlashAttention on Ampere and newer, else blocks."""
    is_half = dtype in (torch.bfloat16, torch.float16)
    return flash_window if is_half and has_flash_window(device) else block_window


def full_attention(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Attention of [B, S, H, D] queries over [B, L, KV, D] keys; `mask` [B, 1, 1, L] is True where a row counts."""
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.transpose(1, 2)


def flash_window(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Sliding attention by the FlashAttention kernel inside torch, which skips what is outside the window."""
    # Private to torch, so pinned by a test on the GPU machine; `block_window` gives the same where it is missing.
    length = query.shape[1]
    return torch.ops.aten._flash_attention_forward(
        query, key, value, None, None, length, length, 0.0, False, False,
        window_size_left=window, window_size_right=window,
    )[0]  # fmt: skip


def block_window(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Sliding attention anywhere: blocks of `window` patches against themselves and their neighbours.

    Time and memory grow with S x window, not with S x S.
    """
    batch, length, heads, channels = query.shape
    blocks = -(-length // window)
    surplus = blocks * window - length
    # [B * blocks, window, H, D] queries against [B * blocks, 3 * window, KV, D] keys.
    blocked_query = F.pad(query, (0, 0, 0, 0, 0, surplus)).reshape(batch * blocks, window, heads, channels)
    blocked_key, blocked_value = (_neighbours(tensor, window, blocks, surplus) for tensor in (key, value))
    mask = _window_mask(length, window, blocks, query.device).repeat(batch, 1, 1)[:, None]
    out = full_attention(blocked_query, blocked_key, blocked_value, mask=mask)
    return out.reshape(batch, blocks * window, heads, channels)[:, :length]


def _neighbours(tensor: Tensor, window: int, blocks: int, surplus: int) -> Tensor:
    """[B, S, KV, D] -> [B * blocks, 3 * window, KV, D]: each block with the one before it and the one after."""
    batch, _, heads, channels = tensor.shape
    padded = F.pad(tensor, (0, 0, 0, 0, window, window + surplus))
    unfolded = padded.unfold(1, 3 * window, window)  # [B, blocks, KV, D, 3 * window]
    return unfolded.permute(0, 1, 4, 2, 3).reshape(batch * blocks, 3 * window, heads, channels)


def _window_mask(length: int, window: int, blocks: int, device: torch.device) -> Tensor:
    """[blocks, window, 3 * window], True where a key is in the song and in the query's window."""
    query_at = torch.arange(blocks * window, device=device).reshape(blocks, window, 1)
    key_at = torch.arange(3 * window, device=device) + (torch.arange(blocks, device=device)[:, None] - 1) * window
    key_at = key_at[:, None, :]
    inside = (key_at >= 0) & (key_at < length)
    # Queries of the last block that lie behind the song keep themselves, so that no row of the mask is empty.
    return (inside & ((query_at - key_at).abs() <= window)) | (query_at == key_at)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn [B, S, H, D] by rotary positions given as cosines and sines [S, D] (halves, not pairs), in float32."""
    cosine, sine = (part[None, :, None, :] for part in rotary)
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cosine + torch.cat([-second, first], dim=-1) * sine).to(x.dtype)


def _heads(attn: AceStepAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query = attn.norm_q(query.unflatten(-1, (attn.heads, attn.head_dim)))
    key = attn.norm_k(key.unflatten(-1, (attn.kv_heads, attn.head_dim)))
    return query, key, value.unflatten(-1, (attn.kv_heads, attn.head_dim))
