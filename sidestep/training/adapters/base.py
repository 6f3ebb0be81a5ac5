"""What every kind of adapter offers, and which modules of the decoder it goes on."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sidestep.config.adapter import ATTENTION_PROJECTIONS, MLP_PROJECTIONS
from sidestep.errors import ModelError
from sidestep.model.names import to_diffusers, to_original

ATTENTION_BLOCKS = {"both": ("self_attn", "cross_attn"), "self": ("self_attn",), "cross": ("cross_attn",)}


class Adapter(Protocol):
    """A small set of trained tensors on a frozen decoder. All names are the original's, relative to the decoder."""

    @property
    def modules(self) -> Sequence[str]:
        """The adapted modules: `layers.0.self_attn.q_proj`, ..."""
        ...

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """The trained tensors by name, float32, in a fixed order."""
        ...

    @property
    def remarks(self) -> Sequence[str]:
        """What a user should know before training: which programs will not load this adapter, what has no effect."""
        ...

    def write(self, folder: Path, values: Mapping[str, Tensor], *, about: Mapping[str, str]) -> None:
        """Write files that other programs load at full strength, from `values` (named like `parameters`).

        `about` goes into the file's header.
        """
        ...

    def read(self, path: Path) -> None:
        """Take over the weights of an adapter of this kind from its folder or file; ModelError when it does not fit."""
        ...


def target_names(layers: int, *, attention_type: str, target_modules: Sequence[str]) -> list[str]:
    """Return the modules an adapter goes on, block by block: `layers.0.self_attn.q_proj`, ..."""
    parts = [
        f"{block}.{projection}"
        for block in ATTENTION_BLOCKS[attention_type]
        for projection in ATTENTION_PROJECTIONS
        if projection in target_modules
    ]
    parts += [f"mlp.{projection}" for projection in MLP_PROJECTIONS if projection in target_modules]
    return [f"layers.{layer}.{part}" for layer in range(layers) for part in parts]


def target_suffixes(modules: Sequence[str], decoder: nn.Module) -> list[str]:
    """Return the shortest suffixes by which PEFT finds exactly these modules: `q_proj`, `self_attn.q_proj`, ...

    `decoder` is looked at as it is before adapters are put on it.
    """
    others = {to_original(name) for name, _ in decoder.named_modules()} - set(modules)
    taken = {suffix for name in others for suffix in _suffixes(name)}
    return sorted({next(suffix for suffix in _suffixes(name) if suffix not in taken) for name in modules})


def _suffixes(name: str) -> list[str]:
    """Return the projection, block and projection, and the whole name."""
    parts = name.split(".")
    return [".".join(parts[-1:]), ".".join(parts[-2:]), name]


def pattern_matches(pattern: str, module: str) -> bool:
    """Say whether PEFT's pattern means the module: the end of its name, in the original's words or in diffusers'.

    Adapters that were trained on diffusers' model name its modules. re.error for what is no pattern.
    """
    return any(re.match(rf"(.*\.)?({pattern})$", name) for name in (module, to_diffusers(module)))


def freeze(decoder: nn.Module) -> None:
    """Make every weight of the decoder constant."""
    decoder.requires_grad_(False)


def trained_parameters(decoder: nn.Module) -> dict[str, Parameter]:
    """Return what of the decoder is trained, made float32, by diffusers' names."""
    trained = {name: parameter for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    for parameter in trained.values():
        parameter.data = parameter.data.float()
    return trained


def load_values(adapter: Adapter, values: Mapping[str, Tensor], *, source: str) -> None:
    """Copy `values` into the adapter's parameters; ModelError unless names and shapes are exactly the same."""
    parameters = adapter.parameters
    missing, surplus = sorted(parameters.keys() - values.keys()), sorted(values.keys() - parameters.keys())
    if missing or surplus:
        raise ModelError(
            f"{source} does not fit this adapter: {len(missing)} tensors missing, {len(surplus)} unknown; "
            f"for one, {(missing or surplus)[0]}.",
            hint="Were adapter type, target modules or attention type other than now?",
        )
    for name, parameter in parameters.items():
        if parameter.shape != values[name].shape:
            raise ModelError(
                f"{source} does not fit this adapter: {name} is {_shape(values[name])}, here {_shape(parameter)}.",
                hint="Was the rank or the model another one?",
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def current_values(adapter: Adapter) -> dict[str, Tensor]:
    """Return copies of the adapter's trained tensors on the CPU."""
    return {name: parameter.detach().cpu().clone() for name, parameter in adapter.parameters.items()}


def diffusers_names(modules: Sequence[str]) -> list[str]:
    """Return the modules under the names they have in memory."""
    return [to_diffusers(name) for name in modules]


def _shape(tensor: Tensor) -> str:
    return " x ".join(str(size) for size in tensor.shape) or "a single number"
