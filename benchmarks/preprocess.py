"""Preprocessing at real size: both passes, one song after the other and overlapped, in one run.

    uv run python benchmarks/preprocess.py --json preprocess.json

A VAE, a text encoder and a condition encoder of the 2B model's sizes with random weights, a toy tokenizer, and made-up
songs of 60 to 240 s at 44.1 kHz, half FLAC and half WAV, all written to a temporary folder first. `plain` reads,
encodes and writes one song after the other; `overlapped` is what preprocessing does on a GPU. Waiting is the share of
the time in which the device had nothing to do because the next song was still being read; peaks are of allocated
memory, weights included. A second table gives the VAE's speed and peak by the length of its tiles. Without a GPU it
runs the tiny size, which shows only that it runs.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import repository  # noqa: F401
import soundfile
import torch
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen3Config, Qwen3Model

from benchmarks.subject import clear
from sidestep.data.dataset_file import Dataset, Track
from sidestep.demo.checkpoint import build_toy_checkpoint, build_toy_tokenizer
from sidestep.events import Event, StageDone, StageStarted, TrackSkipped
from sidestep.model import names
from sidestep.model.checkpoint import SILENCE_FILE, Checkpoint, find_checkpoint
from sidestep.model.device import choose_device, choose_dtype
from sidestep.model.loading import SILENCE_FRAMES, load_vae
from sidestep.preprocess.encode_audio import SAMPLE_RATE, encode_wave
from sidestep.preprocess.run import preprocess
from sidestep.preprocess.stage import ROWS_TOGETHER, THREADS, Flow
from sidestep.preprocess.tensors import FRAMES_PER_SECOND, read_sample, sample_paths

GB = 1e9
RATE = 44_100
ALLOWED_GB = {"Pass 1": 3.0, "Pass 2": 2.0}
VAE = {
    "encoder_hidden_size": 128, "downsampling_ratios": [2, 4, 4, 6, 10], "channel_multiples": [1, 2, 4, 8, 16],
    "decoder_channels": 128, "decoder_input_channels": 64, "audio_channels": 2, "sampling_rate": SAMPLE_RATE,
}  # fmt: skip
TEXT = {
    "vocab_size": 151_669, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000},
}  # fmt: skip
MODEL = {
    "model_type": "acestep", "model_version": "base", "hidden_size": 2048, "intermediate_size": 6144,
    "num_attention_heads": 16, "num_key_value_heads": 8, "num_hidden_layers": 24,
}  # fmt: skip
LINES = "the rain on the window keeps time with the drums and the night goes on and on\n"


@dataclass(slots=True, kw_only=True)
class Stage:
    """One stage of a run: its seconds, those in which the device waited for songs, and the peak in GB (CPU: 0)."""

    flow: str
    title: str
    songs: int
    minutes: float
    seconds: float
    waited_seconds: float
    peak_gb: float


@dataclass(slots=True)
class Watch:
    """A sink that measures the stages of a run."""

    flow: str
    minutes: float
    device: torch.device
    stages: list[Stage] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        """Begin or end a stage."""
        match event:
            case StageStarted() if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            case StageDone():
                peak = torch.cuda.max_memory_allocated() / GB if self.device.type == "cuda" else 0.0
                stage = Stage(
                    flow=self.flow,
                    title=event.title,
                    songs=event.done,
                    minutes=self.minutes,
                    seconds=event.seconds,
                    waited_seconds=event.waited_seconds,
                    peak_gb=peak,
                )
                self.stages.append(stage)
            case TrackSkipped():
                sys.exit(f"{event.name}: {event.reason}")


def write_checkpoint(root: Path, device: torch.device) -> None:
    """Write everything of a 2B checkpoint that preprocessing reads, with random weights."""
    torch.manual_seed(0)
    with device, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Diffusers builds the VAE with the old weight_norm.
        vae, text, encoder = AutoencoderOobleck(**VAE), Qwen3Model(Qwen3Config(**TEXT)), AceStepConditionEncoder()
    vae.save_config(root / "vae")
    save(vae, root / "vae" / "diffusion_pytorch_model.safetensors")
    text.config.architectures = ["Qwen3ForCausalLM"]
    text.config.save_pretrained(root / "Qwen3-Embedding-0.6B")
    save(text, root / "Qwen3-Embedding-0.6B" / "model.safetensors")
    build_toy_tokenizer().save_pretrained(root / "Qwen3-Embedding-0.6B")
    folder = root / "acestep-v15-base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    tensors = {
        name if name == names.NULL_CONDITION else names.CONDITION_ENCODER_PREFIX + names.to_original(name): tensor
        for name, tensor in encoder.state_dict().items()
        if name != names.SILENCE_LATENT
    }
    save_file({name: tensor.bfloat16().cpu() for name, tensor in tensors.items()}, folder / "model.safetensors")
    torch.save(torch.randn(1, 64, SILENCE_FRAMES), folder / SILENCE_FILE)


def save(module: nn.Module, path: Path) -> None:
    """Write a module's weights in bfloat16."""
    path.parent.mkdir(exist_ok=True)
    tensors = {name: tensor.bfloat16().cpu().contiguous() for name, tensor in module.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt"})


def write_songs(folder: Path, seconds: Sequence[float]) -> Dataset:
    """Write songs of these lengths: noise over a tone, so that FLAC has as much to do as with music."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    block = 0.1 * generator.standard_normal((10 * RATE, 2), dtype=np.float32)
    block += 0.3 * np.sin(2 * np.pi * 220 * np.arange(len(block), dtype=np.float32) / RATE)[:, None]
    tracks = []
    for place, length in enumerate(seconds):
        name = f"song{place:03}.{'wav' if place % 2 else 'flac'}"
        samples = np.resize(block, (round(length * RATE), 2)) * np.float32(0.5 + place / len(seconds) / 2)
        soundfile.write(folder / name, samples, RATE)
        tracks.append(
            Track(
                id=f"{place:08x}", audio_path=folder / name, name=name, caption=f"song {place}, slow and warm, " * 6,
                lyrics=f"[Verse {place}]\n" + LINES * (6 + 3 * place % 20), language="en", is_instrumental=False,
                duration=int(length), bpm=90 + place,
            )
        )  # fmt: skip
    return Dataset(folder=folder, tracks=tuple(tracks))


def run(dataset: Dataset, checkpoint: Checkpoint, output: Path, *, name: str, flow: Flow) -> tuple[list[Stage], float]:
    """Preprocess the dataset; returns its stages and the seconds of the whole, loading included."""
    device = choose_device("auto")
    clear(device)
    watch = Watch(name, sum(track.duration for track in dataset.tracks) / 60, device)
    began = time.perf_counter()
    preprocess(
        dataset,
        checkpoint=checkpoint,
        output=output,
        max_duration=0.0,
        normalize="none",
        target_db=-1.0,
        target_lufs=-14.0,
        device=device,
        dtype=choose_dtype("auto", device),
        emit=watch,
        flow=flow,
    )
    return watch.stages, time.perf_counter() - began


def differences(first: Path, second: Path) -> dict[str, float]:
    """Return how much the latents and the conditions of two runs differ at most: relative L2 over a song."""
    found = {"latents": 0.0, "conditions": 0.0}
    for one, other in zip(map(read_sample, sample_paths(first)), map(read_sample, sample_paths(second)), strict=True):
        pairs = {
            "latents": (one.target_latents.float(), other.target_latents.float()),
            "conditions": (one.encoder_hidden_states.float(), other.encoder_hidden_states.float()),
        }
        for key, (a, b) in pairs.items():
            found[key] = max(found[key], float((a - b).norm() / a.norm()))
    return found


@torch.inference_mode()
def tile_speeds(checkpoint: Checkpoint, tile_seconds: Sequence[float], song_seconds: float) -> list[dict[str, float]]:
    """Measure the VAE alone on a song that is in memory, by the length of its tiles; a length too large is left out."""
    device = choose_device("auto")
    wave = 0.1 * torch.randn(2, round(song_seconds * SAMPLE_RATE))
    found = []
    for seconds in tile_seconds:
        clear(device)
        vae = load_vae(checkpoint, device=device, dtype=choose_dtype("auto", device))
        frames = round(seconds * FRAMES_PER_SECOND)
        try:
            encode_wave(vae, wave, tile_frames=frames)
            began = time.perf_counter()
            encode_wave(vae, wave, tile_frames=frames)
        except torch.OutOfMemoryError:
            continue
        taken = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated() / GB if device.type == "cuda" else 0.0
        found.append({"tile_seconds": seconds, "minutes_per_second": song_seconds / 60 / taken, "peak_gb": peak})
        del vae
    return found


def table(stages: Sequence[Stage], wholes: dict[str, float], tiles: Sequence[dict[str, float]]) -> str:
    """Return the results as Markdown tables."""
    lines = ["| pass | flow | s | minutes of music / s | waiting | x faster | peak GB | allowed |", "|---" * 8 + "|"]
    plain = {stage.title: stage.seconds for stage in stages if stage.flow == "plain"}
    for stage in sorted(stages, key=lambda stage: list(plain).index(stage.title)):
        allowed = ALLOWED_GB.get(stage.title[:6])
        lines.append(
            f"| {stage.title} | {stage.flow} | {stage.seconds:.2f} | {stage.minutes / stage.seconds:.2f} "
            f"| {stage.waited_seconds / stage.seconds:.0%} | {plain[stage.title] / stage.seconds:.2f} "
            f"| {stage.peak_gb:.2f} | {'-' if allowed is None else f'{allowed:.0f}'} |"
        )
    minutes = stages[0].minutes
    for flow, seconds in wholes.items():
        lines.append(
            f"| all, with loading | {flow} | {seconds:.2f} | {minutes / seconds:.2f} | - "
            f"| {wholes['plain'] / seconds:.2f} | - | - |"
        )
    lines += ["", "| VAE tile s | minutes of music / s | peak GB |", "|---|---|---|"]
    lines += [f"| {t['tile_seconds']:g} | {t['minutes_per_second']:.2f} | {t['peak_gb']:.2f} |" for t in tiles]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "2b"), default="2b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--songs", type=int, default=12)
    parser.add_argument("--shortest", type=float, default=60 if torch.cuda.is_available() else 2)
    parser.add_argument("--longest", type=float, default=240 if torch.cuda.is_available() else 4)
    parser.add_argument("--threads", type=int, default=0, help="that read and write; 0 is what preprocessing takes")
    parser.add_argument("--tiles", type=float, nargs="*", default=[7.5, 15, 30], help="lengths in seconds")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Write the data, run both flows, print the tables and the JSON."""
    arguments, device = parse(), choose_device("auto")
    flows = {
        "plain": Flow(threads=0, rows=0),
        "overlapped": Flow(threads=arguments.threads or THREADS, rows=ROWS_TOGETHER),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.size == "tiny":
            build_toy_checkpoint(folder / "checkpoints")
        else:
            (folder / "checkpoints").mkdir()
            write_checkpoint(folder / "checkpoints", device)
        checkpoint = find_checkpoint(folder / "checkpoints", "base")
        lengths = np.linspace(arguments.shortest, arguments.longest, arguments.songs).tolist()
        dataset = write_songs(folder / "songs", lengths)
        # Libraries make their workspaces and choose their kernels in a run that does not count.
        run(write_songs(folder / "warm", lengths[:2]), checkpoint, folder / "unmeasured", name="", flow=flows["plain"])
        stages: list[Stage] = []
        wholes: dict[str, float] = {}
        for flow in flows:
            found, wholes[flow] = run(dataset, checkpoint, folder / flow, name=flow, flow=flows[flow])
            stages += found
        content = {
            "machine": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
            "torch": torch.__version__,
            "size": arguments.size,
            "threads": flows["overlapped"].threads,
            "differences": differences(folder / "plain", folder / "overlapped"),
            "whole_seconds": wholes,
            "stages": [asdict(stage) for stage in stages],
            "tiles": tile_speeds(checkpoint, arguments.tiles, arguments.longest),
        }
    print(table(stages, wholes, content["tiles"]))
    print(json.dumps(content))
    if arguments.json:
        arguments.json.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
