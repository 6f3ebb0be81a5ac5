"""For programs that take no adapters: the whole model with the change added to its weights, in the original layout.

Weights are stored in the source's own format. In a 16-bit one the change is rounded with the weight it is added to; the
reading back compares with the exactly rounded sum, and says how much of the change the rounding costs.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sidestep.errors import ModelError
from sidestep.exports.base import BaseWeights
from sidestep.exports.changes import Hadamard, Kronecker, LowRank, changed
from sidestep.exports.target import Content
from sidestep.model.checkpoint import SILENCE_FILE, Checkpoint
from sidestep.model.names import DECODER_PREFIX
from sidestep.model.weights import read_weights

_INDEX = "model.safetensors.index.json"
_COPIED = ("config.json", _INDEX, SILENCE_FILE)


class Merged:
    """A model folder: weights in one file or in the shards they came in, config.json, silence_latent.pt.

    The model's own .py files are copied as they are, because ACE-Step's app looks for them; they are never run here.
    """

    forms: ClassVar[tuple[type, ...]] = (LowRank, Kronecker, Hadamard)
    reads_biases: ClassVar[bool] = True

    def write(self, folder: Path, content: Content, base: BaseWeights) -> None:
        """Write the folder, one weights file in memory at a time."""
        source = base.checkpoint.folder
        for name in (*_COPIED, *(path.name for path in source.glob("*.py"))):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        for file in weight_files(base.checkpoint):
            with safe_open(file, framework="pt") as opened:
                header = opened.metadata()
            tensors = load_file(file)
            _merge(tensors, content)
            save_file(tensors, folder / file.name, metadata=header)

    def read(self, folder: Path, base: BaseWeights) -> Iterator[tuple[str, Tensor]]:
        """Compare every tensor with the source's and yield the differences; ModelError for one that is no adapter's."""
        for file in weight_files(base.checkpoint):
            before, after = load_file(file), load_file(folder / file.name)
            if before.keys() != after.keys():
                raise ModelError(f"{file.name} was not written whole.")
            for name, tensor in before.items():
                if torch.equal(tensor, after[name]):
                    continue
                if not name.startswith(DECODER_PREFIX):
                    raise ModelError(f"{name} was changed, which no adapter does.")
                yield (
                    name.removeprefix(DECODER_PREFIX).removesuffix(".weight"),
                    after[name].double() - tensor.double(),
                )


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """Return the weights files of a checkpoint in the original layout: one, or the shards that its index names."""
    return sorted({tensor.file for tensor in read_weights(checkpoint.folder, "model").values()})


def _merge(tensors: dict[str, Tensor], content: Content) -> None:
    for module, change in content.changes.items():
        name = f"{DECODER_PREFIX}{module}.weight"
        if name in tensors:
            tensors[name] = merged_weight(tensors[name], change.product(), change.magnitude)
    for parameter, value in content.biases.items():
        name = DECODER_PREFIX + parameter
        if name in tensors:
            tensors[name] = value.to(tensors[name].dtype)


def merged_weight(weight: Tensor, product: Tensor, magnitude: Tensor | None) -> Tensor:
    """Return a weight after a change, rounded once into its own format."""
    return changed(weight.double(), product, magnitude).to(weight.dtype)
