"""Audio to VAE latents: 48 kHz stereo, encoded in tiles whose result is that of the whole file.

A tile is exact because it reaches as far beyond the frames it keeps as the encoder's receptive field does, and because
it begins at a multiple of the encoder's hop. Zero padding then touches kept frames at the real ends of the song only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torchaudio
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck
from torch import Tensor, nn

from sidestep.data.audio import SAMPLE_RATE, read_audio
from sidestep.data.loudness import normalize
from sidestep.errors import DataError
from sidestep.model.capabilities import capabilities
from sidestep.preprocess.tensors import FRAMES_PER_SECOND

# The activations of one tile, not of the song, bound the memory: about 2 GB in float32 for 15 s of the real VAE.
TILE_FRAMES = 15 * FRAMES_PER_SECOND


@dataclass(frozen=True, slots=True, kw_only=True)
class Loudness:
    """How the level is set: not at all, to a sample peak of `target_db` dBFS, or to `target_lufs` LUFS below it."""

    mode: Literal["none", "peak", "lufs"]
    target_db: float
    target_lufs: float


@dataclass(frozen=True, slots=True)
class Reach:
    """What latent frame f depends on: samples `f * hop + first` to `f * hop + last`, both included."""

    hop: int
    first: int
    last: int

    @property
    def frames_before(self) -> int:
        """How many frames a tile must begin before the first frame it keeps."""
        return -(self.first // self.hop) if self.first < 0 else 0

    @property
    def frames_after(self) -> int:
        """How many frames a tile must go on after the last frame it keeps."""
        return max(0, self.last // self.hop)


def load_wave(path: Path, *, max_seconds: float, loudness: Loudness) -> Tensor:
    """Read a song as the VAE hears it: float32 [2, samples] at 48 kHz, cropped to `max_seconds` (0: whole).

    Resampled by a windowed sinc. The level is set last, on the resampled stereo signal: resampling moves peaks, and a
    mono song played on two channels is 3 LU louder than its one channel. Raises DataError when the file cannot be used.
    """
    samples, rate = read_audio(path, max_seconds=max_seconds)
    wave = torchaudio.functional.resample(torch.from_numpy(samples), rate, SAMPLE_RATE)
    stereo = wave.expand(2, -1).contiguous()
    level = normalize(
        stereo.numpy(), SAMPLE_RATE, mode=loudness.mode, target_db=loudness.target_db, target_lufs=loudness.target_lufs
    )
    return torch.from_numpy(level)


def encode_wave(vae: AutoencoderOobleck, wave: Tensor, *, tile_frames: int = TILE_FRAMES) -> Tensor:
    """The latents [T, 64] of a wave [2, samples], on the CPU in the VAE's dtype: the mode of the VAE's posterior.

    Equal to encoding the whole wave at once, up to rounding (1e-5 in float32), in the memory of one tile. As in the
    original, an end shorter than a frame (40 ms) has no frame of its own. Raises DataError below one frame.
    """
    reach = reach_of(vae.encoder)
    frames = _frame_count(vae.encoder, wave.shape[-1])
    if frames < 1:
        seconds = wave.shape[-1] / SAMPLE_RATE
        raise DataError(f"{seconds:.3f} s of audio are less than one latent frame ({reach.hop / SAMPLE_RATE:.3f} s).")
    kept = []
    for first, last, start, end in tiles(frames, wave.shape[-1], reach=reach, tile_frames=tile_frames):
        posterior = vae.encode(_to_device(wave[None, :, start:end], vae), return_dict=False)[0]
        mean = posterior.mode()[0]
        offset = first - start // reach.hop
        # On the device until the whole song is encoded: the tiles follow each other without a wait.
        kept.append(mean[:, offset : offset + last - first].T)
    return torch.cat(kept).cpu().contiguous()


def _to_device(tile: Tensor, vae: AutoencoderOobleck) -> Tensor:
    if capabilities(vae.device).pins_memory:
        # A copy from pageable memory would wait for the tile before it to be encoded.
        return tile.pin_memory().to(vae.device, non_blocking=True).to(vae.dtype)
    return tile.to(device=vae.device, dtype=vae.dtype)


def tiles(frames: int, samples: int, *, reach: Reach, tile_frames: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first frame kept, frame after the last one kept, first sample read, sample after the last one read)."""
    for first in range(0, frames, tile_frames):
        last = min(first + tile_frames, frames)
        start = max(0, first - reach.frames_before) * reach.hop
        end = samples if last == frames else min((last + reach.frames_after) * reach.hop, samples)
        yield first, last, start, end


def reach_of(encoder: nn.Module) -> Reach:
    """The receptive field of an Oobleck encoder, from its convolutions.

    Output o of a convolution reads inputs o * stride - padding to o * stride - padding + dilation * (kernel - 1);
    going through them backwards gives the samples behind frame 0 (Araujo et al. 2019, "Computing Receptive Fields of
    Convolutional Neural Networks"). Residual connections reach less far than the convolutions they go around.
    """
    hop, first, last = 1, 0, 0
    for convolution in reversed(_convolutions(encoder)):
        (kernel,), (stride,), (dilation,) = convolution.kernel_size, convolution.stride, convolution.dilation
        padding = int(convolution.padding[0])
        hop *= stride
        first = first * stride - padding
        last = last * stride - padding + dilation * (kernel - 1)
    return Reach(hop, first, last)


def _frame_count(encoder: nn.Module, samples: int) -> int:
    """How many frames the encoder makes of so many samples: the output length of one convolution after the other."""
    for convolution in _convolutions(encoder):
        span = convolution.dilation[0] * (convolution.kernel_size[0] - 1) + 1
        samples = (samples + 2 * int(convolution.padding[0]) - span) // convolution.stride[0] + 1
        if samples < 1:
            return 0
    return samples


def _convolutions(encoder: nn.Module) -> list[nn.Conv1d]:
    """The encoder's convolutions in the order of its forward pass, which is the order it declares them in."""
    return [module for module in encoder.modules() if isinstance(module, nn.Conv1d)]
