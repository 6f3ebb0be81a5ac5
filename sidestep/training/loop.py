"""train(): the loop and nothing else."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal, TypeVar

import torch

from sidestep.errors import NonFiniteError
from sidestep.events import Emit, EpochDone, LayerGradients, Metrics, StepDone, TimestepsDrawn
from sidestep.model.device import memory_gib
from sidestep.training.batches import Batch, Batches, collate_draws, mix
from sidestep.training.schedules import lr_factor
from sidestep.training.state import TrainState
from sidestep.training.step import Stepper, StepReading, Whole, check
from sidestep.training.transfer import on_device

Reason = Literal["finished", "early_stop", "interrupted"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How long a run goes and how often it speaks and saves. `passes` are those of a step, in all processes."""

    steps_per_epoch: int
    total_steps: int
    passes: int
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
    readings = Readings(emit, pace, stepper.model.device)
    try:
        reason = _epochs(state, readings, stepper=stepper, batches=batches, pace=pace, hooks=hooks, emit=emit)
    finally:
        # Whatever stopped the run, the numbers of the steps before it belong to what is kept of it.
        readings.finish(state)
    hooks.save()
    return reason


def _epochs(
    state: TrainState, readings: "Readings", *, stepper: Stepper, batches: Batches, pace: Pace, hooks: Hooks, emit: Emit
) -> Reason:
    """Train as `train` does; what the last steps left is not saved yet."""
    while state.step < pace.total_steps:
        evenly = stepper.model.sharded is not None
        for work in works(state, batches, passes=pace.passes, device=stepper.model.device, evenly=evenly):
            _step(work, state, stepper=stepper, pace=pace, hooks=hooks, readings=readings, emit=emit)
            if state.step >= pace.total_steps:
                break
            if hooks.stop_requested():
                return "interrupted"
        readings.read(state)
        if state.batch < batches.plan.batches_per_epoch:
            break  # max_steps ended the run within an epoch.
        emit(EpochDone(step=state.step, epoch=state.epoch + 1, loss=state.finish_epoch()))
        if not readings.leave_out(hooks.after_epoch):
            return "early_stop"
        if state.epoch % pace.save_every == 0 and state.step < pace.total_steps:
            readings.leave_out(hooks.save)
    return "finished"


@dataclass(frozen=True, slots=True)
class Work:
    """What one process has to do of a step: its batches and their places in the epoch, and the step as a whole.

    `length` is how many batches all processes do together.
    """

    batches: list[Batch]
    places: list[int]
    whole: Whole
    length: int


