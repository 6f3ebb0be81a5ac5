"""One optimizer step: passes over its batches, the check, the clip, the update."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn import Parameter
from torch.optim import Optimizer

from sidestep.errors import NonFiniteError
from sidestep.training.batches import Batch
from sidestep.training.passes import Model, Passes, module_of


@dataclass(frozen=True, slots=True)
class StepReading:
    """What a step found, still on the device: mean loss, gradient norm before clipping, and on demand each module's."""

    values: Tensor
    songs: tuple[str, ...]
    has_modules: bool


@dataclass(slots=True, kw_only=True)
class Stepper:
    """Makes optimizer steps of batches. Owns no position and no schedule.

    `guards_itself`: the optimizer takes a flag on the device that makes it skip (fused AdamW), so that a step need not
    wait to know whether its numbers are finite. Once the flag is raised, every later update is skipped as well.
    """

    model: Model
    passes: Passes
    parameters: Mapping[str, Parameter]
    modules: Sequence[str]
    optimizer: Optimizer
    max_grad_norm: float
    scaler: GradScaler
    guards_itself: bool = False
    _not_finite: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._not_finite = torch.zeros((), device=self.model.device)
        if self.guards_itself:
            self.optimizer.found_inf = self._not_finite  # type: ignore[attr-defined]
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)

    def __call__(
        self, batches: Sequence[Batch], *, lr: float, seeds: Sequence[int], with_modules: bool = False
    ) -> StepReading:
        """Make one step: the gradient of the mean loss over all samples of `batches`, clipped, then the update.

        `seeds` fix the adapter's dropout, one a batch. No weight is touched when the loss or the gradient is not
        finite; that is raised as NonFiniteError here, or by `check` where the optimizer guards itself.
        """
        self.passes.prepare(batches)
        torch._foreach_zero_(self._gradients())  # pyright: ignore[reportPrivateImportUsage]
        samples = sum(len(batch.names) for batch in batches)
        losses = [self.passes(batch, share=1 / samples, seed=seed) for batch, seed in zip(batches, seeds, strict=True)]
        self.scaler.unscale_(self.optimizer)
        norms = self._module_norms() if with_modules else []
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm or math.inf)
        values = torch.stack([torch.stack(losses).sum(), norm, *norms])
        reading = StepReading(values, tuple(dict.fromkeys(name for b in batches for name in b.names)), with_modules)
        self._update(reading, lr)
        return reading

    def forget_failures(self) -> None:
        """Let updates go on after numbers that were not finite, when the weights have been put back."""
        self._not_finite.zero_()

    def _update(self, reading: StepReading, lr: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        if self.guards_itself:
            self._not_finite.copy_(torch.maximum(self._not_finite, (~reading.values[:2].isfinite().all()).float()))
            self.optimizer.step()
            return
        # The one place of a step that waits for the device.
        loss, norm = reading.values[:2].tolist()
        # In float16 an overflowing gradient is the scaler's business: it skips the update and scales down.
        check(loss, 0.0 if self.scaler.is_enabled() else norm, reading.songs)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]

    def _module_norms(self) -> list[Tensor]:
        places = {module: place for place, module in enumerate(self.modules)}
        squares: list[list[Tensor]] = [[] for _ in self.modules]
        for name, parameter in self.parameters.items():
            module = module_of(name, places)
            if module is not None and parameter.grad is not None:
                squares[places[module]].append(parameter.grad.square().sum())
        return [torch.stack(parts).sum().sqrt() for parts in squares]


def check(loss: float, norm: float, songs: Sequence[str]) -> None:
    """Raise NonFiniteError, naming the songs of the step, unless its loss and gradient norm are finite."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    raise NonFiniteError(
        f"The {'gradient' if math.isfinite(loss) else 'loss'} is no longer a finite number "
        f"(songs: {', '.join(songs)}).",
        hint="The weights are as they were before this step. Try a lower --lr, or --precision bf16 or fp32.",
    )
