"""One optimizer step: forward, backward, check, clip, update."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import Parameter
from torch.optim import Optimizer

from sidestep.errors import NonFiniteError
from sidestep.model.attention import MaskedCrossAttention
from sidestep.model.device import autocast
from sidestep.training.batches import Batch
from sidestep.training.objective import flow_matching_losses, predict_velocity

Weighting = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step found: the mean loss, the gradient norm before clipping, and on demand that of each module."""

    loss: float
    grad_norm: float
    module_norms: Mapping[str, float]


@dataclass(slots=True, kw_only=True)
class Stepper:
    """Makes optimizer steps of batches. Owns no position and no schedule."""

    decoder: nn.Module
    cross_attention: MaskedCrossAttention
    parameters: Mapping[str, Parameter]
    modules: Sequence[str]
    null_condition: Tensor
    optimizer: Optimizer
    weighting: Weighting | None
    max_grad_norm: float
    device: torch.device
    dtype: torch.dtype
    scaler: GradScaler

    def __call__(
        self, batches: Sequence[Batch], *, lr: float, seeds: Sequence[int], with_modules: bool = False
    ) -> StepResult:
        """Make one step: the gradient of the mean loss over all samples of `batches`, clipped, then the update.

        `seeds` fix the adapter's dropout, one a batch. NonFiniteError before any weight is touched when the loss or the
        gradient is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        samples = sum(len(batch.names) for batch in batches)
        loss = torch.zeros((), device=self.device)
        for batch, seed in zip(batches, seeds, strict=True):
            loss += self._backward(batch, seed, share=1 / samples)
        self.scaler.unscale_(self.optimizer)
        norms = self._module_norms() if with_modules else []
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm or math.inf)
        # The one place of a step that waits for the GPU.
        readings = torch.stack([loss, norm, *norms]).tolist()
        self._check(readings[0], readings[1], batches)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return StepResult(readings[0], readings[1], dict(zip(self.modules, readings[2:], strict=False)))

    def losses(self, batch: Batch) -> Tensor:
        """Return the loss of each sample of a batch, [B] float32, unweighted."""
        task = batch.task.to(self.device)
        self.cross_attention.set_rows(task.rows_BL)
        with autocast(self.device, self.dtype):
            velocity_BTC = predict_velocity(self.decoder, task, self.null_condition, dtype=self.dtype)
        return flow_matching_losses(velocity_BTC, task)

    def _backward(self, batch: Batch, seed: int, *, share: float) -> Tensor:
        # Dropout draws from torch's global generators; seeding them by place in the run needs no state to restore.
        torch.manual_seed(seed)
        losses = self.losses(batch)
        if self.weighting is not None:
            losses = losses * self.weighting(batch.task.timesteps_B).to(losses)
        loss = losses.sum() * share
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _module_norms(self) -> list[Tensor]:
        squares = {module: torch.zeros((), device=self.device) for module in self.modules}
        for name, parameter in self.parameters.items():
            module = next((part for part in _parents(name) if part in squares), None)
            if module is not None and parameter.grad is not None:
                squares[module] = squares[module] + parameter.grad.square().sum()
        return [square.sqrt() for square in squares.values()]

    def _check(self, loss: float, norm: float, batches: Sequence[Batch]) -> None:
        if math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled()):
            return  # In fp16 an overflowing gradient is the scaler's business: it skips the update and scales down.
        songs = ", ".join(dict.fromkeys(name for batch in batches for name in batch.names))
        raise NonFiniteError(
            f"The {'gradient' if math.isfinite(loss) else 'loss'} is no longer a finite number (songs: {songs}).",
            hint="The weights are as they were before this step. Try a lower --lr, or --precision bf16 or fp32.",
        )


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1)]
