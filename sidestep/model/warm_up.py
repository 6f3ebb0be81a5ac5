"""Uses a GPU once for what every training step needs: it loads its kernels on their first use, which takes seconds."""

import torch
from torch.nn import functional as F

from sidestep.model.capabilities import capabilities
from sidestep.model.device import choose_dtype, synchronize

# As in the 2B model: which kernels are loaded hangs on them.
HEADS, KEY_HEADS, LENGTH, CHANNELS = 16, 8, 256, 128
WIDTH = HEADS * CHANNELS
LATENTS, PATCH = 192, 2


def warm_up(device: torch.device, precision: str) -> None:
    """Compute attention, products and a convolution, and their gradients, on a device that captures passes.

    Elsewhere it does nothing. `precision` is that of `--precision`.
    """
    able = capabilities(device)
    if not able.captures:
        return
    dtype = choose_dtype(precision, device)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype, requires_grad=True)

    query, key = numbers(1, LENGTH, HEADS, CHANNELS), numbers(1, LENGTH, KEY_HEADS, CHANNELS)
    heads_first, keys_first = query.transpose(1, 2), key.transpose(1, 2)
    results = [
        F.scaled_dot_product_attention(heads_first, keys_first, keys_first, enable_gqa=True),
        F.linear(query.flatten(2), numbers(WIDTH, WIDTH)),
        F.conv1d(numbers(1, LATENTS, PATCH * LENGTH), numbers(WIDTH, LATENTS, PATCH), stride=PATCH),
        F.rms_norm(query, (CHANNELS,), numbers(CHANNELS)),
    ]
    torch.stack([result.float().sum() for result in results]).sum().backward()
    synchronize(device)
