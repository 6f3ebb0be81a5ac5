"""The proof: a uniform adapter, the map's and EVA's trained alike at equal size, compared on songs none of them saw."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from sidestep.config.rank_map import RankMap, read_rank_map, write_rank_map
from sidestep.config.tasks import EstimateConfig, run_of
from sidestep.config.train import TrainConfig
from sidestep.estimate.allocation import uniform_rank
from sidestep.estimate.division import uniform_names
from sidestep.estimate.run import estimate
from sidestep.events import Emit, RunDone, RunStarted
from sidestep.model.checkpoint import Checkpoint
from sidestep.training.assemble import Run, assemble
from sidestep.training.loop import Hooks, train
from sidestep.training.validation import HeldOutLoss, held_out_loss, standard_error

WARM_UP_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What became of one adapter: its size, and the held-out loss before and after so many steps."""

    name: str
    parameters: int
    before: HeldOutLoss
    after: HeldOutLoss

    def gain_over(self, other: "Trained") -> tuple[float, float | None]:
        """Return by how much the held-out loss is lower than the other's, and the standard error over songs."""
        differences = [theirs - ours for ours, theirs in zip(self.after.songs, other.after.songs, strict=True)]
        return sum(differences) / len(differences), standard_error(differences)


def verify(
    config: EstimateConfig, rank_map: Path, *, checkpoint: Checkpoint, version: str, emit: Emit
) -> list[Trained]:
    """Train each adapter for `verify_steps` with the same songs, noise and timesteps; the uniform one comes first.

    Nothing of it is kept on disk.
    """
    with tempfile.TemporaryDirectory(prefix="sidestep-verify-") as temporary:
        folder = Path(temporary)
        maps: list[tuple[str, Path | None]] = [("uniform", None), (config.method, rank_map)]
        if config.method != "eva":
            maps.append(("eva", _eva_map(config, folder / "eva.json", checkpoint, version, emit)))
        settings = _settings(config, read_rank_map(rank_map))
        return [
            _train(
                replace(settings, rank_map=path),
                name,
                folder,
                recipe=config.recipe,
                checkpoint=checkpoint,
                dataset=config.dataset_dir,
                emit=emit,
            )
            for name, path in maps
        ]


def _eva_map(config: EstimateConfig, path: Path, checkpoint: Checkpoint, version: str, emit: Emit) -> Path:
    found = estimate(replace(config, method="eva"), checkpoint=checkpoint, version=version, emit=emit)
    write_rank_map(path, found.rank_map)
    return path


def _train(
    config: TrainConfig, name: str, folder: Path, *, recipe: str, checkpoint: Checkpoint, dataset: Path, emit: Emit
) -> Trained:
    run = assemble(
        config,
        recipe_name=recipe,
        checkpoint=checkpoint,
        dataset_dir=dataset,
        output_dir=folder,
        run_name=name,
        version="",
        emit=emit,
    )
    before = held_out_loss(run.stepper.model, run.held_out, run.law)
    emit(_started(run, name))
    hooks = Hooks(save=lambda: None, after_step=lambda: None, after_epoch=lambda: True, stop_requested=lambda: False)
    train(run.state, stepper=run.stepper, batches=run.batches, pace=run.pace, hooks=hooks, emit=emit)
    after = held_out_loss(run.stepper.model, run.held_out, run.law)
    emit(RunDone(step=run.state.step, epoch=run.state.epoch, reason="finished"))
    return Trained(name=name, parameters=_size(run), before=before, after=after)


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


def _started(run: Run, name: str) -> RunStarted:
    pace = run.pace
    return RunStarted(
        recipe=f"Verifying: {name}",
        facts={"Parameters": f"{_size(run):,}", "Modules": str(len(run.adapter.modules))},
        epochs=-(-pace.total_steps // pace.steps_per_epoch),
        steps=pace.total_steps,
        steps_per_epoch=pace.steps_per_epoch,
        first_step=0,
        output_dir=run.output_dir,
    )


def _size(run: Run) -> int:
    return sum(parameter.numel() for parameter in run.adapter.parameters.values())
