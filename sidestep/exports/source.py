"""Reads an adapter of any program as changes of the decoder's weights.

Files are read as the program that wrote them means them. The scale of a LoRA is, in this order: its `.alpha` tensor
over its rank (ComfyUI's files), alpha / r of the `adapter_config.json` beside a PEFT file, alpha / r of the header of a
diffusers file, else 1. That of a LoKr or LoHa is its `.alpha` as LyCORIS applies it, else alpha / r of PEFT's config,
else 1.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidestep.config.runs import LORA_CONFIG, LORA_FILE
from sidestep.errors import ModelError
from sidestep.exports.base import BaseWeights
from sidestep.exports.changes import Change, Hadamard, Kronecker, LowRank, row_norms
from sidestep.exports.find import find_adapter
from sidestep.model.names import to_diffusers, to_original
from sidestep.training.adapters.base import pattern_matches
from sidestep.training.adapters.files import check_start, read_weights

DIFFUSERS_HEADER = "lora_adapter_metadata"
DIFFUSERS_PREFIX = "transformer."
WRITTEN_FOR = "sidestep_export"
"""Header of our own exports for ComfyUI, whose magnitudes are relative to the unchanged weight."""
_PREFIXES = ("base_model.model.", DIFFUSERS_PREFIX, "diffusion_model.", "unet.", "model.", "decoder.")
_FLAT_PREFIXES = ("lycoris_decoder_", "lycoris_", "lora_unet_decoder_", "lora_unet_")
_BIASES = ("bias", "diff_b")
_PARTS = {
    **dict.fromkeys(("lora_A", "lora_down", "lora.down"), "down"),
    **dict.fromkeys(("lora_B", "lora_up", "lora.up"), "up"),
}
_PART = re.compile(
    r"(?P<stem>.+)\.(?:(?P<lora>lora_A|lora_B|lora[_.]down|lora[_.]up)(?:\.default)?(?:\.weight)?"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
    r"|(?P<other>alpha|dora_scale|bias|diff_b|lokr_\w+|hada_\w+))"
)

_PEFT_LYCORIS = ("LOKR", "LOHA")
_PEFT_LYCORIS_DEFAULT = 8
"""PEFT's alpha and r where its config states none."""
_PATTERN_OF = {"lora_alpha": "alpha", "alpha": "alpha", "r": "rank"}

Group = Mapping[str, Tensor]
Scale = Callable[[str, int], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An adapter as it was read: its changes by module, in the original's names."""

    file: Path
    kind: str
    """`lora`, `dora`, `lokr` or `loha`."""
    changes: Mapping[str, Change]
    biases: Mapping[str, Tensor]
    """New values of biases that were trained, by parameter name."""
    header: Mapping[str, str]

    @property
    def rank(self) -> int:
        """The largest rank among its LoRA factors; 0 where it has none."""
        return max((change.rank for change in self.changes.values() if isinstance(change, LowRank)), default=0)


def read_adapter(path: Path, base: BaseWeights) -> Source:
    """Read an adapter's folder or file; ModelError when it is damaged, of no known kind, or of another model."""
    file = find_adapter(path)
    tensors, header = read_weights(file)
    groups = _by_module(file, tensors, base)
    scale = _scale_rule(file, header)
    changes: dict[str, Change] = {}
    biases: dict[str, Tensor] = {}
    for module, group in groups.items():
        own = dict(group)
        if not own.keys().isdisjoint(_BIASES):
            biases[f"{module}.bias"] = _bias(file, f"{module}.bias", own, base)
            own = {part: tensor for part, tensor in own.items() if part not in _BIASES}
        if own:
            changes[module] = _change(file, module, own, scale)
    _check_shapes(file, changes, base)
    if header.get(WRITTEN_FOR) == "comfyui":
        changes = {module: _from_comfyui(change, base.weight(module)) for module, change in changes.items()}
    return Source(file=file, kind=_kind(changes), changes=changes, biases=biases, header=header)


def _by_module(file: Path, tensors: Mapping[str, Tensor], base: BaseWeights) -> dict[str, dict[str, Tensor]]:
    flat = {spelling(module).replace(".", "_"): module for module in base.shapes for spelling in (str, to_diffusers)}
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        match = _PART.fullmatch(name)
        if match is None:
            raise ModelError(f"{file} holds {name}, which belongs to no known kind of adapter.")
        module = _module(match["stem"], flat)
        if module not in base.shapes:
            raise ModelError(
                f"{file} changes {module}, which the {base.variant} model does not have.",
                hint=_why_unknown(module, [*base.shapes, *flat]),
            )
        part = _PARTS[match["lora"]] if match["lora"] else match["magnitude"] or match["other"]
        if part in groups[module]:
            raise ModelError(f"{file} holds {name} under another name, too: it is more than one adapter.")
        groups[module][part] = tensor
    if not groups:
        raise ModelError(f"{file} holds no tensors.")
    return groups


def _module(stem: str, flat: Mapping[str, str]) -> str:
    for prefix in _FLAT_PREFIXES:
        if stem.startswith(prefix):
            stem = stem.removeprefix(prefix)
            return flat.get(stem, stem)
    # Some trainers wrote their prefix twice.
    while stem.startswith(_PREFIXES):
        stem = next(stem.removeprefix(prefix) for prefix in _PREFIXES if stem.startswith(prefix))
    # PEFT's name for the biases of a module that it put an adapter on.
    return to_original(stem.removesuffix(".base_layer"))


def _why_unknown(module: str, known: Iterable[str]) -> str:
    """Say what a module may belong to: a model of more layers, or a program whose names are not read."""
    if _without_numbers(module) in {_without_numbers(name) for name in known}:
        return "Is --model-variant the model it was trained on?"
    return (
        "Names are read as PEFT, diffusers, ComfyUI and LyCORIS write them for ACE-Step 1.5: is it an adapter of "
        "another model, or of a program with names of its own?"
    )


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "0", name)