def works(
    state: TrainState, batches: Batches, *, passes: int, device: torch.device, evenly: bool = False
) -> Iterator[Work]:
    """Yield this process's work in each step of `passes` batches that is left of the epoch; it may be none.

    The processes take the batches by turns. `evenly`: each makes as many passes, though some do not count.
    """
    plan, rank, count = batches.plan, batches.processes.rank, batches.processes.count
    layout, start = plan.epoch(state.epoch), state.batch
    reader = on_device(batches.epoch(state.epoch, position=start), device)
    for first in range(start, len(layout), passes):
        draws = layout[first : first + passes]
        places = [place for place in range(first, first + len(draws)) if (place - start) % count == rank]
        own = list(islice(reader, len(places)))
        names = [plan.songs[draw.song].path.stem for batch in draws for draw in batch]
        whole = Whole(len(names), tuple(dict.fromkeys(names)), len(places))
        idle = -(-len(draws) // count) - len(places) if evenly else 0
        own += [collate_draws(batches, draws[0])] * idle
        yield Work(own, places + [first] * idle, whole, len(draws))


def _step(
    work: Work, state: TrainState, *, stepper: Stepper, pace: Pace, hooks: Hooks, readings: "Readings", emit: Emit
) -> None:
    lr = pace.lr * lr_factor(
        state.step, schedule=pace.schedule, warmup_steps=pace.warmup_steps, total_steps=pace.total_steps
    )
    # 31 bits: the seed of a 32-bit hash.
    seeds = [mix(pace.seed, "dropout", state.epoch, place) % 2**31 for place in work.places]
    with_modules = pace.log_heavy_every > 0 and (state.step + 1) % pace.log_heavy_every == 0
    before = replace(state)
    reading = stepper(work.batches, lr=lr, seeds=seeds, with_modules=with_modules, whole=work.whole)
    state.step += 1
    state.batch += work.length
    hooks.after_step()  # Before a sink hears of the step: where one fails, what is saved is whole.
    timesteps = [t for batch in work.batches[: work.whole.passes] for t in batch.task.timesteps_B.tolist()]
    readings.add(PendingStep(before, reading, lr, timesteps, stepper.modules))
    emit(StepDone(step=state.step, epoch=state.epoch + 1))
    if readings.is_due(state.step):
        readings.read(state)


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step whose numbers are still on the device, and where the run was before it."""

    before: TrainState
    reading: StepReading
    lr: float
    timesteps: list[float]
    modules: Sequence[str]


@dataclass(slots=True)
class Readings:
    """Gathers steps; reads them back together, checks them, and emits what they were."""

    emit: Emit
    pace: Pace
    device: torch.device
    _pending: list[PendingStep] = field(default_factory=list)
    _read: list[PendingStep] = field(default_factory=list)
    _losses: list[float] = field(default_factory=list)
    _grad_norm: float = 0.0
    _since: float = field(default_factory=time.monotonic)

    def add(self, step: PendingStep) -> None:
        """Take one step in, without waiting for it."""
        self._pending.append(step)

    def leave_out(self, hook: Callable[[], T]) -> T:
        """Call a hook whose time (saving, validation, samples) is not that of the steps around it."""
        began = time.monotonic()
        result = hook()
        self._since += time.monotonic() - began
        return result

    def is_due(self, step: int) -> bool:
        """Say whether the numbers are to be shown after this step."""
        return step % self.pace.log_every == 0 or step == self.pace.total_steps

    def read(self, state: TrainState) -> None:
        """Wait for the gathered steps, and report when it is due.

        NonFiniteError when one was not finite; `state` is then put back to before it, where the weights still are.
        """
        if not self._pending:
            return
        steps, self._pending = self._pending, []
        numbers = torch.stack([step.reading.values[:2] for step in steps]).tolist()
        for step, (loss, norm) in zip(steps, numbers, strict=True):
            try:
                if not step.reading.is_checked:
                    check(loss, norm, step.reading.songs)
            except NonFiniteError:
                # The steps that were read before it count; `before` was taken when they were not read yet.
                sums = {"epoch_loss_sum": state.epoch_loss_sum, "epoch_steps": state.epoch_steps}
                state.go_back_to(replace(step.before, **sums))
                raise
            state.epoch_loss_sum += loss
            state.epoch_steps += 1
            self._read.append(step)
            self._losses.append(loss)
            self._grad_norm = norm
        if self.is_due(steps[-1].before.step + 1):
            self._report()

    def finish(self, state: TrainState) -> None:
        """Read what is left and report it, due or not: no later reading has these steps."""
        try:
            self.read(state)
        finally:
            if self._read:
                self._report()

    def _report(self) -> None:
        (steps, losses), (self._read, self._losses) = (self._read, self._losses), ([], [])
        now = time.monotonic()
        last = steps[-1].before
        self.emit(
            Metrics(
                step=last.step + 1,
                epoch=last.epoch + 1,
                loss=sum(losses) / len(losses),
                lr=steps[-1].lr,
                grad_norm=self._grad_norm,
                steps_per_second=len(steps) / max(now - self._since, 1e-9),
                memory_gib=memory_gib(self.device),
            )
        )
        self._since = now
        drawn = [t for step in steps for t in step.timesteps]
        self.emit(TimestepsDrawn(step=last.step + 1, timesteps=tuple(drawn)))
        for step in steps:
            if step.reading.has_modules:
                norms = dict(zip(step.modules, step.reading.values[2:].tolist(), strict=True))
                self.emit(LayerGradients(step=step.before.step + 1, norms=norms))
