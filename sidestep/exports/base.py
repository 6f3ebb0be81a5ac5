"""The weights an adapter changes, read one at a time from a checkpoint, under the original's names."""

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sidestep.errors import ModelError
from sidestep.model.checkpoint import Checkpoint, decoder_tensors
from sidestep.model.names import to_original

_WEIGHT = ".weight"


class BaseWeights:
    """The decoder's tensors by the original's names; nothing is in memory before it is asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.variant = checkpoint.variant
        self.config = checkpoint.config
        self._stored = {to_original(name): tensor for name, tensor in decoder_tensors(checkpoint).items()}
        self.shapes = {
            name.removesuffix(_WEIGHT): tensor.shape
            for name, tensor in self._stored.items()
            if name.endswith(_WEIGHT) and len(tensor.shape) > 1
        }
        """The shape of the weight of every module an adapter can change."""

    def tensor(self, name: str) -> Tensor:
        """Read a tensor as float64; ModelError when the model has none of that name."""
        if name not in self._stored:
            raise ModelError(f"The {self.variant} model has no {name}.", hint="Is --model-variant right?")
        stored = self._stored[name]
        with safe_open(stored.file, framework="pt") as file:
            return file.get_tensor(stored.name).double()

    def weight(self, module: str) -> Tensor:
        """Read the weight of a module as float64, [out, in] for a linear layer."""
        return self.tensor(module + _WEIGHT)

    def dtype(self, name: str) -> torch.dtype:
        """Return the format in which a module's weight (or a parameter) is stored."""
        stored = self._stored[name if name in self._stored else name + _WEIGHT]
        with safe_open(stored.file, framework="pt") as file:
            return file.get_tensor(stored.name).dtype

    def skeleton(self) -> nn.Module:
        """Return a decoder without any numbers whose modules have the original's names."""
        root = nn.Module()
        for name, shape in self.shapes.items():
            *parents, leaf = name.split(".")
            parent = root
            for part in parents:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(leaf, self._layer(name, shape))
        return without_numbers(root)

    def _layer(self, name: str, shape: tuple[int, ...]) -> nn.Module:
        bias = f"{name}.bias" in self._stored
        with torch.device("meta"):
            if len(shape) == 2:
                return nn.Linear(shape[1], shape[0], bias=bias)
            if name.startswith("proj_out"):
                return nn.ConvTranspose1d(shape[0], shape[1], shape[2], bias=bias)
            return nn.Conv1d(shape[1], shape[0], shape[2], bias=bias)


def without_numbers(model: nn.Module) -> nn.Module:
    """Give a model on the meta device parameters that take no memory: each is a single NaN, seen in the right shape.

    PEFT moves an adapter to its layer's device, and from the meta device nothing can be read. What stays NaN was not
    loaded.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            nothing = torch.full((), torch.nan).expand(parameter.shape)
            setattr(module, name, nn.Parameter(nothing, requires_grad=False))
    return model
