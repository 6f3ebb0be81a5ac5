"""Sound from encoded prompts: diffusers' pipeline makes the latents, the VAE decodes them in tiles.

B batch (1), L condition rows, D their width, T latent frames, C channels.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from diffusers.pipelines.ace_step.pipeline_ace_step import AceStepPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from sidestep.errors import RunError
from sidestep.listen.conditions import Wording
from sidestep.model.checkpoint import Checkpoint
from sidestep.model.device import autocast, wide_dtype
from sidestep.model.loading import load_null_condition, load_silence_latent, load_vae

SAMPLE_RATE = 48_000
PEAK = 10 ** (-1 / 20)  # -1 dBFS, to which the pipeline brings every sound.
_TILE_FRAMES = 250  # 10 s; their activations bound the memory of the VAE, not the sound's length.
_TURBO_STEPS, _STEPS = 8, 50
_GUIDANCE = 7.0


class NoSoundError(RunError):
    """What the model rendered is silent or not finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a sound is drawn from noise: Euler steps, guidance scale (1: none) and shift of the timesteps."""

    steps: int
    guidance: float
    shift: float = 3.0


def usual_sampling(checkpoint: Checkpoint) -> Sampling:
    """Return what the model is meant to be sampled with: turbo 8 steps without guidance, base and sft 50 with 7."""
    if checkpoint.is_turbo:
        return Sampling(steps=_TURBO_STEPS, guidance=1.0)
    return Sampling(steps=_STEPS, guidance=_GUIDANCE)


class _EncodedPrompt(nn.Module):
    """Stands where the pipeline has its condition encoder, and gives the rows that were encoded before."""

    null_condition_emb: Tensor
    silence_latent: Tensor

    def __init__(self, null_condition: Tensor, silence: Tensor) -> None:
        super().__init__()
        self.register_buffer("null_condition_emb", null_condition)
        self.register_buffer("silence_latent", silence)
        self.rows_BLD = torch.empty(1, 0, 0)

    @property
    def device(self) -> torch.device:
        """Where it is; the pipeline asks its parts."""
        return self.silence_latent.device

    def forward(self, **_: object) -> tuple[Tensor, Tensor]:
        """Return the rows [B, L, D] and a mask of ones."""
        rows_BLD = self.rows_BLD.to(self.silence_latent)
        return rows_BLD, torch.ones(rows_BLD.shape[:2], dtype=torch.bool, device=rows_BLD.device)


class _Pipeline(AceStepPipeline):
    """Diffusers' pipeline, given prompts that are encoded already."""

    def encode_prompt(self, *_: object, **__: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return nothing: the encoder's place knows the rows."""
        nothing = torch.empty(0)
        return nothing, nothing, nothing, nothing


class Renderer:
    """Renders sound with a decoder that somebody else owns, as it is at that moment."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        decoder: AceStepTransformer1DModel,
        *,
        seconds: float,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Load what is needed besides the decoder; `seconds` is the longest sound. The VAE waits on the CPU."""
        self.device, self.dtype = device, dtype
        self._vae = load_vae(checkpoint, device=torch.device("cpu"), dtype=wide_dtype(dtype))
        hop = math.prod(self._vae.config["downsampling_ratios"])
        frames = max(math.ceil(seconds * SAMPLE_RATE / hop), 750)
        self._encoded = _EncodedPrompt(
            load_null_condition(checkpoint, device=device, dtype=dtype),
            load_silence_latent(checkpoint, frames=frames).to(device, dtype),
        )
        # The pipeline reads here whether guidance is distilled.
        decoder.register_to_config(is_turbo=checkpoint.is_turbo, model_version=checkpoint.family)
        self._pipeline = _Pipeline(
            vae=None,  # pyright: ignore[reportArgumentType]  Latents are decoded here, in tiles.
            text_encoder=None,  # pyright: ignore[reportArgumentType]  Prompts are encoded already.
            tokenizer=None,  # pyright: ignore[reportArgumentType]
            transformer=decoder,
            condition_encoder=self._encoded,  # pyright: ignore[reportArgumentType]
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
        )
        self._pipeline.sample_rate = SAMPLE_RATE
        self._pipeline.latents_per_second = SAMPLE_RATE / hop
        self._pipeline.set_progress_bar_config(disable=True)

    def render(self, wording: Wording, sampling: Sampling) -> np.ndarray:
        """Return the sound, float32 [2, samples] at 48 kHz with a peak of -1 dBFS.

        The same noise on every device: it is drawn on the CPU. NoSoundError when the sound is silent or not finite.
        """
        with torch.no_grad():
            audio = self._decode(self.latents(wording, sampling).transpose(1, 2)).numpy()
        peak = np.abs(audio).max()
        if not np.isfinite(audio).all() or peak == 0:
            raise NoSoundError("The model rendered no sound: its output is silent or not finite.")
        return audio * (PEAK / peak)

    def latents(self, wording: Wording, sampling: Sampling) -> Tensor:
        """Return the latents [B, T, C] of a sound."""
        self._encoded.rows_BLD = wording.rows_BLD
        with autocast(self.device, self.dtype):
            output = self._pipeline(
                prompt="",
                audio_duration=wording.seconds,
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.guidance,
                shift=sampling.shift,
                generator=torch.Generator().manual_seed(wording.seed),
                output_type="latent",
                return_dict=False,
            )
        return output[0]

    def _decode(self, latents_BCT: Tensor) -> Tensor:
        self._vae.to(self.device)  # pyright: ignore[reportArgumentType]
        try:
            return decode(self._vae, latents_BCT.to(self._vae.dtype))
        finally:
            self._vae.to("cpu")  # pyright: ignore[reportArgumentType]


def decode(vae: AutoencoderOobleck, latents_BCT: Tensor, *, tile_frames: int = _TILE_FRAMES) -> Tensor:
    """Return the sound [channels, samples] of latents, float32 on the CPU: equal to decoding them whole."""
    around = frames_around(vae.decoder)
    frames = latents_BCT.shape[-1]
    hop = math.prod(vae.config["downsampling_ratios"])
    parts = []
    for first in range(0, frames, tile_frames):
        last = min(first + tile_frames, frames)
        start, end = max(0, first - around), min(frames, last + around)
        tile_BCT: Any = latents_BCT[:, :, start:end]
        sound = vae.decode(tile_BCT, return_dict=False)[0][0].float().cpu()
        parts.append(sound[:, (first - start) * hop : (last - start) * hop if last < frames else None])
    return torch.cat(parts, dim=-1)


def frames_around(decoder: nn.Module) -> int:
    """Return how many latent frames before and after a frame its sound depends on.

    A convolution of kernel k and dilation d reaches d (k - 1) / 2 of its own samples to either side, a transposed one
    k / stride of its inputs; a sample is worth 1 / rate latent frames. Residual paths reach less far.
    """
    reach, rate = 0.0, 1
    for module in decoder.modules():
        if isinstance(module, nn.ConvTranspose1d):
            reach += module.kernel_size[0] / module.stride[0] / rate
            rate *= module.stride[0]
        elif isinstance(module, nn.Conv1d):
            reach += module.dilation[0] * (module.kernel_size[0] - 1) / 2 / rate
    return math.ceil(reach) + 1
