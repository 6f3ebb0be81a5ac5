"""Finds a checkpoint, says which model it is and what is missing; reads JSON and headers only, and loads no torch."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, get_args

import numpy as np

from sidestep.errors import ConfigError, ModelError
from sidestep.model import architecture, names
from sidestep.model.weights import StoredTensor, check_formats, read_json, read_weights, shorten

Family = Literal["turbo", "base", "sft"]
Layout = Literal["original", "diffusers"]

FAMILIES: tuple[Family, ...] = get_args(Family)
VARIANTS = (*FAMILIES, *(f"xl-{family}" for family in FAMILIES))
SILENCE_FILE = "silence_latent.pt"

_FOLDER_PREFIX = "acestep-v15-"
_OFFICIAL_FOLDER = re.compile(rf"{_FOLDER_PREFIX}(xl-)?({'|'.join(FAMILIES)})(-shift\d+|-continuous)?(-diffusers)?")
_PIPELINE_FILE = "model_index.json"
_FINGERPRINT_VALUES = 1024
_HOW_TO_DOWNLOAD = (
    "A checkpoint folder holds acestep-v15-turbo/ (or another variant), vae/ and Qwen3-Embedding-0.6B/, "
    "as downloaded from ACE-Step/Ace-Step1.5 on Hugging Face; give it with --checkpoint-dir."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One model on disk: where its parts lie and what its config.json says."""

    root: Path
    folder: Path
    """The model's own folder; in diffusers' layout that of the pipeline."""
    layout: Layout
    variant: str
    """`turbo`, `xl-base`, ... or the name of a custom folder."""
    family: Family
    is_xl: bool
    config: Mapping[str, Any]
    """config.json of the decoder as read; in diffusers' layout that of transformer/."""
    timestep_mu: float
    timestep_sigma: float
    """The logit-normal distribution the model's own training drew timesteps from."""
    vae: Path
    text_encoder: Path
    tokenizer: Path

    @property
    def is_turbo(self) -> bool:
        """Whether guidance and few steps are distilled into the weights."""
        return self.family == "turbo"

    @property
    def encoder_width(self) -> int:
        """The number of channels D of the condition rows the decoder reads."""
        return architecture.encoder_width(self.config)


def list_models(root: Path) -> list[str]:
    """List what `--model-variant` can name under `root`: the known variants first, then other model folders, sorted."""
    if (root / _PIPELINE_FILE).is_file():
        return [root.resolve().name]
    if not root.is_dir():
        return []
    found = [folder.name for folder in root.iterdir() if _is_model(folder)]
    shown = [name.removeprefix(_FOLDER_PREFIX) if _variant_of(name) in VARIANTS else name for name in found]
    return sorted(shown, key=lambda name: (VARIANTS.index(name) if name in VARIANTS else len(VARIANTS), name))


def find_checkpoint(root: Path, variant: str, *, base_model: str | None = None) -> Checkpoint:
    """Find `variant` under `root`: a known variant, the name of a folder there, or the diffusers pipeline `root` is.

    `base_model` says what a fine-tune descends from, where its folder does not. Raises ModelError, with a way out,
    when the folder, its config.json or a weight file of the decoder is missing or damaged, or the decoder is quantised;
    `check_encoders` looks at what preprocessing needs beyond that.
    """
    folder = _model_folder(root, variant)
    layout: Layout = "diffusers" if (folder / _PIPELINE_FILE).is_file() else "original"
    config = read_json(folder / ("transformer/config.json" if layout == "diffusers" else "config.json"))
    is_xl = architecture.is_xl(config)
    architecture.decoder_arguments(config)
    folder_name = root.resolve().name if folder == root else folder.name
    # A pipeline in `root` itself has no other name than the one it is asked for by.
    name = variant if folder == root and variant in VARIANTS else _variant_of(folder_name)
    family = _family(folder_name, config, is_xl=is_xl, asked=name, base_model=base_model)
    if folder == root and variant in VARIANTS:
        _check_asked(variant, f"xl-{family}" if is_xl else family, folder)
    parts = folder if layout == "diffusers" else root
    checkpoint = Checkpoint(
        root=root,
        folder=folder,
        layout=layout,
        variant=name,
        family=family,
        is_xl=is_xl,
        config=config,
        timestep_mu=float(architecture.setting(config, "timestep_mu")),
        timestep_sigma=float(architecture.setting(config, "timestep_sigma")),
        vae=parts / "vae",
        text_encoder=parts / ("text_encoder" if layout == "diffusers" else "Qwen3-Embedding-0.6B"),
        tokenizer=parts / ("tokenizer" if layout == "diffusers" else "Qwen3-Embedding-0.6B"),
    )
    check_formats(decoder_tensors(checkpoint).values())
    return checkpoint


