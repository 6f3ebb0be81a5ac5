"""How acestep.cpp reads adapters: nothing is written for it, but what is written for others should work there.

It takes the scale from a 0-dim float32 `.alpha`, else from `lora_alpha` (a whole number) of the adapter_config.json in
the file's folder, else 1; it knows no patterns, no rank stabilisation, no magnitudes, no biases and no LoHa, and of
LoKr only a whole first factor.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sidestep.config.runs import LORA_CONFIG
from sidestep.exports.base import BaseWeights
from sidestep.exports.changes import Hadamard, Kronecker
from sidestep.exports.target import Content

_PREFIXES = ("base_model.model.", "diffusion_model.")
_DOWN = {"lora_A.weight": "lora_B.weight", "lora_down.weight": "lora_up.weight"}


def takes(content: Content) -> bool:
    """Say whether acestep.cpp can read this adapter as it is."""
    kinds = {type(change) for change in content.changes.values()}
    return not content.is_dora and not content.biases and Hadamard not in kinds


def read(file: Path, base: BaseWeights) -> Iterator[tuple[str, Tensor]]:
    """Yield each module a file changes and how (float64)."""
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata() or {}
        tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if any(".lokr_w1" in name for name in tensors):
        yield from _lokr(tensors, json.loads(header.get("lokr_config", "{}")).get("linear_dim"), base)
        return
    stated = _stated_alpha(file.parent)
    for name, down in tensors.items():
        stem, _, suffix = name.partition(".lora_")
        if f"lora_{suffix}" not in _DOWN:
            continue
        up = tensors[f"{stem}.{_DOWN[f'lora_{suffix}']}"]
        alpha, rank = tensors.get(f"{stem}.alpha"), down.shape[0]
        own = alpha.item() if alpha is not None and alpha.dtype == torch.float32 and alpha.ndim == 0 else stated
        scale = 1.0 if own is None else own / rank
        yield _module(stem), up.double() @ down.double() * scale


def _lokr(tensors: dict[str, Tensor], linear_dim: int | None, base: BaseWeights) -> Iterator[tuple[str, Tensor]]:
    flat = {module.replace(".", "_"): module for module in base.shapes}
    for name, first in tensors.items():
        if not (name.startswith("lycoris_") and name.endswith(".lokr_w1")):
            continue
        stem = name.removesuffix(".lokr_w1")
        if f"{stem}.lokr_w2" in tensors:
            second, rank = (tensors[f"{stem}.lokr_w2"],), linear_dim
        else:
            second = tensors[f"{stem}.lokr_w2_a"], tensors[f"{stem}.lokr_w2_b"]
            rank = second[1].shape[0]
        if rank:
            product = Kronecker(first, second).product() * (tensors[f"{stem}.alpha"].item() / rank)
            yield flat[stem.removeprefix("lycoris_")], product


def _stated_alpha(folder: Path) -> int | None:
    path = folder / LORA_CONFIG
    return int(json.loads(path.read_text(encoding="utf-8"))["lora_alpha"]) if path.is_file() else None


def _module(stem: str) -> str:
    for prefix in _PREFIXES:
        stem = stem.removeprefix(prefix)
    return stem.removeprefix("decoder.")
