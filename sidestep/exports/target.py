"""What every export has in common: what is to be written, and the reading back that proves it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, cast

from peft.tuners.lora import Linear
from torch import Tensor, nn

from sidestep.exports.base import BaseWeights
from sidestep.exports.changes import Change, LowRank, changed


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What an export holds: the adapter in forms its target has, by the original's module names."""

    changes: Mapping[str, Change]
    biases: Mapping[str, Tensor]
    header: Mapping[str, str]
    """Where the adapter comes from, as its own header said it."""

    @property
    def rank(self) -> int:
        """The one rank of all its LoRA factors."""
        return next(change.rank for change in self.changes.values() if isinstance(change, LowRank))

    @property
    def is_dora(self) -> bool:
        """Whether magnitudes are in it."""
        return any(change.magnitude is not None for change in self.changes.values())

    def low_rank(self) -> Iterator[tuple[str, LowRank]]:
        """Yield its modules and changes, all of which are LoRA (or DoRA)."""
        for module, change in self.changes.items():
            assert isinstance(change, LowRank)
            yield module, change


class Target(Protocol):
    """A program that reads adapters, or the model itself."""

    forms: ClassVar[tuple[type, ...]]
    """The forms of change it reads as they are; everything else is made a LoRA."""
    reads_biases: ClassVar[bool]

    def write(self, folder: Path, content: Content, base: BaseWeights) -> None:
        """Write the files of the export into an empty folder."""
        ...

    def read(self, folder: Path, base: BaseWeights) -> Iterator[tuple[str, Tensor]]:
        """Yield each module that the files change and how it changes its weight (float64), by the target's own rules.

        Changes of biases come under the parameter's name.
        """
        ...


def layer_change(layer: Linear, adapter: str, module: str, base: BaseWeights) -> Tensor:
    """Return what a layer that PEFT has loaded does to its weight, float64."""
    up, down = (cast(Tensor, part[adapter].weight) for part in (layer.lora_B, layer.lora_A))
    product = up.double() @ down.double() * layer.scaling[adapter]
    if adapter not in layer.lora_magnitude_vector:
        return product
    weight = base.weight(module)
    return changed(weight, product, cast(Tensor, layer.lora_magnitude_vector[adapter].weight)) - weight


def loaded_layers(root: nn.Module, adapter: str) -> Iterator[tuple[str, Linear]]:
    """Yield the layers that PEFT put this adapter on."""
    for name, layer in root.named_modules():
        if isinstance(layer, Linear) and adapter in layer.lora_A:
            yield name, layer
