"""Text and lyrics rows to the sequence the decoder attends to, and the context it is given beside the noise."""

from collections.abc import Sequence

import torch
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder
from torch import Tensor


def encode_condition(encoder: AceStepConditionEncoder, *, text: Tensor, lyrics: Tensor, timbre: Tensor) -> Tensor:
    """The condition rows [L, D] of one song, on the CPU: lyrics, one row of timbre, text, every row valid.

    `text` [1, n, width] and `lyrics` [1, m, width] come from the text encoder, `timbre` [1, frames, 64] is the
    reference: silence, as at inference without a reference song. Pinned by the reference case `cond_silence_timbre`.
    """
    return encode_conditions(encoder, [(text, lyrics)], timbre_row=encode_timbre(encoder, timbre))[0]


def encode_timbre(encoder: AceStepConditionEncoder, timbre: Tensor) -> Tensor:
    """The one row [1, D] that a reference [1, frames, 64] comes to, on the encoder's device."""
    order = torch.zeros(1, dtype=torch.long, device=encoder.device)
    return encoder.timbre_encoder(timbre.to(encoder.device, encoder.dtype), order)[0][0]


def encode_conditions(
    encoder: AceStepConditionEncoder, songs: Sequence[tuple[Tensor, Tensor]], *, timbre_row: Tensor
) -> list[Tensor]:
    """The condition rows [L, D] of several songs (text [1, n, width], lyrics [1, m, width]) as `encode_condition` gives
    them, with the same timbre.

    Lyrics are encoded together, the padding of shorter ones behind a mask. That changes the rounding (1e-5 of float32;
    in bfloat16 its last bit, layer by layer); a song alone has no padding.
    """
    device, dtype = encoder.device, encoder.dtype
    lyrics = [rows[0] for _, rows in songs]
    lengths = torch.tensor([rows.shape[0] for rows in lyrics])
    padded = torch.nn.utils.rnn.pad_sequence(lyrics, batch_first=True).to(device, dtype)
    mask = (torch.arange(padded.shape[1]) < lengths[:, None]).to(device, dtype)
    sung = encoder.lyric_encoder(inputs_embeds=padded, attention_mask=mask)
    texts = encoder.text_projector(torch.cat([text[0] for text, _ in songs]).to(device, dtype))
    parts = zip(sung, lengths.tolist(), texts.split([text.shape[1] for text, _ in songs]), strict=True)
    return [torch.cat([rows[:length], timbre_row, text]).cpu() for rows, length, text in parts]


def context_latents(silence: Tensor) -> Tensor:
    """The context [T, 128] of a song made from nothing: silence latents [1, T, 64] beside a mask of ones."""
    return torch.cat([silence[0], torch.ones_like(silence[0])], dim=-1)
