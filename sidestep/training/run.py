"""A run as a whole: assembled, carried through the loop, saved."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

from sidestep.config.runs import CHECKPOINTS, checkpoint_name
from sidestep.config.shell import shell_line, start_words
from sidestep.errors import (
    DataError,
    ElsewhereError,
    LostProcessError,
    NonFiniteError,
    NoRoomError,
    ReadingError,
    RunError,
)
from sidestep.events import AdapterSaved, CheckpointSaved, Emit, RunDone, RunStarted, Validated
from sidestep.model.device import full_memory_alike
from sidestep.preprocess.tensors import FRAMES_PER_SECOND
from sidestep.training.adapters.base import current_values
from sidestep.training.assemble import Run
from sidestep.training.checkpoints import Snapshot, save_adapter, save_checkpoint
from sidestep.training.fit import takes_less
from sidestep.training.loop import Hooks, Reason, train
from sidestep.training.state import TrainState
from sidestep.training.validation import held_out_loss

logger = logging.getLogger(__name__)


class Listener(Protocol):
    """Is called before the first step, after each epoch, and once more when training has ended."""

    def __call__(self, state: TrainState, *, is_last: bool) -> None:
        """Render samples, if it is time."""
        ...


def carry_out(
    run: Run, *, emit: Emit, stop_requested: Callable[[], bool], listen: Listener = lambda state, *, is_last: None
) -> Reason:
    """Train to the end, or until a stop is requested; checkpoints and the final adapter are on disk afterwards."""
    emit(_started(run))
    hooks = Hooks(
        save=lambda: _save(run, emit),
        after_step=lambda: run.ema.update(run.state.step, unless=run.stepper.stops_updates) if run.ema else None,
        after_epoch=lambda: _after_epoch(run, emit, listen),
        stop_requested=stop_requested,
    )
    with _saving_on_failure(run, emit):
        if run.held_out and run.state.step == 0:
            _validate(run, emit)
        listen(run.state, is_last=False)
        if run.state.is_out_of_patience(run.config.early_stop_patience):
            reason: Reason = "early_stop"  # Before; what is left to do is to save its adapters.
        else:
            reason = train(run.state, stepper=run.stepper, batches=run.batches, pace=run.pace, hooks=hooks, emit=emit)
    if run.held_out and run.state.batch and reason == "finished":
        _validate(run, emit)  # --max-steps ended the run within an epoch: its last steps count for the best, too.
    if reason != "interrupted":
        _save_final(run, emit)
        listen(run.state, is_last=True)
    resume = resume_command(run) if reason == "interrupted" else ""
    emit(RunDone(step=run.state.step, epoch=run.state.epoch, reason=reason, resume_command=resume))
    return reason


def resume_command(run: Run) -> str:
    """Return what to type to go on with this run, in as many processes (for several machines see the README)."""
    return shell_line([*start_words(processes=run.processes.count), run.recipe.name, "--resume-from", run.output_dir])


def _started(run: Run) -> RunStarted:
    config, plan, pace = run.config, run.batches.plan, run.pace
    minutes = sum(song.frames for song in plan.songs) / FRAMES_PER_SECOND / 60
    parameters = sum(parameter.numel() for parameter in run.adapter.parameters.values())
    facts = {
        "Model": f"{run.checkpoint.variant} ({run.stepper.model.dtype}, {run.stepper.model.device})".replace(
            "torch.", ""
        ),
        "Songs": f"{len(plan.songs)} ({minutes:.1f} min)" + (f", {len(run.held_out)} held out" if run.held_out else ""),
        "Adapter": f"{config.adapter_type}, {_ranks(run)}, {len(run.adapter.modules)} modules, "
        f"{parameters / 1e6:.2f} M parameters",
        "Optimizer": f"{config.optimizer_type}, lr {pace.lr:g}, {pace.schedule}",
        "Batch": _batch(run),
    }
    return RunStarted(
        recipe=str(run.recipe),
        facts=facts,
        epochs=-(-pace.total_steps // pace.steps_per_epoch),
        steps=pace.total_steps,
        steps_per_epoch=pace.steps_per_epoch,
        first_step=run.first_step,
        output_dir=run.output_dir,
    )


def _batch(run: Run) -> str:
    """Say what a step takes in; of a run that goes on in more or fewer processes, what it took from the start."""
    config, started, count = run.config, run.state.processes, run.processes.count
    factors = f"{config.batch_size} x {config.gradient_accumulation}"
    many = f" x {started} processes" if started > 1 else ""
    now = f", made by {count} process{'es' if count > 1 else ''}" if count != started else ""
    return f"{factors}{many} = {config.batch_size * run.pace.passes} samples a step{now}"


def _ranks(run: Run) -> str:
    return f"ranks of {run.rank_map.path.name}" if run.rank_map else f"rank {run.config.rank}"


def _after_epoch(run: Run, emit: Emit, listen: Listener) -> bool:
    listen(run.state, is_last=False)
    if not run.held_out:
        return True
    _validate(run, emit)
    return not run.state.is_out_of_patience(run.config.early_stop_patience)


def _validate(run: Run, emit: Emit) -> None:
    state = run.state
    found = held_out_loss(run.stepper.model, run.held_out, run.law, processes=run.processes)
    # The untrained model's loss is a reading to compare with, not a result to keep.
    is_best = state.step > 0 and found.mean < state.best_loss
    folder = run.output_dir / f"{run.run_name}_best" if is_best and run.config.save_best else None
    if folder and run.processes.is_first:
        # Before the state says so, and before a sink can fail: no later epoch would save it.
        save_adapter(folder, run.adapter, current_values(run.adapter), about=_about(run))
    if is_best:
        state.best_loss, state.epochs_since_best = found.mean, 0
    elif state.step > 0:
        state.epochs_since_best += 1
    emit(
        Validated(
            step=state.step,
            epoch=state.epoch,
            loss=found.mean,
            standard_error=found.standard_error,
            bands=found.bands,
            is_best=is_best,
        )
    )
    if folder and run.processes.is_first:
        emit(AdapterSaved(folder=folder, kind="best"))


def _save(run: Run, emit: Emit) -> None:
    """Write a checkpoint, if this is the process that writes; the others go on, and wait where they next meet."""
    if run.processes.is_first:
        folder = _write_checkpoint(run)
        emit(CheckpointSaved(folder=folder, step=run.state.step, epoch=run.state.epoch))


def _write_checkpoint(run: Run) -> Path:
    state = run.state
    name = checkpoint_name(epoch=state.epoch, step=state.step, is_epoch_end=state.batch == 0)
    folder = run.output_dir / CHECKPOINTS / name
    snapshot = Snapshot(
        state=state.as_dict(),
        adapter=current_values(run.adapter),
        optimizer=run.stepper.optimizer.state_dict(),
        scaler=run.stepper.scaler.state_dict(),
        ema=run.ema.values() if run.ema else {},
        identity=dict(run.identity),
    )
    save_checkpoint(folder, snapshot, run.adapter, config_text=run.config_text, about=_about(run))
    return folder


def _save_final(run: Run, emit: Emit) -> None:
    if not run.processes.is_first:
        return
    folder = run.output_dir / run.run_name
    save_adapter(folder, run.adapter, current_values(run.adapter), about=_about(run))
    emit(AdapterSaved(folder=folder))
    if run.ema:
        folder = run.output_dir / f"{run.run_name}_ema"
        save_adapter(folder, run.adapter, run.ema.values(), about=_about(run))
        emit(AdapterSaved(folder=folder, kind="ema"))


def _about(run: Run) -> Mapping[str, str]:
    """Say in the adapter's header where it comes from."""
    facts = {
        "version": run.version,
        "recipe": str(run.recipe),
        "model_variant": run.checkpoint.variant,
        "decoder": run.identity["decoder"],
        "step": run.state.step,
        "epoch": run.state.epoch,
    }
    return {"sidestep": json.dumps(facts)}