def check_encoders(checkpoint: Checkpoint) -> None:
    """Raise ModelError unless everything preprocessing loads is there: VAE, text encoder, tokenizer, silence latent."""
    for folder, title in ((checkpoint.vae, "VAE"), (checkpoint.text_encoder, "text encoder")):
        read_json(existing_folder(folder, title) / "config.json")
    read_weights(checkpoint.vae, "diffusion_pytorch_model")
    read_weights(checkpoint.text_encoder, "model")
    read_json(checkpoint.tokenizer / "tokenizer.json")
    condition_encoder_tensors(checkpoint)
    if checkpoint.layout == "original" and not (checkpoint.folder / SILENCE_FILE).is_file():
        raise ModelError(
            f"{checkpoint.folder / SILENCE_FILE} is missing: the latent of silence, which preprocessing needs.",
            hint=f"Copy {SILENCE_FILE} from the model it descends from into this folder; every official one holds it.",
        )


def existing_folder(folder: Path, title: str) -> Path:
    """Give `folder` back. Raises ModelError, saying where to get this part, when it is not there."""
    if not folder.is_dir():
        raise ModelError(f"The {title} is missing: there is no folder {folder}.", hint=_HOW_TO_DOWNLOAD)
    return folder


def decoder_tensors(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """List the decoder's tensors under diffusers' names."""
    if checkpoint.layout == "diffusers":
        return read_weights(checkpoint.folder / "transformer", "diffusion_pytorch_model")
    return _part_of_original(checkpoint, names.DECODER_PREFIX)


def condition_encoder_tensors(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """List the condition encoder's tensors under diffusers' names, with the null condition and, in diffusers' layout,
    the silence latent.
    """
    if checkpoint.layout == "diffusers":
        return read_weights(checkpoint.folder / "condition_encoder", "diffusion_pytorch_model")
    tensors = _part_of_original(checkpoint, names.CONDITION_ENCODER_PREFIX)
    return tensors | null_condition_tensor(checkpoint)


def null_condition_tensor(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """List the row [1, 1, D] that stands for "no condition", by its name; empty when the checkpoint lacks it."""
    if checkpoint.layout == "diffusers":
        tensors = read_weights(checkpoint.folder / "condition_encoder", "diffusion_pytorch_model")
    else:
        tensors = _original_tensors(checkpoint)
    return {name: tensor for name, tensor in tensors.items() if name == names.NULL_CONDITION}


def name_on_disk(checkpoint: Checkpoint, prefix: str, name: str) -> str:
    """Give the name a tensor of the part with this original prefix has in the checkpoint's own files."""
    if checkpoint.layout == "diffusers" or name == names.NULL_CONDITION:
        return name
    return prefix + names.to_original(name)


def encoder_fingerprint(checkpoint: Checkpoint) -> str:
    """Identify the condition encoder's weights: equal in both layouts and as float32 or bfloat16, else different.

    A sha256 over the name, the shape and the first 1024 values, rounded to bfloat16, of every tensor in the order of
    diffusers' names; reads a few hundred KiB. The null condition and the silence latent make no condition rows of
    their own and are left out. float16 keeps fewer small values than bfloat16, so such a copy may count as another.
    """
    return _fingerprint(condition_encoder_tensors(checkpoint))


def decoder_fingerprint(checkpoint: Checkpoint) -> str:
    """Identify the decoder's weights, which an adapter belongs to, like `encoder_fingerprint` does the encoder's."""
    return _fingerprint(decoder_tensors(checkpoint))


def _fingerprint(tensors: Mapping[str, StoredTensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if name not in (names.NULL_CONDITION, names.SILENCE_LATENT):
            digest.update(json.dumps([name, tensor.shape]).encode())
            digest.update(_to_bfloat16(tensor.first_values(_FINGERPRINT_VALUES)).tobytes())
    return f"sha256:{digest.hexdigest()}"


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round finite float32 to the nearest bfloat16, ties to even, as its 16 bits."""
    bits = values.astype("<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _part_of_original(checkpoint: Checkpoint, prefix: str) -> dict[str, StoredTensor]:
    return {
        names.to_diffusers(name.removeprefix(prefix)): tensor
        for name, tensor in _original_tensors(checkpoint).items()
        if name.startswith(prefix)
    }


def _original_tensors(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    tensors = read_weights(checkpoint.folder, "model")
    known = (names.DECODER_PREFIX, names.CONDITION_ENCODER_PREFIX, *names.AUDIO_TOKEN_PREFIXES)
    strangers = [name for name in tensors if not name.startswith(known) and name != names.NULL_CONDITION]
    if strangers:
        raise ModelError(
            f"The weights in {checkpoint.folder} hold {len(strangers)} tensors of no known part: {shorten(strangers)}.",
            hint=f"In an ACE-Step 1.5 checkpoint the names begin with {', '.join(known)}; this is another model.",
        )
    return tensors


def _is_model(folder: Path) -> bool:
    """Whether a folder looks like a model of ACE-Step; one whose config.json is damaged counts, to be told about it."""
    if folder.name == "vae" or folder.name.startswith((".", "__", "Qwen", "acestep-5Hz")):
        return False
    if (folder / _PIPELINE_FILE).is_file():
        return True
    try:
        config = read_json(folder / "config.json")
    except ModelError:
        return (folder / "config.json").is_file()
    return "auto_map" in config or "model_type" in config


def _variant_of(folder_name: str) -> str:
    short = folder_name.removeprefix(_FOLDER_PREFIX)
    return short if short in VARIANTS else folder_name


def _model_folder(root: Path, variant: str) -> Path:
    if not root.is_dir():
        raise ModelError(f"There is no checkpoint folder {root}.", hint=_HOW_TO_DOWNLOAD)
    if (root / _PIPELINE_FILE).is_file():
        if variant in VARIANTS or variant == root.resolve().name:
            return root
        raise ModelError(
            f"{root} is one model in diffusers' layout; it holds no {variant!r}.",
            hint="Give --model-variant the variant it is, or --checkpoint-dir the folder above it.",
        )
    path = PureWindowsPath(variant)  # Understands both separators and drives, on every system.
    if not path.parts or path.anchor or ".." in path.parts:
        raise ModelError(
            f"{variant!r} does not name a folder inside {root}.",
            hint="--model-variant takes a variant or the name of a folder in the checkpoint folder.",
        )
    folder = root / (f"{_FOLDER_PREFIX}{variant}" if variant in VARIANTS else Path(*path.parts))
    if folder.is_dir():
        return folder
    models = list_models(root)
    if models:
        hint = f"It has {', '.join(models)}: give one of them with --model-variant."
    elif _is_model(root):
        hint = f"This is the folder of one model; give the folder above it: --checkpoint-dir {root.resolve().parent}."
    else:
        hint = f"No model is there. {_HOW_TO_DOWNLOAD}"
    raise ModelError(f"{root} has no model {variant!r}: there is no folder {folder.name}.", hint=hint)


def _family(folder: str, config: Mapping[str, Any], *, is_xl: bool, asked: str, base_model: str | None) -> Family:
    """Which of the three trainings a model had.

    An official folder and config.json say it; of a custom folder, where a merge may carry a wrong flag, `base_model`
    says it first.
    """
    official = _OFFICIAL_FOLDER.fullmatch(folder)
    told = _told_family(config, (official[2],) if official else (folder, asked), trusted=bool(official))
    stated = _base_family(base_model, is_xl=is_xl) if base_model else None
    if official and stated and told != stated:
        raise ConfigError(
            f"{folder} is a {told} model, not {base_model}.",
            hint="Leave --base-model out; it is for fine-tunes whose folder does not say what they descend from.",
        )
    family = stated or told
    if family is None:
        raise ModelError(
            f"Neither config.json nor the name of {folder} says which model it descends from.",
            hint=f"Add --base-model with one of {', '.join(VARIANTS)}.",
        )
    return family


def _told_family(config: Mapping[str, Any], folder_names: tuple[str, ...], *, trusted: bool) -> Family | None:
    """What `is_turbo` in config.json says, else its `model_version`, else the first name with just one family in it.

    A flag that says "not turbo" beside a name that says "turbo" tells nothing, unless the name can be trusted.
    """
    if config.get("is_turbo") is True:
        return "turbo"
    for text in (str(config.get("model_version")), *folder_names):
        words = re.split(r"[^a-z0-9]+", text.lower())
        found: list[Family] = [family for family in FAMILIES if family in words]
        contradicted = found == ["turbo"] and config.get("is_turbo") is False and not trusted
        if len(found) == 1 and not contradicted:
            return found[0]
    return None


def _base_family(base_model: str, *, is_xl: bool) -> Family:
    if base_model not in VARIANTS:
        raise ConfigError(f"--base-model {base_model} is not known.", hint=f"It is one of {', '.join(VARIANTS)}.")
    if base_model.startswith("xl-") and not is_xl:
        hint = f"Give --base-model {base_model.removeprefix('xl-')}."
        raise ModelError(f"The model is of the 2B size, not {base_model}.", hint=hint)
    return next(family for family in FAMILIES if base_model.endswith(family))


def _check_asked(asked: str, found: str, folder: Path) -> None:
    if asked != found:
        raise ModelError(f"{folder} holds the {found} model, not {asked}.", hint=f"Add --model-variant {found}.")
