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
