"""The settings of the commands that take a finished adapter: `export` and `sample`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sidestep.config.settings import Range, When, option

EXPORT = "Export"
SAMPLE = "Sample"
_CHECKPOINT = "Folder with acestep-v15-*/, vae/ and Qwen3-Embedding-0.6B/, or a model in diffusers' layout."
_CHECKPOINT_DEFAULT = "SIDESTEP_CHECKPOINT_DIR, else the last used, else ./checkpoints"
_VARIANT = "The model the adapter was trained on: turbo, base, sft, xl-turbo, xl-base, xl-sft, or a folder's name."
_VARIANT_DEFAULT = "what the adapter says, else turbo"
_BASE_MODEL = "What a fine-tune descends from, where its folder does not say."


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """What `export` needs to know."""

    adapter: Path = option("The adapter's folder or .safetensors file.", group=EXPORT, ask="basic")
    to: Literal["diffusers", "comfyui", "peft", "merged"] = option(
        "Who is to read it. peft: ACE-Step's app, PEFT and acestep.cpp; merged: a whole model in the original layout.",
        group=EXPORT,
        ask="basic",
    )
    output: Path = option(
        "A new folder for it. For merged name it acestep-v15-..., which ACE-Step's app lists.",
        group=EXPORT,
        ask="basic",
    )
    rank: int | None = option(
        "Write it as a plain LoRA of this rank, the closest there is; what that costs is printed.",
        group=EXPORT,
        default=None,
        within=Range(at_least=1, at_most=4096),
        when=When("to", ("diffusers", "comfyui", "peft"), is_strict=True),
        shown_default="as it is; 128 where the reader does not know its kind",
    )
    checkpoint_dir: Path | None = option(
        _CHECKPOINT, group=EXPORT, default=None, short="-c", shown_default=_CHECKPOINT_DEFAULT
    )
    model_variant: str | None = option(
        _VARIANT, group=EXPORT, default=None, short="-M", ask="basic", shown_default=_VARIANT_DEFAULT
    )
    base_model: Literal["turbo", "base", "sft", "xl-turbo", "xl-base", "xl-sft"] | None = option(
        _BASE_MODEL, group=EXPORT, default=None, shown_default="read from config.json"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleConfig:
    """What `sample` needs to know."""

    adapter: Path | None = option(
        "The adapter's folder or .safetensors file: ours, or another program's LoRA, DoRA, LoKr or LoHa.",
        group=SAMPLE,
        default=None,
        ask="basic",
        shown_default="none: the model alone",
    )
    prompt: str | None = option(
        "What the music is like.", group=SAMPLE, default=None, ask="basic", shown_default="required without --prompts"
    )
    prompts: Path | None = option(
        "Several prompts: a text file with one a line, or a JSON list of objects with caption, lyrics, language, bpm, "
        "keyscale, timesignature, duration and seed.",
        group=SAMPLE,
        default=None,
    )
    lyrics: str = option("What is sung.", group=SAMPLE, default="[Instrumental]", ask="basic")
    language: str = option("Language of the lyrics, as a code like en.", group=SAMPLE, default="unknown")
    bpm: int | None = option("Beats a minute.", group=SAMPLE, default=None, within=Range(at_least=30, at_most=300))
    keyscale: str = option("Key, like C major.", group=SAMPLE, default="", shown_default="none")
    timesignature: str = option("Beats in a bar: 2, 3, 4 or 6.", group=SAMPLE, default="", shown_default="none")
    output: Path = option("Folder for the FLAC files.", group=SAMPLE, default=Path("samples"), ask="basic")
    strengths: tuple[float, ...] = option(
        "Strengths of the adapter, a file each; 0 is the model alone.", group=SAMPLE, default=(1.0,), ask="basic"
    )
    duration: float = option("Seconds of music.", group=SAMPLE, default=30.0, within=Range(at_least=1, at_most=600))
    seed: int = option(
        "Same seed and machine: same music.", group=SAMPLE, default=42, within=Range(at_least=0, at_most=2**53)
    )
    steps: int | None = option(
        "Steps from noise to music.",
        group=SAMPLE,
        default=None,
        within=Range(at_least=1, at_most=1000),
        shown_default="50; turbo: 8",
    )
    guidance: float | None = option(
        "Guidance scale: how closely the prompt is followed; 1 is none. Turbo has none.",
        group=SAMPLE,
        default=None,
        within=Range(at_least=1, at_most=100),
        shown_default="7; turbo: 1",
    )
    shift: float = option("Shift of the timesteps.", group=SAMPLE, default=3.0, within=Range(above=0))
    checkpoint_dir: Path | None = option(
        _CHECKPOINT, group=SAMPLE, default=None, short="-c", shown_default=_CHECKPOINT_DEFAULT
    )
    model_variant: str | None = option(
        "The model to play it with, as in training.",
        group=SAMPLE,
        default=None,
        short="-M",
        ask="basic",
        shown_default=_VARIANT_DEFAULT,
    )
    base_model: Literal["turbo", "base", "sft", "xl-turbo", "xl-base", "xl-sft"] | None = option(
        _BASE_MODEL, group=SAMPLE, default=None, shown_default="read from config.json"
    )
    device: str = option("auto, cuda, cuda:N, mps, xpu or cpu.", group=SAMPLE, default="auto")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "Number format of the model; auto: bf16 on CUDA and XPU, fp16 on MPS, fp32 on CPU.",
        group=SAMPLE,
        default="auto",
    )
