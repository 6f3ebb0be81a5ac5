"""For ComfyUI: one file in the names its loader knows, with an `.alpha` a module.

ComfyUI scales by alpha over rank where there is an `.alpha`. Its DoRA divides by the norm of the unchanged weight,
where PEFT and LyCORIS divide by that of the changed one: with W the weight and D the product, the same result needs
`dora_scale = m |W| / |W + D|`, row by row.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sidestep.exports.base import BaseWeights
from sidestep.exports.changes import Change, Hadamard, Kronecker, LowRank, row_norms
from sidestep.exports.source import WRITTEN_FOR
from sidestep.exports.target import Content

PREFIX = "base_model.model."
FLAT_PREFIX = "lycoris_"
_WHOLE_RANK = 1  # Both factors of a LoKr module whole: no rank, and alpha over this is 1.


@dataclass(frozen=True, slots=True)
class ComfyUi:
    """A single file `{name}.safetensors` for ComfyUI's models/loras."""

    name: str
    forms: ClassVar[tuple[type, ...]] = (LowRank, Kronecker, Hadamard)
    reads_biases: ClassVar[bool] = True

    def write(self, folder: Path, content: Content, base: BaseWeights) -> None:
        """Write the file."""
        tensors = {}
        for module, change in content.changes.items():
            stem = PREFIX + module if isinstance(change, LowRank) else FLAT_PREFIX + module.replace(".", "_")
            factors = {**_factors(change), **_scale(change, module, base)}
            tensors |= {f"{stem}.{name}": value.float().contiguous() for name, value in factors.items()}
        for name, value in content.biases.items():
            difference = value.double() - base.tensor(name)
            tensors[f"{PREFIX}{name.removesuffix('.bias')}.diff_b"] = difference.float()
        # acestep.cpp reads the rank of a whole second factor from here.
        lokr = {"lokr_config": json.dumps({"linear_dim": _WHOLE_RANK})} if _is_lokr(content) else {}
        header = {"format": "pt", WRITTEN_FOR: "comfyui", **content.header, **lokr}
        save_file(tensors, folder / f"{self.name}.safetensors", metadata=header)

    def read(self, folder: Path, base: BaseWeights) -> Iterator[tuple[str, Tensor]]:
        """Apply the file as ComfyUI's loader does: stem by stem, then kind by kind."""
        tensors = load_file(folder / f"{self.name}.safetensors")
        for module in base.shapes:
            for stem in (PREFIX + module, FLAT_PREFIX + module.replace(".", "_")):
                own = {
                    name.removeprefix(f"{stem}."): value.double()
                    for name, value in tensors.items()
                    if name.startswith(f"{stem}.") and "." not in name.removeprefix(f"{stem}.").removesuffix(".weight")
                }
                if "diff_b" in own:
                    yield f"{module}.bias", own.pop("diff_b")
                if own:
                    yield module, _applied(own, module, base)


def _is_lokr(content: Content) -> bool:
    return any(isinstance(change, Kronecker) for change in content.changes.values())


def _factors(change: Change) -> dict[str, Tensor]:
    """The tensors of a change under ComfyUI's names; alpha equals the rank, for the scale is in the factors."""
    match change:
        case LowRank():
            factors = {"lora_up.weight": change.up, "lora_down.weight": change.down}
            rank = change.rank
        case Kronecker():
            names = ("lokr_w2",) if len(change.second) == 1 else ("lokr_w2_a", "lokr_w2_b")
            factors = {"lokr_w1": change.first, **dict(zip(names, change.second, strict=True))}
            rank = _WHOLE_RANK if len(change.second) == 1 else change.second[1].shape[0]
        case Hadamard():
            names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
            factors = {name: getattr(change, name.removeprefix("hada_")) for name in names}
            rank = change.w1_b.shape[0]
        case _:
            raise TypeError(type(change))
    return {**factors, "alpha": torch.tensor(float(rank))}


def _scale(change: Change, module: str, base: BaseWeights) -> dict[str, Tensor]:
    if change.magnitude is None:
        return {}
    weight = base.weight(module)
    merged = weight + change.product().reshape(weight.shape)
    ratio = row_norms(weight) / row_norms(merged)
    return {"dora_scale": (change.magnitude.double() * ratio)[:, None]}


def _applied(own: Mapping[str, Tensor], module: str, base: BaseWeights) -> Tensor:
    alpha = own.get("alpha")
    if "lora_up.weight" in own:
        product, rank = own["lora_up.weight"] @ own["lora_down.weight"], own["lora_down.weight"].shape[0]
    elif "hada_w1_a" in own:
        product = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
        rank = own["hada_w1_b"].shape[0]
    else:
        whole = "lokr_w2" in own
        second = own["lokr_w2"] if whole else own["lokr_w2_a"] @ own["lokr_w2_b"]
        product = torch.kron(own["lokr_w1"], second)
        # Where both factors are whole matrices ComfyUI does not look at alpha.
        rank, alpha = (1, None) if whole else (own["lokr_w2_b"].shape[0], alpha)
    product = product * (alpha / rank if alpha is not None else 1.0)
    if "dora_scale" not in own:
        return product
    weight = base.weight(module)
    epsilon = torch.finfo(torch.float32).eps
    norms = row_norms(weight)[:, None] + epsilon
    return (weight + product) * (own["dora_scale"] / norms) - weight
