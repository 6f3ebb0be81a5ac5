"""Whether a run fits the device: one real step at its longest sample, measured, and the settings that take less."""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from sidestep.config.processes import ALONE, Processes, Word
from sidestep.config.settings import flag_of, settings_of, show_value, values_of
from sidestep.config.train import TrainConfig
from sidestep.errors import NoRoomElsewhereError, NoRoomError
from sidestep.events import Emit, Notice
from sidestep.model.capabilities import capabilities
from sidestep.model.device import free_memory, memory_gib, reset_memory_peak, synchronize, total_gib
from sidestep.training.adapters.base import current_values, load_values
from sidestep.training.assemble import Run, assemble
from sidestep.training.batches import Batch, Draw, collate_draws
from sidestep.training.processes import own_device

GIB = 2**30
WINDOW = 60  # Seconds; the window that is proposed where whole songs are too long.
# What a block keeps for its backward pass, in bytes for each patch and channel: a little over what was measured on an
# H100 with dropout (benchmarks/step.py, 60 to 240 s), compiled and not.
KEPT_COMPILED, KEPT = 45, 100
ROOM = 0.8  # The share of the device's memory up to which keeping it all is proposed.


@dataclass(frozen=True, slots=True)
class Fit:
    """What a step at the longest sample took: seconds, and GiB of the device's GiB."""

    step_seconds: float
    peak_gib: float
    device_gib: float


def measure(run: Run) -> Fit | None:
    """Make one real step at the run's longest sample and put everything back; None where a device cannot measure.

    NoRoomError, with settings that take less, when it does not fit here, or not in another process.
    """
    device = run.stepper.model.device
    device_gib = total_gib(device)
    if not capabilities(device).measures_peak or device_gib is None:
        return None
    batch = _longest(run)
    values, optimizer = current_values(run.adapter), copy.deepcopy(run.stepper.optimizer.state_dict())
    scale = run.stepper.scaler.state_dict()
    reset_memory_peak(device)
    try:
        seconds = [_timed_step(run, batch) for _ in range(2)][-1]
    except torch.OutOfMemoryError as error:
        raise NoRoomError(
            f"A step at {run.longest_seconds:g} s of music does not fit into the memory of {device}.",
            hint=f"{takes_less(run.config, run.longest_seconds)} Or let --auto-fit choose.",
        ) from error
    finally:
        load_values(run.adapter, values, source="The adapter")
        run.stepper.optimizer.load_state_dict(optimizer)
        run.stepper.scaler.load_state_dict(scale)
        run.stepper.forget_failures()
    return Fit(seconds, memory_gib(device) or 0.0, device_gib)


def assemble_fitting(config: TrainConfig, *, emit: Emit, processes: Processes = ALONE, **parts: Any) -> Run:
    """Put a run together like `assemble` and measure it; with `auto_fit`, change settings until it fits.

    What is too small for one of the processes is changed in all.

    NoRoomError when it does not fit, or nothing is left to change.
    """
    run = None
    while True:
        try:
            run = assemble(config, emit=emit, processes=processes, **parts)
            fit = measure(run)
            run.processes.meet()  # It fits everywhere.
        except NoRoomError as error:
            if not isinstance(error, NoRoomElsewhereError):
                processes.meet(Word.NO_ROOM)
            if not config.auto_fit:
                raise
            # Where a model alone was too large, nobody knows yet how long the songs are.
            longest = run.longest_seconds if run else config.chunk_duration or config.max_duration
            longest = float(processes.text_of_first(str(longest)))
            smaller = next(iter(ways_to_take_less(config, longest)), None)
            if smaller is None:
                raise
            emit(Notice(text=f"That does not fit; trying with {flags_between(config, smaller)}.", level="warning"))
            config = smaller
        else:
            if fit:
                report(run, fit, emit)
            return run
        run = None
        free_memory(own_device(config.device, processes))