def _bias(file: Path, name: str, group: Group, base: BaseWeights) -> Tensor:
    """Return the new value of a bias, float32, from the value or the difference in the file."""
    before, found = base.tensor(name), group.get("bias", group.get("diff_b"))
    assert found is not None
    if found.shape != before.shape:
        raise ModelError(
            f"{file} does not fit the {base.variant} model: {name} is {list(before.shape)} there, and "
            f"{list(found.shape)} in the adapter.",
            hint="Is --model-variant the model it was trained on?",
        )
    return found.float() if "bias" in group else (before + found.double()).float()


def _change(file: Path, module: str, group: Group, scale: Scale) -> Change:
    parts = set(group) - {"alpha", "dora_scale", "lora_magnitude_vector"}
    _check_factors(file, module, group)
    magnitude = group.get("lora_magnitude_vector", group.get("dora_scale"))
    if magnitude is not None:
        if magnitude.ndim > 1 and magnitude.shape[0] == 1:
            raise ModelError(f"{file} has its magnitudes on the inputs of {module}, which is not read.")
        magnitude = magnitude.float().flatten()
    if parts == {"down", "up"}:
        rank = len(group["down"])
        factor = float(group["alpha"]) / rank if "alpha" in group else scale(module, rank)
        return LowRank(group["down"].float(), group["up"].float() * factor, magnitude)
    if parts == {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}:
        first = group["hada_w1_a"].float() * _lycoris_scale(group, "hada_w1_b", module, scale)
        others = (group[name].float() for name in ("hada_w1_b", "hada_w2_a", "hada_w2_b"))
        return Hadamard(first, *others, magnitude=magnitude)
    if parts in _LOKR_PARTS:
        factor = _lycoris_scale(group, "lokr_w1_b" if "lokr_w1_b" in group else "lokr_w2_b", module, scale)
        first = group["lokr_w1"] if "lokr_w1" in group else group["lokr_w1_a"].float() @ group["lokr_w1_b"].float()
        second = ("lokr_w2",) if "lokr_w2" in group else ("lokr_w2_a", "lokr_w2_b")
        return Kronecker(first.float() * factor, tuple(group[name].float() for name in second), magnitude)
    raise ModelError(f"{file} holds {', '.join(sorted(group))} for {module}, which is no whole adapter.")


def _from_comfyui(change: Change, weight: Tensor) -> Change:
    """Undo what an export for ComfyUI does to magnitudes: there the unchanged weight's norm is divided by."""
    if change.magnitude is None:
        return change
    merged = weight + change.product().reshape(weight.shape)
    return change.with_magnitude((change.magnitude.double() * row_norms(merged) / row_norms(weight)).float())


_PRODUCTS = (
    ("up", "down"),
    ("hada_w1_a", "hada_w1_b"),
    ("hada_w2_a", "hada_w2_b"),
    ("lokr_w1_a", "lokr_w1_b"),
    ("lokr_w2_a", "lokr_w2_b"),
)
_FACTORS = (*(part for product in _PRODUCTS for part in product), "lokr_w1", "lokr_w2")
_ONE = torch.ones(())
_LOKR_PARTS = [
    {*first, *second}
    for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
    for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
]


