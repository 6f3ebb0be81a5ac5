"""One pass over one batch: the forward, and the backward that adds to the gradients; eager or captured in a CUDA graph.

Both compute the same; a captured pass is replayed by one call and does not wait for the CPU.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import Parameter

from sidestep.config.processes import Processes
from sidestep.model.attention import CrossAttention, blocks_of
from sidestep.model.device import Graph, Stream, autocast, beside, capturing
from sidestep.model.forward import velocity
from sidestep.model.fuse import Fused
from sidestep.training.batches import Batch
from sidestep.training.objective import Task, drop_conditions, flow_matching_losses, noisy_latents

Weighting = Callable[[Tensor], Tensor]
WARM_UPS = 2  # Eager passes before a capture: libraries make their workspaces and choose their kernels.


@dataclass(slots=True, kw_only=True)
class Model:
    """A frozen decoder with its adapter, ready to be asked for losses."""

    decoder: AceStepTransformer1DModel
    cross_attention: CrossAttention
    null_condition: Tensor
    weighting: Weighting | None
    recompute: Sequence[bool]
    dropout_seed: Tensor
    device: torch.device
    dtype: torch.dtype
    fused: Fused | None = None
    compiled_blocks: Sequence[Callable[..., Tensor]] | None = None
    any_length: bool = False
    sharded: Callable[..., Tensor] | None = None
    """The forward pass of a decoder whose weights lie in several processes, which all have to run it together."""

    @property
    def blocks(self) -> Sequence[Callable[..., Tensor]]:
        """The decoder's blocks as they train, before any compilation."""
        return self.fused.blocks if self.fused else blocks_of(self.decoder)

    @property
    def kinds(self) -> int:
        """How many different blocks there are for a compiler: by their window, and by the ranks of their LoRA."""
        blocks = blocks_of(self.decoder)
        return len({(block.self_attn.sliding_window, *_shapes_in(block)) for block in blocks})

    def losses(self, task: Task, *, compiled: bool = False) -> Tensor:
        """Return the unweighted loss of each sample, [B] float32; the task is on the model's device."""
        self.cross_attention.set_rows(task.rows_BL)
        with autocast(self.device, self.dtype):
            return flow_matching_losses(self.velocity(task, compiled=compiled), task)

    def spread_over(self, processes: Processes) -> AbstractContextManager[None]:
        """Give the context for running a decoder whose weights may lie in these processes: each needs all of them."""
        return nullcontext() if self.sharded is None else processes.needing_all()

    def weighted(self, losses: Tensor, task: Task) -> Tensor:
        """Return the losses as they count in training."""
        return losses if self.weighting is None else losses * self.weighting(task.timesteps_B)

    def velocity(self, task: Task, *, compiled: bool = False) -> Tensor:
        """Return the velocity [B, T, C] for a task, in the model's dtype.

        The timestep is cast before it enters the model: the original's sinusoid is computed from the rounded timestep
        in training and at inference.
        """
        condition_BLD = drop_conditions(task.condition_BLD.to(self.dtype), self.null_condition, task.is_dropped_B)
        blocks = self.compiled_blocks if compiled else None
        if self.fused:
            self.fused.refresh()
        run = self.sharded or partial(velocity, self.decoder)
        return run(
            hidden_states_BTC=noisy_latents(task).to(self.dtype),
            timestep_B=task.timesteps_B.to(self.dtype),
            condition_BLD=condition_BLD,
            context_BTC=task.context_BTC.to(self.dtype),
            blocks=blocks or self.blocks,
            recompute=self.recompute,
            any_length=blocks is not None and self.any_length,
        )


class Passes(Protocol):
    """Runs passes; the gradients add up in the parameters."""

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Get ready for batches of these shapes, before any gradient is there."""
        ...

    def __call__(self, batch: Batch, *, share: float, seed: int) -> Tensor:
        """Add the gradient of `share` times the summed losses and return that number, on the device."""
        ...


@dataclass(slots=True, kw_only=True)
class EagerPasses:
    """Passes as Python runs them; anywhere."""

    model: Model
    scaler: GradScaler

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Nothing needs to be prepared."""

    def __call__(self, batch: Batch, *, share: float, seed: int) -> Tensor:
        """Run the pass; `scaler` keeps small gradients of float16 from vanishing."""
        self.model.dropout_seed.fill_(seed)
        task = batch.task.to(self.model.device)
        loss = self.model.weighted(self.model.losses(task, compiled=True), task).sum() * share
        self.scaler.scale(loss).backward()
        return loss.detach()


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: Graph
    task: Task
    share: Tensor
    loss: Tensor


@dataclass(slots=True, kw_only=True)
class CapturedPasses:
    """Passes as CUDA graphs, one for each shape of batch; all share one pool of memory.

    The gradients must be allocated, and stay where they are, from the first capture on.
    """

    model: Model
    parameters: Sequence[Parameter]
    scaler: GradScaler
    _captured: dict[tuple[object, ...], _Captured] = field(default_factory=dict)
    _pool: Any = None

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Capture what was not captured yet; leaves the gradients as zeros where it does."""
        for batch in batches:
            key = _shapes(batch.task)
            if key not in self._captured:
                self._captured[key] = self._capture(batch.task)

    def __call__(self, batch: Batch, *, share: float, seed: int) -> Tensor:
        """Copy the batch into the graph's inputs and replay it."""
        captured = self._captured[_shapes(batch.task)]
        captured.task.copy_(batch.task)
        captured.share.fill_(share)
        self.model.dropout_seed.fill_(seed)
        captured.graph.replay()
        return captured.loss.clone()

    def _capture(self, like: Task) -> _Captured:
        task = like.to(self.model.device, copy=True)
        share = torch.zeros((), device=self.model.device)
        with beside(Stream()):
            for _ in range(WARM_UPS):
                self._pass(task, share)
        graph = Graph()
        with capturing(graph, pool=self._pool):
            loss = self._pass(task, share)
        self._pool = self._pool or graph.pool()
        return _Captured(graph, task, share, loss)

    def _pass(self, task: Task, share: Tensor) -> Tensor:
        # `share` is zero while warming up, and so are the gradients that adds.
        loss = self.model.weighted(self.model.losses(task, compiled=True), task).sum() * share
        # The scale is a number on the device, and changes there: a graph reads what it is when it is replayed.
        gradients = torch.autograd.grad(self.scaler.scale(loss), self.parameters, materialize_grads=True)
        # Together: `backward()` would add each of some 400 small tensors by a kernel of its own.
        sums = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        torch._foreach_add_(sums, gradients)  # pyright: ignore[reportPrivateImportUsage]
        return loss.detach()


def _shapes_in(block: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(tensor.shape)) for name, tensor in (*block.named_parameters(), *block.named_buffers())]


def _shapes(task: Task) -> tuple[object, ...]:
    return tuple(None if tensor is None else tuple(tensor.shape) for tensor in task.parts())


def module_of(parameter: str, modules: Mapping[str, int]) -> str | None:
    """Return the adapted module a parameter belongs to, by its name; None for one of no module (a bias)."""
    parts = parameter.split(".")
    return next((name for n in range(len(parts) - 1, 0, -1) if (name := ".".join(parts[:n])) in modules), None)