@contextmanager
def _saving_on_failure(run: Run, emit: Emit) -> Iterator[None]:
    """Keep the work of a run that cannot go on: its weights are as they were before the step that failed."""
    try:
        with full_memory_alike():
            yield
    except torch.OutOfMemoryError as error:
        _keep(run, emit)
        hint = takes_less(run.config, run.longest_seconds) + _saved(run)
        raise NoRoomError(f"The {run.stepper.model.device.type} device is out of memory.", hint=hint) from error
    except RuntimeError as error:
        # torch names a full main memory by its allocator alone.
        if "DefaultCPUAllocator" not in str(error):
            raise
        _keep(run, emit)
        hint = takes_less(run.config, run.longest_seconds) + _saved(run)
        raise NoRoomError("The computer is out of memory.", hint=hint) from error
    except NonFiniteError as error:
        _keep(run, emit)
        if run.state.step > 0:
            error.hint += " Going on with this run leads to the same step; a new one takes over what was done with "
            error.hint += "--init-from and a checkpoint's folder."
        raise
    except (DataError, ReadingError, ElsewhereError, LostProcessError) as error:
        _keep(run, emit)
        error.hint += _saved(run)
        raise
    except RunError as error:
        # A file that is reported to could not be written, maybe on another disk; or a checkpoint.
        if _is_kept(run):
            error.hint += _saved(run)
        raise
    finally:
        run.batches.close()


def _keep(run: Run, emit: Emit) -> None:
    if run.state.step > run.first_step:
        _save(run, emit)


def _is_kept(run: Run) -> bool:
    """Save where something could not be written; say whether this could be. No sink is told: one of them has failed."""
    if run.state.step > run.first_step and run.processes.is_first:
        try:
            _write_checkpoint(run)
        except RunError as error:
            logger.warning("What was done since the last checkpoint is not saved: %s", error)
            return False
    return True


def _saved(run: Run) -> str:
    # An indented line is left in one piece on the screen.
    return f" What was done is saved:\n  {resume_command(run)}" if run.state.step > run.first_step else ""
