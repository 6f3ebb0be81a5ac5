"""Renders the same second of music without and with an adapter, in diffusers' pipeline, and measures the difference."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
import torch
from diffusers.pipelines.ace_step.pipeline_ace_step import AceStepPipeline
from torch import Tensor

from sidestep.data.dataset_file import Track
from sidestep.errors import RunError
from sidestep.model.checkpoint import Checkpoint
from sidestep.model.pipeline import load_pipeline

_STEPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """Two WAV files from the same prompt and noise, and how far they are apart."""

    without_adapter: Path
    with_adapter: Path
    difference: float
    """RMS of the difference of the two, over the RMS of the sound without the adapter."""


def render_with_and_without(
    checkpoint: Checkpoint,
    adapter: Path,
    track: Track,
    *,
    folder: Path,
    seconds: float,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Rendering:
    """Render `seconds` of the track's own prompt into `folder`, first without and then with the adapter's folder.

    Raises RunError when a sound is not finite or is silent.
    """
    pipeline = load_pipeline(checkpoint, device=device, dtype=dtype)
    words = _words(track)
    paths = folder / "without_adapter.wav", folder / "with_adapter.wav"
    plain = _render(pipeline, words, seconds=seconds, seed=seed)
    pipeline.load_lora_weights(str(adapter))
    adapted = _render(pipeline, words, seconds=seconds, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    for path, audio in zip(paths, (plain, adapted), strict=True):
        soundfile.write(path, audio.T.numpy(), pipeline.sample_rate, subtype="PCM_16")
    return Rendering(
        without_adapter=paths[0], with_adapter=paths[1], difference=(_rms(adapted - plain) / _rms(plain)).item()
    )


def _words(track: Track) -> Mapping[str, Any]:
    """What the pipeline is told: the facts of a track of the dataset, as it was trained on them."""
    return {
        "prompt": track.caption,
        "lyrics": track.lyrics,
        "vocal_language": track.language,
        "bpm": track.bpm,
        "keyscale": track.keyscale,
        "timesignature": track.timesignature,
    }


def _render(pipeline: AceStepPipeline, words: Mapping[str, Any], *, seconds: float, seed: int) -> Tensor:
    """Give the sound as float32 [2, samples], with a peak of -1 dBFS."""
    generator = torch.Generator().manual_seed(seed)
    output = pipeline(
        **words, audio_duration=seconds, num_inference_steps=_STEPS, generator=generator, output_type="pt"
    )
    audio = output.audios[0].float().cpu()  # pyright: ignore[reportAttributeAccessIssue]
    if not torch.isfinite(audio).all() or not audio.any():
        raise RunError("The model rendered no sound: its output is silent or not finite.")
    return audio


def _rms(audio: Tensor) -> Tensor:
    return audio.square().mean().sqrt()