def report(run: Run, fit: Fit, emit: Emit) -> None:
    """Say what was measured, and how long the run will take at most."""
    left = (run.pace.total_steps - run.state.step) * fit.step_seconds
    room = " There is room for --no-gradient-checkpointing, which takes about a quarter less time."
    emit(
        Notice(
            text=f"Measured at the longest sample ({run.longest_seconds:g} s): {fit.peak_gib:.1f} of "
            f"{fit.device_gib:.0f} GiB, {fit.step_seconds:.2f} s a step; {_duration(left)} to the end at most."
            f"{room if has_room_for_activations(run, fit) else ''}"
        )
    )


def has_room_for_activations(run: Run, fit: Fit) -> bool:
    """Say whether a run that recomputes every block could keep their activations instead, with memory to spare."""
    config = run.config
    # --auto-fit may have just found that there is none.
    if config.auto_fit or not config.gradient_checkpointing or config.gradient_checkpointing_ratio < 1:
        return False
    decoder, plan = run.stepper.model.decoder, run.batches.plan
    patches = -(-max(group.frames for group in plan.groups) // decoder.patch_size) * plan.batch_size
    kept = KEPT_COMPILED if run.stepper.model.compiled_blocks else KEPT
    activations = patches * len(decoder.layers) * decoder.config["hidden_size"] * kept / GIB
    return fit.peak_gib + activations < ROOM * fit.device_gib


def ways_to_take_less(config: TrainConfig, seconds: float) -> list[TrainConfig]:
    """Return this config with one setting changed for less memory, what costs the least first.

    For a run that goes on, only what may change then.
    """
    ways = _ways(config, seconds)
    return [way for way in ways if config.resume_from is None or _may_go_on(config, way)]


def _may_go_on(before: TrainConfig, after: TrainConfig) -> bool:
    free = {setting.name for setting in settings_of(TrainConfig) if setting.on_resume == "free"}
    return _changed(before, after).keys() <= free


def _changed(before: TrainConfig, after: TrainConfig) -> dict[str, Any]:
    old = values_of(before)
    return {name: value for name, value in values_of(after).items() if value != old[name]}


def _ways(config: TrainConfig, seconds: float) -> Iterator[TrainConfig]:
    if not config.gradient_checkpointing or config.gradient_checkpointing_ratio < 1:
        yield replace(config, gradient_checkpointing=True, gradient_checkpointing_ratio=1.0)
    if config.batch_size > 1:
        parts = config.batch_size if config.batch_size % 2 else 2
        passes = config.gradient_accumulation * parts
        yield replace(config, batch_size=config.batch_size // parts, gradient_accumulation=passes)
    if config.quantize == "none" and not config.shard_base:
        yield replace(config, quantize="int8")
    if config.optimizer_type == "adamw":
        yield replace(config, optimizer_type="adamw8bit")
    if config.quantize == "int8":
        yield replace(config, quantize="nf4")
    if seconds > WINDOW:
        yield replace(config, chunk_duration=float(max(WINDOW, round(seconds / 2))))
    if config.rank > 16 and config.rank_map is None:
        yield replace(config, rank=config.rank // 2, alpha=config.alpha / 2)


def takes_less(config: TrainConfig, seconds: float) -> str:
    """Return the flags of the settings that take less memory, for a hint."""
    ways = [flags_between(config, way) for way in ways_to_take_less(config, seconds)]
    return f"These take less: {'; '.join(ways) or 'a smaller model'}."


def flags_between(before: TrainConfig, after: TrainConfig) -> str:
    """Return the flags that make `after` of `before`."""
    changed = _changed(before, after).items()
    words = (flag_of(name) if value is True else f"{flag_of(name)} {show_value(value)}" for name, value in changed)
    return " ".join(words)


def _longest(run: Run) -> Batch:
    plan = run.batches.plan
    group = max(plan.groups, key=lambda group: group.frames)
    song = max(group.songs, key=lambda at: plan.songs[at].rows)
    draws = [Draw(song, 0, group.frames, seed) for seed in range(plan.batch_size)]
    return collate_draws(run.batches, draws)


def _timed_step(run: Run, batch: Batch) -> float:
    batches = [batch] * -(-run.pace.passes // run.processes.count)
    device = run.stepper.model.device
    synchronize(device)
    start = time.perf_counter()
    run.stepper(batches, lr=run.pace.lr, seeds=[0] * len(batches))
    synchronize(device)
    return time.perf_counter() - start


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
