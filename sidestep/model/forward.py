"""The decoder's forward pass for training: diffusers' modules, in the same order, without what costs and gives nothing.

Against `AceStepTransformer1DModel.forward` it builds no dense mask, makes the patches contiguous once (the
convolution leaves them column-major, which slows every later operation), and lets the caller say which blocks are
recomputed in the backward pass. The result is the same.

B batch, T latent frames, S = T / 2 patches, C channels, L condition rows, D condition width.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def velocity(
    decoder: AceStepTransformer1DModel,
    *,
    hidden_states_BTC: Tensor,
    timestep_B: Tensor,
    condition_BLD: Tensor,
    context_BTC: Tensor,
    blocks: Sequence[Callable[..., Tensor]],
    recompute: Sequence[bool],
    any_length: bool = False,
) -> Tensor:
    """Return the velocity [B, T, C] at `timestep_B`, with r = t.

    `blocks` are the decoder's blocks, compiled or not; block i is recomputed in the backward pass where `recompute[i]`.
    `any_length` lets one compilation serve every length.
    """
    time_B1D, time_B6D = _time(decoder, timestep_B)
    frames = hidden_states_BTC.shape[1]
    inputs_BTC = torch.cat([context_BTC, hidden_states_BTC], dim=-1)
    inputs_BTC = F.pad(inputs_BTC, (0, 0, 0, -frames % decoder.patch_size))
    hidden = decoder.proj_in_conv(inputs_BTC.transpose(1, 2)).transpose(1, 2).contiguous()
    condition = decoder.condition_embedder(condition_BLD)
    rotary = _rotary(decoder, hidden)
    if any_length:
        for part in rotary:
            torch._dynamo.mark_dynamic(part, 0)
    for block, is_recomputed in zip(blocks, recompute, strict=True):
        if any_length:
            torch._dynamo.mark_dynamic(hidden, 1)
        if is_recomputed and torch.is_grad_enabled():
            # Dropout draws nothing from torch's generators here, so there is no state to preserve.
            hidden = checkpoint(
                block, hidden, rotary, time_B6D, None, condition, None, use_reentrant=False, preserve_rng_state=False
            )
        else:
            hidden = block(hidden, rotary, time_B6D, None, condition, None)
    shift, scale = (decoder.scale_shift_table + time_B1D).chunk(2, dim=1)
    hidden = (decoder.norm_out(hidden) * (1 + scale) + shift).type_as(hidden)
    return decoder.proj_out_conv(hidden.transpose(1, 2)).transpose(1, 2)[:, :frames]


def _time(decoder: AceStepTransformer1DModel, timestep_B: Tensor) -> tuple[Tensor, Tensor]:
    embedding, modulation = decoder.time_embed(timestep_B)
    # r = t in training: the second path sees zero and adds a constant, which is not to be skipped.
    embedding_r, modulation_r = decoder.time_embed_r(timestep_B - timestep_B)
    return (embedding + embedding_r).unsqueeze(1), modulation + modulation_r


def _rotary(decoder: AceStepTransformer1DModel, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [S, head channels] of the patches' positions, both halves alike."""
    channels = torch.arange(0, decoder.head_dim, 2, device=hidden.device, dtype=torch.float32)
    positions = torch.arange(hidden.shape[1], device=hidden.device, dtype=torch.float32)
    angles = torch.outer(positions, 1.0 / decoder.rope_theta ** (channels / decoder.head_dim)).repeat(1, 2)
    return angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)
