"""The proof: a uniform adapter, the map's and EVA's trained alike at equal size, compared on songs none of them saw."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sidestep.config.rank_map import RankMap, read_rank_map, write_rank_map
from sidestep.config.tasks import EstimateConfig, run_of
from sidestep.config.train import TrainConfig
from sidestep.estimate.allocation import uniform_rank
from sidestep.estimate.division import uniform_names
from sidestep.estimate.run import estimate
from sidestep.estimate.scores import Array
from sidestep.events import Emit, RunDone, RunStarted
from sidestep.model.checkpoint import Checkpoint
from sidestep.training.assemble import Run, assemble
from sidestep.training.loop import Hooks, train
from sidestep.training.validation import HeldOutLoss, held_out_loss, standard_error

WARM_UP_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What became of one kind of adapter: its size, the held-out loss before training, and after each of the runs."""

    name: str
    parameters: int
    before: HeldOutLoss
    after: Sequence[HeldOutLoss]

    @property
    def loss(self) -> float:
        """Return the mean held-out loss after training."""
        return float(self._losses().mean())

    @property
    def error(self) -> float | None:
        """Return the standard error of that loss, over runs and songs; None for a single run or song."""
        return _error(self._losses())

    def gain_over(self, other: "Trained") -> tuple[float, float | None]:
        """Return by how much the held-out loss is lower than the other's, pair by pair, and the standard error."""
        differences = other._losses() - self._losses()
        return float(differences.mean()), _error(differences)

    def _losses(self) -> Array:
        """Return [runs, songs]."""
        return np.array([found.songs for found in self.after])


def verify(
    config: EstimateConfig, rank_map: Path, *, checkpoint: Checkpoint, version: str, emit: Emit
) -> list[Trained]:
    """Train each adapter for `verify_steps`, `verify_runs` times; the uniform one comes first.

    In the same run they meet the same songs, noise and timesteps. Nothing of it is kept on disk.
    """
    with tempfile.TemporaryDirectory(prefix="sidestep-verify-") as temporary:
        folder = Path(temporary)
        maps: list[tuple[str, Path | None]] = [("uniform", None), (config.method, rank_map)]
        if config.method != "eva":
            maps.append(("eva", _eva_map(config, folder / "eva.json", checkpoint, version, emit)))
        settings = _settings(config, read_rank_map(rank_map))
        return [
            _runs(replace(settings, rank_map=path), name, folder, config=config, checkpoint=checkpoint, emit=emit)
            for name, path in maps
        ]


def _eva_map(config: EstimateConfig, path: Path, checkpoint: Checkpoint, version: str, emit: Emit) -> Path:
    found = estimate(replace(config, method="eva"), checkpoint=checkpoint, version=version, emit=emit)
    write_rank_map(path, found.rank_map)
    return path


def _runs(
    settings: TrainConfig, name: str, folder: Path, *, config: EstimateConfig, checkpoint: Checkpoint, emit: Emit
) -> Trained:
    runs = []
    for number in range(config.verify_runs):
        seeded = replace(settings, seed=settings.seed + number)
        title = f"{name}, run {number + 1} of {config.verify_runs}"
        runs.append(_train(seeded, title, folder, config=config, checkpoint=checkpoint, emit=emit))
    (size,) = {parameters for parameters, _, _ in runs}
    return Trained(name=name, parameters=size, before=runs[0][1], after=[after for _, _, after in runs])


def _train(
    settings: TrainConfig, title: str, folder: Path, *, config: EstimateConfig, checkpoint: Checkpoint, emit: Emit
) -> tuple[int, HeldOutLoss, HeldOutLoss]:
    """Train once; return the adapter's size and the held-out loss before and after."""
    run = assemble(
        settings,
        recipe_name=config.recipe,
        checkpoint=checkpoint,
        dataset_dir=config.dataset_dir,
        output_dir=folder,
        run_name=title,
        version="",
        emit=emit,
    )
    before = held_out_loss(run.stepper.model, run.held_out, run.law)
    emit(_started(run, title))
    hooks = Hooks(save=lambda: None, after_step=lambda: None, after_epoch=lambda: True, stop_requested=lambda: False)
    train(run.state, stepper=run.stepper, batches=run.batches, pace=run.pace, hooks=hooks, emit=emit)
    after = held_out_loss(run.stepper.model, run.held_out, run.law)
    emit(RunDone(step=run.state.step, epoch=run.state.epoch, reason="finished"))
    return _size(run), before, after


def _settings(config: EstimateConfig, rank_map: RankMap) -> TrainConfig:
    """Return the run's settings with a uniform adapter of the budget's size."""
    run = run_of(config)
    costs = {module.name: module.cost for module in rank_map.modules}
    rank = uniform_rank([costs[name] for name in uniform_names(config, costs)], budget=rank_map.budget.parameters)
    return replace(
        run,
        rank=rank,
        max_steps=config.verify_steps,
        warmup_steps=round(config.verify_steps * WARM_UP_SHARE),
        num_workers=0,
        log_heavy_every=0,
    )


def _started(run: Run, title: str) -> RunStarted:
    pace = run.pace
    return RunStarted(
        recipe=f"Verifying: {title}",
        facts={"Parameters": f"{_size(run):,}", "Modules": str(len(run.adapter.modules))},
        epochs=-(-pace.total_steps // pace.steps_per_epoch),
        steps=pace.total_steps,
        steps_per_epoch=pace.steps_per_epoch,
        first_step=0,
        output_dir=run.output_dir,
    )


def _error(values: Array) -> float | None:
    """Return the standard error of the mean of [runs, songs], both taken as samples of what there could be."""
    over_runs, over_songs = (standard_error(values.mean(axis).tolist()) for axis in (1, 0))
    return None if over_runs is None or over_songs is None else math.hypot(over_runs, over_songs)


def _size(run: Run) -> int:
    return sum(parameter.numel() for parameter in run.adapter.parameters.values())
