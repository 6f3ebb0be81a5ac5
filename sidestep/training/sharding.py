"""The frozen decoder spread over processes (torch's FSDP2): each holds its part of every block, and one block whole.

The adapter's weights are whole in every process, and so is what lies outside the blocks.
"""

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn import Parameter

from sidestep.config.processes import Processes
from sidestep.model.attention import blocks_of
from sidestep.model.forward import velocity
from sidestep.training.processes import JoinedProcesses


class ShardedForward(nn.Module):
    """The forward pass of a sharded decoder, `velocity`, as the module that FSDP takes for the root of its parts."""

    def __init__(self, decoder: AceStepTransformer1DModel) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, **inputs: Any) -> Tensor:
        """Return the velocity; all processes call this together."""
        return velocity(self.decoder, **inputs)


def shard(
    decoder: AceStepTransformer1DModel, trained: Iterable[Parameter], processes: Processes, *, device: torch.device
) -> ShardedForward:
    """Move a decoder, which may lie on the CPU, to the device: of its blocks only this process's part, one by one.

    `trained` are the adapter's weights.
    """
    assert isinstance(processes, JoinedProcesses)  # Without others it was refused.
    mesh = DeviceMesh.from_group(processes.numbers, device.type)
    root = ShardedForward(decoder)
    blocks = blocks_of(decoder)
    in_blocks = {id(parameter) for block in blocks for parameter in block.parameters()}
    outside = {parameter for parameter in decoder.parameters() if id(parameter) not in in_blocks}
    whole = {*trained, *outside}
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for module in decoder.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    fully_shard(root, mesh=mesh, ignored_params=whole)
    return root
