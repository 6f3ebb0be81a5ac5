"""Puts an adapter of any program beside a decoder, at a strength that can be changed; the decoder's weights stay."""

import copy
from typing import Any

from torch import Tensor, nn

from sidestep.exports.base import BaseWeights
from sidestep.exports.changes import LowRank, changed
from sidestep.exports.source import Source
from sidestep.model.names import to_diffusers


class Attached:
    """An adapter on a decoder: each layer's output gets `strength` times the output of the change of its weight."""

    def __init__(self, decoder: nn.Module, source: Source, base: BaseWeights) -> None:
        self.strength = 1.0
        self._handles = []
        for module, change in source.changes.items():
            layer = decoder.get_submodule(to_diffusers(module))
            if isinstance(change, LowRank) and change.magnitude is None and isinstance(layer, nn.Linear):
                side: nn.Module = _low_rank(layer, change)
            else:
                weight = base.weight(module)
                product = change.product().reshape(weight.shape)
                side = _beside(layer, changed(weight, product, change.magnitude) - weight)
            self._add(layer, side)
        for name, value in source.biases.items():
            layer = decoder.get_submodule(to_diffusers(name.removesuffix(".bias")))
            shift = value.double() - base.tensor(name)
            self._add(layer, _Shift(shift.to(layer.get_parameter("bias")), channels_last=isinstance(layer, nn.Linear)))

    def remove(self) -> None:
        """Leave the decoder as it was."""
        for handle in self._handles:
            handle.remove()

    def _add(self, layer: nn.Module, side: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            return output + self.strength * side(inputs[0]) if self.strength else output

        self._handles.append(layer.register_forward_hook(hook))


class _Shift(nn.Module):
    """Gives the same numbers whatever comes in: a change of a bias."""

    def __init__(self, shift: Tensor, *, channels_last: bool) -> None:
        super().__init__()
        self.shift = shift if channels_last else shift[:, None]

    def forward(self, _: Tensor) -> Tensor:
        return self.shift


def _low_rank(layer: nn.Linear, change: LowRank) -> nn.Module:
    down = nn.Linear(layer.in_features, change.rank, bias=False)
    up = nn.Linear(change.rank, layer.out_features, bias=False)
    down.weight.data, up.weight.data = change.down, change.up
    return nn.Sequential(down, up).to(layer.weight).requires_grad_(False)


def _beside(layer: nn.Module, weight: Tensor) -> nn.Module:
    """Return a layer of the same kind with this weight and no bias."""
    side = copy.copy(layer)
    side._parameters = dict(layer._parameters)
    side._forward_hooks = copy.copy(layer._forward_hooks)
    side._forward_hooks.clear()
    side.register_parameter("weight", nn.Parameter(weight.to(layer.get_parameter("weight")), requires_grad=False))
    side.register_parameter("bias", None)
    return side
