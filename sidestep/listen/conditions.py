"""Prompts to what the decoder attends to; every encoder is released when all prompts are encoded."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sidestep.data.prompts import Prompt as Words
from sidestep.data.prompts import lyrics_text, prompt_text
from sidestep.listen.prompts import SamplePrompt
from sidestep.model.checkpoint import Checkpoint
from sidestep.model.device import free_memory, wide_dtype
from sidestep.model.loading import load_condition_encoder, load_silence_latent, load_text_encoder
from sidestep.preprocess.encode_condition import encode_condition
from sidestep.preprocess.encode_text import encode_prompt

_TIMBRE_FRAMES = 750  # 30 s of silence stand for "no reference", as in inference.


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """A prompt with everything decided, and its condition rows [1, L, D] on the CPU."""

    prompt: SamplePrompt
    seconds: float
    seed: int
    rows_BLD: Tensor


def encode_prompts(
    checkpoint: Checkpoint,
    prompts: Sequence[SamplePrompt],
    *,
    seconds: float,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Wording]:
    """Encode prompts as inference does, XL with its corrected timbre encoder.

    `seconds` and `seed` are for prompts that state none; the seed counts up from prompt to prompt.
    """
    dtype = wide_dtype(dtype)
    lengths = [prompt.duration or seconds for prompt in prompts]
    with torch.no_grad():
        tokenizer, text_encoder = load_text_encoder(checkpoint, device=device, dtype=dtype)
        texts = [encode_prompt(tokenizer, text_encoder, _words(*pair)) for pair in zip(prompts, lengths, strict=True)]
        del text_encoder
        encoder = load_condition_encoder(checkpoint, device=device, dtype=dtype)
        timbre = load_silence_latent(checkpoint, frames=_TIMBRE_FRAMES)
        rows = [encode_condition(encoder, text=text.text, lyrics=text.lyrics, timbre=timbre)[None] for text in texts]
        del encoder
    free_memory(device)
    return [
        Wording(
            prompt=prompt, seconds=length, seed=seed + place if prompt.seed is None else prompt.seed, rows_BLD=rows_BLD
        )
        for place, (prompt, length, rows_BLD) in enumerate(zip(prompts, lengths, rows, strict=True))
    ]


def _words(prompt: SamplePrompt, seconds: float) -> Words:
    text = prompt_text(
        prompt.caption,
        bpm=prompt.bpm,
        timesignature=prompt.timesignature,
        keyscale=prompt.keyscale,
        seconds=int(seconds),
    )
    return Words(text, lyrics_text(prompt.lyrics, language=prompt.language))