def _check_factors(file: Path, module: str, group: Group) -> None:
    """Raise ModelError unless factors that are multiplied fit each other and alpha is one number."""
    are_matrices = all(group[part].ndim > 1 for part in _FACTORS if part in group)
    fit = are_matrices and all(
        group[left].flatten(1).shape[1] == len(group[right]) > 0
        for left, right in _PRODUCTS
        if left in group and right in group
    )
    if not fit or group.get("alpha", _ONE).numel() != 1:
        shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in sorted(group.items()))
        raise ModelError(f"{file} holds factors of {module} that do not fit each other: {shapes}.")


def _lycoris_scale(group: Group, ranked: str, module: str, scale: Scale) -> float:
    """Return alpha / rank; 1 where no factor is a product of two matrices, as in LyCORIS.

    What is stated outside of the tensors counts where they say nothing.
    """
    if "alpha" not in group:
        return scale(module, 0)
    return float(group["alpha"]) / len(group[ranked]) if ranked in group else 1.0


def _scale_rule(file: Path, header: Mapping[str, str]) -> Scale:
    """Return how the scale of a change without an `.alpha` tensor follows from its module and, for a LoRA, its rank."""
    if file.name == LORA_FILE and (file.parent / LORA_CONFIG).is_file():
        path = file.parent / LORA_CONFIG
        settings = _json(path, path.read_text(encoding="utf-8", errors="replace"))
        check_start(path, settings)
        if settings.get("peft_type") in _PEFT_LYCORIS:
            return lambda module, _: _peft_lycoris_scale(path, settings, module)
        return lambda module, rank: _stated_scale(path, settings, module, rank)
    if DIFFUSERS_HEADER in header:
        stated = _json(file, header[DIFFUSERS_HEADER])
        settings = {key.removeprefix(DIFFUSERS_PREFIX): value for key, value in stated.items()}
        check_start(file, settings)
        return lambda module, rank: _stated_scale(file, settings, module, rank)
    return lambda module, rank: 1.0


def _json(file: Path, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} does not describe a LoRA.")
    return content


def _stated_scale(stated_in: Path, settings: Mapping[str, Any], module: str, rank: int) -> float:
    """Return alpha / r as PEFT applies it to a LoRA of this rank; 1 to what has no rank."""
    if not rank:
        return 1.0
    alpha = _stated(stated_in, settings, "lora_alpha", module, default=rank)
    return alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank


def _peft_lycoris_scale(stated_in: Path, settings: Mapping[str, Any], module: str) -> float:
    """Return alpha / r as PEFT applies it to its LoKr and LoHa, of whole factors too, where LyCORIS has 1."""
    rank = _stated(stated_in, settings, "r", module, default=_PEFT_LYCORIS_DEFAULT)
    if rank <= 0:
        raise ModelError(f"{stated_in} states {rank!r} as the r of {module}, which is not above 0.")
    return _stated(stated_in, settings, "alpha", module, default=_PEFT_LYCORIS_DEFAULT) / rank


def _stated(stated_in: Path, settings: Mapping[str, Any], name: str, module: str, *, default: float) -> float:
    """Return a module's alpha or r: that of the first pattern that means it, else the general one."""
    kind = _PATTERN_OF[name]
    value = settings.get(name, default)
    try:
        for pattern, own in (settings.get(f"{kind}_pattern") or {}).items():
            if pattern_matches(pattern, module):
                value = own
                break
    except (AttributeError, re.error) as error:
        raise ModelError(f"{stated_in} has an unreadable {kind}_pattern: {error}.") from error
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ModelError(f"{stated_in} states {value!r} as the {kind} of {module}, which is no number.")
    return value


def _check_shapes(file: Path, changes: Mapping[str, Change], base: BaseWeights) -> None:
    for module, change in changes.items():
        shape = base.shapes[module]
        magnitudes = change.magnitude.numel() if change.magnitude is not None else shape[0]
        if change.size != (shape[0], math.prod(shape[1:])) or magnitudes != shape[0]:
            raise ModelError(
                f"{file} does not fit the {base.variant} model: {module} is {' x '.join(map(str, shape))} there, "
                f"and the adapter changes {change.size[0]} x {change.size[1]}.",
                hint="Is --model-variant the model it was trained on?",
            )


def _kind(changes: Mapping[str, Change]) -> str:
    if any(isinstance(change, Kronecker) for change in changes.values()):
        return "lokr"
    if any(isinstance(change, Hadamard) for change in changes.values()):
        return "loha"
    return "dora" if any(change.magnitude is not None for change in changes.values()) else "lora"
