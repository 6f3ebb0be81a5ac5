"""Shows the input and the output gradient of frozen linear layers to a recorder, while a loss is differentiated.

The gradient of a layer's weight, gradient^T input, is never formed: a recorder projects both sides to a few columns.

B batch, S positions, I inputs, O outputs.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

Shape = tuple[int, int]
"""Outputs and inputs of a linear layer."""


class Recorder(Protocol):
    """Takes in what a pass shows of one layer."""

    def take(self, module: str, inputs_BSI: Tensor, gradients_BSO: Tensor) -> None:
        """Take the layer's input and the gradient of the summed loss by its output."""
        ...


class _Tap(torch.autograd.Function):
    """The identity, which keeps the layer's input and shows it with the gradient on the way back.

    The input is a saved tensor: where blocks are recomputed it is dropped and made again like any other, and layers
    that share an input share its memory.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, output: Tensor, inputs: Tensor, anchor: Tensor, take: Callable[..., None]) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.take = take  # type: ignore[attr-defined]
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        (inputs,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.take(inputs, gradient)
        return gradient, None, None, None


@contextmanager
def tapped(layers: Mapping[str, nn.Module], recorder: Recorder, *, dtype: torch.dtype) -> Iterator[None]:
    """While open, every backward pass through `layers` shows them to the recorder in `dtype`; quantized layers too."""
    handles = [layer.register_forward_hook(_hook(name, recorder, dtype)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    name: str, recorder: Recorder, dtype: torch.dtype
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def take(inputs: Tensor, gradients: Tensor) -> None:
        recorder.take(name, inputs.to(dtype), gradients.to(dtype))

    def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # Nothing is trained, so the graph needs one leaf of its own to be built at all.
        anchor = torch.zeros((), device=output.device, requires_grad=True)
        return _Tap.apply(output, arguments[0].detach(), anchor, take)  # type: ignore[return-value]

    return hook
