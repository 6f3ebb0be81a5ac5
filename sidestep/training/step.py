"""One optimizer step: passes over its batches, the check, the clip, the update."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn import Parameter
from torch.optim import Optimizer

from sidestep.config.processes import ALONE, Processes
from sidestep.errors import NonFiniteError
from sidestep.training.batches import Batch
from sidestep.training.passes import Model, Passes, module_of

_ALIGNMENT = 32  # Floats: where each gradient begins in their one buffer, so that kernels may read several at once.


@dataclass(frozen=True, slots=True)
class StepReading:
    """What a step found, still on the device: mean loss, gradient norm before clipping, and on demand each module's.

    `is_checked`: the step itself looked whether its numbers stop the run. A norm that is not finite then does not: the
    gradient overflowed in float16, and the update was skipped.
    """

    values: Tensor
    songs: tuple[str, ...]
    has_modules: bool
    is_checked: bool


@dataclass(frozen=True, slots=True)
class Whole:
    """A step as all processes make it: its samples, its songs' names, and how many of this process's passes count.

    Passes beyond those are made because other processes need this one's part of the model; they add nothing.
    """

    samples: int
    songs: tuple[str, ...]
    passes: int

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> "Whole":
        """Return a step that is made in one process."""
        names = [name for batch in batches for name in batch.names]
        return cls(len(names), tuple(dict.fromkeys(names)), len(batches))

    def shares(self, passes: int) -> list[float]:
        """Return the share of the step's loss that a sample of each pass has."""
        return [1 / self.samples if place < self.passes else 0.0 for place in range(passes)]


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
    processes: Processes = ALONE
    _not_finite: Tensor = field(init=False)
    _numbers: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._not_finite = torch.zeros((), device=self.model.device)
        if self.guards_itself:
            self.optimizer.found_inf = self._not_finite  # type: ignore[attr-defined]
        self._numbers = gradients_in_one_buffer(list(self.parameters.values()), extra=1)
        if self.scaler.is_enabled():
            # A process without a batch never scales a loss, and its scaler has to be set up all the same.
            self.scaler.scale(self._not_finite)

    def __call__(
        self,
        batches: Sequence[Batch],
        *,
        lr: float,
        seeds: Sequence[int],
        with_modules: bool = False,
        whole: Whole | None = None,
    ) -> StepReading:
        """Make one step: the gradient of the mean loss over all samples of the step, clipped, then the update.

        `batches` are this process's; of several processes, `whole` says what the step has in all of them. `seeds` fix
        the adapter's dropout, one a batch. No weight is touched when the loss or the gradient is not finite; that is
        raised as NonFiniteError here, or by `check` where the optimizer guards itself.
        """
        whole = whole or Whole.of(batches)
        self.passes.prepare(batches)
        self._numbers.zero_()
        shares = whole.shares(len(batches))
        with self.model.spread_over(self.processes):
            losses = [
                self.passes(batch, share=share, seed=seed)
                for batch, share, seed in zip(batches, shares, seeds, strict=True)
            ]
        loss = self._numbers[-1]
        if losses:
            loss.copy_(torch.stack(losses).sum())
        self.processes.add_up(self._numbers)
        self.scaler.unscale_(self.optimizer)
        norms = self._module_norms() if with_modules else []
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm or math.inf)
        numbers = torch.stack([loss, norm, *norms])
        reading = StepReading(numbers, whole.songs, with_modules, is_checked=not self.guards_itself)
        self._update(reading, lr)
        return reading

    @property
    def stops_updates(self) -> Tensor | None:
        """The flag on the device (0 or 1) that makes this and every later update skip; None where the step looks."""
        return self._not_finite if self.guards_itself else None

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
        # In float16 an overflowing gradient is the scaler's business: it skips the update and scales down, until there
        # is nothing left to take back.
        is_too_large = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        check(loss, 0.0 if is_too_large else norm, reading.songs)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _module_norms(self) -> list[Tensor]:
        places = {module: place for place, module in enumerate(self.modules)}
        squares: list[list[Tensor]] = [[] for _ in self.modules]
        for name, parameter in self.parameters.items():
            module = module_of(name, places)
            if module is not None and parameter.grad is not None:
                squares[places[module]].append(parameter.grad.square().sum())
        return [torch.stack(parts).sum().sqrt() for parts in squares]


def gradients_in_one_buffer(parameters: Sequence[Parameter], *, extra: int) -> Tensor:
    """Give every parameter a gradient that is a part of one buffer of zeros, and return the buffer.

    It ends with `extra` more numbers. Zeroing it, or adding it up over processes, takes one kernel and no copy.
    """
    starts, end = [], 0
    for parameter in parameters:
        starts.append(end)
        end += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
    buffer = torch.zeros(end + extra, device=parameters[0].device)
    for parameter, start in zip(parameters, starts, strict=True):
        parameter.grad = buffer[start : start + parameter.numel()].view_as(parameter)
    return buffer


def check(loss: float, norm: float, songs: Sequence[str]) -> None:
    """Raise NonFiniteError, naming the songs of the step, unless its loss and gradient norm are finite."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    raise NonFiniteError(
        f"The {'gradient' if math.isfinite(loss) else 'loss'} is no longer a finite number "
        f"(songs: {', '.join(songs)}).",
        hint="The weights are as they were before this step. Try a lower --lr, or --precision bf16 or fp32.",
    )
