"""train(): the loop and nothing else."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import torch

from sidestep.events import Emit, EpochDone, LayerGradients, Metrics, StepDone, TimestepsDrawn
from sidestep.model.device import memory_gib
from sidestep.training.batches import Batch, Batches, mix
from sidestep.training.schedules import lr_factor
from sidestep.training.state import TrainState
from sidestep.training.step import Stepper, StepResult

Reason = Literal["finished", "early_stop", "interrupted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How long a run goes and how often it speaks and saves."""

    steps_per_epoch: int
    total_steps: int
    gradient_accumulation: int
    lr: float
    schedule: str
    warmup_steps: int
    seed: int
    save_every: int
    log_every: int
    log_heavy_every: int


@dataclass(slots=True, kw_only=True)
class Hooks:
    """What the loop calls besides the step. `after_epoch` says whether to go on."""

    save: Callable[[], None]
    after_step: Callable[[], None]
    after_epoch: Callable[[], bool]
    stop_requested: Callable[[], bool]


def train(state: TrainState, *, stepper: Stepper, batches: Batches, pace: Pace, hooks: Hooks, emit: Emit) -> Reason:
    """Train from where `state` is to the end of the run, or until a stop is requested; saves what is to be kept."""
    readings = Readings(emit, pace.log_every, pace.total_steps, stepper.device)
    while state.step < pace.total_steps:
        for group in _groups(batches.epoch(state.epoch, position=state.batch), pace.gradient_accumulation):
            _step(group, state, stepper=stepper, pace=pace, readings=readings, emit=emit)
            hooks.after_step()
            if state.step >= pace.total_steps:
                break
            if hooks.stop_requested():
                hooks.save()
                return "interrupted"
        if state.batch < batches.plan.batches_per_epoch:
            break  # max_steps ended the run within an epoch.
        emit(EpochDone(step=state.step, epoch=state.epoch + 1, loss=state.finish_epoch()))
        if not hooks.after_epoch():
            hooks.save()
            return "early_stop"
        if state.epoch % pace.save_every == 0 and state.step < pace.total_steps:
            hooks.save()
    hooks.save()
    return "finished"


def _step(
    group: list[Batch], state: TrainState, *, stepper: Stepper, pace: Pace, readings: "Readings", emit: Emit
) -> None:
    lr = pace.lr * lr_factor(
        state.step, schedule=pace.schedule, warmup_steps=pace.warmup_steps, total_steps=pace.total_steps
    )
    seeds = [mix(pace.seed, "dropout", state.epoch, state.batch + place) for place in range(len(group))]
    with_modules = pace.log_heavy_every > 0 and (state.step + 1) % pace.log_heavy_every == 0
    result = stepper(group, lr=lr, seeds=seeds, with_modules=with_modules)
    state.step += 1
    state.batch += len(group)
    state.epoch_loss_sum += result.loss
    state.epoch_steps += 1
    emit(StepDone(step=state.step, epoch=state.epoch + 1))
    if with_modules:
        emit(LayerGradients(step=state.step, norms=result.module_norms))
    readings.add(result, group, lr=lr, step=state.step, epoch=state.epoch + 1)


@dataclass(slots=True)
class Readings:
    """Gathers steps and emits their mean every `log_every` of them."""

    emit: Emit
    log_every: int
    last_step: int
    device: torch.device
    _losses: list[float] = field(default_factory=list)
    _timesteps: list[float] = field(default_factory=list)
    _since: float = field(default_factory=time.monotonic)

    def add(self, result: StepResult, group: list[Batch], *, lr: float, step: int, epoch: int) -> None:
        """Take one step in; speak when it is time."""
        self._losses.append(result.loss)
        for batch in group:
            self._timesteps += batch.task.timesteps_B.tolist()
        if step % self.log_every and step != self.last_step:
            return
        now = time.monotonic()
        self.emit(
            Metrics(
                step=step,
                epoch=epoch,
                loss=sum(self._losses) / len(self._losses),
                lr=lr,
                grad_norm=result.grad_norm,
                steps_per_second=len(self._losses) / max(now - self._since, 1e-9),
                memory_gib=memory_gib(self.device),
            )
        )
        self.emit(TimestepsDrawn(step=step, timesteps=tuple(self._timesteps)))
        self._losses, self._timesteps, self._since = [], [], now


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group
