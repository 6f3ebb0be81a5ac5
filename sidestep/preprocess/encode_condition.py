"""Text and lyrics rows to the sequence the decoder attends to, and the context it is given beside the noise."""

import torch
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder
from torch import Tensor


def encode_condition(encoder: AceStepConditionEncoder, *, text: Tensor, lyrics: Tensor, timbre: Tensor) -> Tensor:
    """The condition rows [L, D] of one song, on the CPU: lyrics, one row of timbre, text, every row valid.

    `text` [1, n, width] and `lyrics` [1, m, width] come from the text encoder, `timbre` [1, frames, 64] is the
    reference: silence, as at inference without a reference song. Pinned by the reference case `cond_silence_timbre`.
    """
    device, dtype = encoder.device, encoder.dtype
    states, mask = encoder(
        text_hidden_states=text.to(device, dtype),
        text_attention_mask=torch.ones(text.shape[:2], device=device, dtype=dtype),
        lyric_hidden_states=lyrics.to(device, dtype),
        lyric_attention_mask=torch.ones(lyrics.shape[:2], device=device, dtype=dtype),
        refer_audio_acoustic_hidden_states_packed=timbre.to(device, dtype),
        refer_audio_order_mask=torch.zeros(1, dtype=torch.long, device=device),
    )
    return states[0][mask[0].bool()].cpu().contiguous()


def context_latents(silence: Tensor) -> Tensor:
    """The context [T, 128] of a song made from nothing: silence latents [1, T, 64] beside a mask of ones."""
    return torch.cat([silence[0], torch.ones_like(silence[0])], dim=-1)
