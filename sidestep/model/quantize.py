"""Frozen weights in 8 or 4 bits, made whole again where they are used; adapters and gradients stay as they are.

`int8`: each output row by its largest value, symmetric: half the memory of bf16 at about 1 % error of a weight.
`nf4`: bitsandbytes' 4-bit normal float in blocks of 64 (Dettmers et al. 2023): a quarter, at about 10 %.
"""

from typing import Any, Protocol

import torch
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from torch import Tensor, nn

from sidestep.errors import ConfigError

NF4_BLOCK = 64


class Storage(Protocol):
    """Holds a weight in few bits."""

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the packed weight and its scales."""
        ...

    def unpack(self, packed: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in] in `dtype`."""
        ...


class Int8:
    """Symmetric 8-bit integers, scaled by row."""

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return int8 [out, in] and float32 [out, 1]."""
        scales = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        return (weight.float() / scales).round().to(torch.int8), scales

    def unpack(self, packed: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in] in `dtype`."""
        return (packed * scales).to(dtype)


class Nf4:
    """bitsandbytes' 4-bit normal float."""

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return two weights a byte, and a float32 scale for each block of 64."""
        packed, scales = _four_bit().quantize_4bit.default(weight.contiguous(), NF4_BLOCK, "nf4", torch.uint8)
        return packed, scales

    def unpack(self, packed: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in] in `dtype`."""
        return _four_bit().dequantize_4bit.default(packed, scales, NF4_BLOCK, "nf4", shape, dtype)


STORAGES: dict[str, type[Storage]] = {"int8": Int8, "nf4": Nf4}


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is held in few bits. `weight` gives it whole, made anew at each call."""

    packed: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, storage: Storage, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.storage = storage
        self.dtype = linear.weight.dtype
        packed, scales = storage.pack(linear.weight.detach().to(device))
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().to(device), requires_grad=False)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight [out, in], in the dtype it had."""
        shape = (self.out_features, self.in_features)
        return self.storage.unpack(self.packed, self.scales, shape, self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return x W^T + b; the whole weight lives only as long as it is used, in the backward pass too."""
        out = _Product.apply(input.to(self.dtype), self.packed, self.scales, self)
        return out if self.bias is None else out + self.bias


class _Product(torch.autograd.Function):
    """x W^T with respect to x alone; saves the packed weight, where torch's own would save the whole one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scales: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.save_for_backward(packed, scales)
        ctx.storage, ctx.shape, ctx.dtype = layer.storage, (layer.out_features, layer.in_features), layer.dtype
        return torch.nn.functional.linear(x, layer.storage.unpack(packed, scales, ctx.shape, ctx.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        packed, scales = ctx.saved_tensors
        weight = ctx.storage.unpack(packed, scales, ctx.shape, ctx.dtype)
        return gradients[0].to(ctx.dtype) @ weight, None, None, None


def quantize_blocks(decoder: AceStepTransformer1DModel, kind: str, *, device: torch.device) -> None:
    """Hold every attention and MLP weight of the decoder in few bits, and move the decoder to `device`.

    The decoder may lie on the CPU: block by block its weights go over, and never whole. ConfigError when the package
    that `kind` needs is missing.
    """
    storage = STORAGES[kind]()
    for block in decoder.layers:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, QuantizedLinear(child, storage, device))
    nn.Module.to(decoder, device)


def _four_bit() -> Any:
    """Return bitsandbytes' operators, which torch.compile knows."""
    try:
        import bitsandbytes  # noqa: F401, PLC0415  A package not every platform has; loading it registers its operators.
    except ImportError as error:
        raise ConfigError(
            f"--quantize nf4 needs bitsandbytes, which cannot be loaded here: {error}.",
            hint="Use --quantize int8, which needs nothing.",
        ) from error
    return torch.ops.bitsandbytes
