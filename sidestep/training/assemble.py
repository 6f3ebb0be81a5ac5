"""TrainConfig -> the parts of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sidestep.config.presets import run_config_text
from sidestep.config.processes import ALONE, Processes
from sidestep.config.rank_map import RANK_MAP_FILE, MapFile, open_rank_map, recipe_fingerprint
from sidestep.config.recipe import (
    PRODIGY_LEARNING_RATE,
    TURBO_SHIFT,
    Recipe,
    learning_rate_of,
    resolve_recipe,
    schedule_of,
)
from sidestep.config.runs import holds_adapter, resume_candidates
from sidestep.config.settings import settings_of, values_of
from sidestep.config.train import TrainConfig
from sidestep.errors import ConfigError, DataError, ModelError
from sidestep.events import Emit, Notice
from sidestep.model.capabilities import capabilities
from sidestep.model.checkpoint import Checkpoint, decoder_fingerprint
from sidestep.model.device import choose_dtype
from sidestep.preprocess.tensors import FRAMES_PER_SECOND
from sidestep.training.accelerate import can_capture, check_device, compile_blocks, wants_compile
from sidestep.training.adapters.base import Adapter, load_values
from sidestep.training.adapters.lora import ranks_in
from sidestep.training.batches import Batches, Draws, Plan, Song, plan_batches
from sidestep.training.build import build_stepper
from sidestep.training.checkpoints import Snapshot, newest_good
from sidestep.training.ema import Ema
from sidestep.training.loop import Pace
from sidestep.training.processes import own_device
from sidestep.training.songs import dataset_fingerprint, find_songs, hold_out
from sidestep.training.state import TrainState
from sidestep.training.step import Stepper
from sidestep.training.timesteps import Continuous, Discrete, Sampler, sampler_of

# How an optimizer computes depends on the device; a run may go on on another one.
_OF_THE_MACHINE = frozenset({"fused", "foreach", "capturable"})


@dataclass(slots=True, kw_only=True)
class Run:
    """A run put together: everything the loop and the saving need."""

    config: TrainConfig
    config_text: str
    recipe: Recipe
    checkpoint: Checkpoint
    output_dir: Path
    run_name: str
    version: str
    held_out: list[Song]
    law: Sampler
    """The law of timesteps the model itself was trained with; the held-out loss is measured on it."""
    pace: Pace
    batches: Batches
    adapter: Adapter
    stepper: Stepper
    rank_map: MapFile | None
    ema: Ema | None
    state: TrainState
    first_step: int
    identity: Mapping[str, str]
    processes: Processes

    @property
    def longest_seconds(self) -> float:
        """Return the length of the longest sample, in seconds."""
        return max(group.frames for group in self.batches.plan.groups) / FRAMES_PER_SECOND


def assemble(
    config: TrainConfig,
    *,
    recipe_name: str,
    checkpoint: Checkpoint,
    dataset_dir: Path,
    output_dir: Path,
    run_name: str,
    version: str,
    emit: Emit,
    processes: Processes = ALONE,
) -> Run:
    """Put a run together: data checked, decoder loaded, adapter attached, resumed where that is asked for."""
    device = own_device(config.device, processes)
    dtype = choose_dtype(config.precision, device)
    check_device(config, device)
    recipe = _recipe(config, recipe_name, checkpoint, emit)
    songs = find_songs(dataset_dir, checkpoint, emit=emit, num_workers=config.num_workers)
    trained_on, held_out = hold_out(songs, config.val_split)
    plan = _plan(config, trained_on, few_lengths=can_capture(device), emit=emit)
    identity = {"decoder": decoder_fingerprint(checkpoint), "songs": dataset_fingerprint(songs)}
    snapshot = _snapshot(config, identity, emit)
    rank_map = _rank_map(config, identity, recipe, snapshot)
    state = TrainState(**snapshot.state) if snapshot else TrainState(processes=processes.count)  # pyright: ignore[reportArgumentType]
    pace = _pace(config, plan, state, emit)
    _check_left(config, pace, state, [output_dir / run_name, output_dir / f"{run_name}_ema"])
    processes.must_agree(
        "settings, model, songs and checkpoint", repr((_common(config), rank_map and rank_map.content, identity, state))
    )
    sampler = sampler_of(recipe, mu=checkpoint.timestep_mu, sigma=checkpoint.timestep_sigma)
    adapter, stepper = build_stepper(
        config, recipe, checkpoint, rank_map, processes, sampler=sampler, device=device, dtype=dtype, emit=emit
    )
    _begin(snapshot, adapter, stepper)
    passes = (pace.total_steps - state.step) * -(-pace.passes // processes.count)
    music_seconds = passes * plan.mean_frames * config.batch_size / FRAMES_PER_SECOND
    _compile(config, stepper, plan, device, music_seconds=music_seconds, emit=emit)
    return Run(
        config=config,
        config_text=_text(config, output_dir, recipe_name, version, recipe),
        recipe=recipe,
        checkpoint=checkpoint,
        output_dir=output_dir,
        run_name=run_name,
        version=version,
        held_out=held_out,
        law=_law(checkpoint),
        pace=pace,
        batches=_batches(config, plan, sampler, recipe, pace, device=device, dtype=dtype, processes=processes),
        adapter=adapter,
        stepper=stepper,
        rank_map=rank_map,
        ema=_ema(config, adapter, snapshot),
        state=state,
        first_step=state.step,
        identity=identity,
        processes=processes,
    )


def _recipe(config: TrainConfig, name: str, checkpoint: Checkpoint, emit: Emit) -> Recipe:
    recipe = resolve_recipe(config, name=name, is_turbo=checkpoint.is_turbo)
    if config.shift is not None and config.timestep_mode == "auto" and recipe.timestep_mode == "continuous":
        emit(Notice(text=f"--shift has no effect here: {checkpoint.variant} trains on continuous timesteps."))
    return recipe


def _plan(config: TrainConfig, songs: Sequence[Song], *, few_lengths: bool, emit: Emit) -> Plan:
    plan = plan_batches(
        songs,
        batch_size=config.batch_size,
        chunk_seconds=config.chunk_duration,
        repeats=config.dataset_repeats,
        seed=config.seed,
        few_lengths=few_lengths,
    )
    _report_groups(plan, emit)
    return plan


def _common(config: TrainConfig) -> dict[str, Any]:
    """Return what must be the same in all processes: where things lie may differ from machine to machine."""
    own = {setting.name for setting in settings_of(TrainConfig) if setting.kind is Path} | {"device"}
    return {name: value for name, value in values_of(config).items() if name not in own}


def _text(config: TrainConfig, output_dir: Path, recipe_name: str, version: str, recipe: Recipe) -> str:
    """Return config.json. It names the rank map that the run keeps: the one it was given may change or go."""
    kept = replace(config, rank_map=config.rank_map and output_dir / RANK_MAP_FILE)
    return run_config_text(kept, recipe=recipe_name, version=version, objective=str(recipe))


def _rank_map(
    config: TrainConfig, identity: Mapping[str, str], recipe: Recipe, snapshot: Snapshot | None
) -> MapFile | None:
    """Read the run's rank map, if it has one; a map that was made for another run is refused."""
    if config.rank_map is None:
        return None
    found = open_rank_map(config.rank_map)
    if snapshot and ranks_in(snapshot.adapter) != found.rank_map.ranks:
        raise DataError(
            f"{found.path} is not the rank map that this run was started with.",
            hint="Give that one, wherever it is now: --rank-map FILE.",
        )
    found.rank_map.check_fits(
        model=identity["decoder"], dataset=identity["songs"], recipe=recipe_fingerprint(recipe), source=found.path
    )
    return found


def _compile(
    config: TrainConfig, stepper: Stepper, plan: Plan, device: torch.device, *, music_seconds: float, emit: Emit
) -> None:
    model = stepper.model
    recomputed = sum(model.recompute) / len(model.recompute)
    if wants_compile(
        config.compile, device, music_seconds=music_seconds, recomputed=recomputed, kinds=model.kinds, emit=emit
    ):
        compile_blocks(model, any_length=len(plan.groups) > 1)


def _batches(
    config: TrainConfig,
    plan: Plan,
    sampler: Sampler,
    recipe: Recipe,
    pace: Pace,
    *,
    device: torch.device,
    dtype: torch.dtype,
    processes: Processes,
) -> Batches:
    return Batches(
        plan=plan,
        draws=Draws(plan.songs, sampler, recipe.cfg_ratio),
        num_workers=config.num_workers,
        pin_memory=config.pin_memory and capabilities(device).pins_memory,
        prefetch_factor=config.prefetch_factor,
        persistent_workers=config.persistent_workers,
        rows=common_rows(plan) if can_capture(device) else 0,
        processes=processes,
        last_epoch=(pace.total_steps - 1) // pace.steps_per_epoch,
    )


def common_rows(plan: Plan) -> int:
    """Return to how many rows all prompts are padded: the longest's, to a multiple of 8 where a mask is needed."""
    rows = {song.rows for song in plan.songs}
    return max(rows) if len(rows) == 1 else -(-max(rows) // 8) * 8


def _pace(config: TrainConfig, plan: Plan, state: TrainState, emit: Emit) -> Pace:
    """Decide how long the run goes."""
    passes = config.gradient_accumulation * state.processes
    steps_per_epoch = -(-plan.batches_per_epoch // passes)
    total_steps = config.max_steps or config.epochs * steps_per_epoch
    schedule = schedule_of(config)
    if schedule != config.scheduler_type:
        emit(Notice(text=f"{config.optimizer_type} sets its own pace: the schedule is {schedule}."))
    if config.optimizer_type == "prodigy" and learning_rate_of(config) < PRODIGY_LEARNING_RATE / 10:
        emit(
            Notice(
                text=f"Prodigy finds the step size itself and multiplies it by --lr: with {config.learning_rate:g} the "
                f"adapter hardly learns. Usual is {PRODIGY_LEARNING_RATE:g}.",
                level="warning",
            )
        )
    if schedule != "constant" and config.warmup_steps >= total_steps:
        way_out = "Raise --epochs (or --max-steps)." if config.resume_from else "Set --warmup-steps lower."
        emit(
            Notice(
                text=f"The warm-up takes {config.warmup_steps} steps and the run has {total_steps}: "
                f"the learning rate never gets to its full value. {way_out}",
                level="warning",
            )
        )
    return Pace(
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        passes=passes,
        lr=learning_rate_of(config),
        schedule=schedule,
        warmup_steps=config.warmup_steps,
        seed=config.seed,
        save_every=config.save_every,
        log_every=config.log_every,
        log_heavy_every=config.log_heavy_every,
    )


def _check_left(config: TrainConfig, pace: Pace, state: TrainState, adapters: Sequence[Path]) -> None:
    """Raise ConfigError when a resumed run has nothing left to do; it may have ended before its adapters were saved.

    `adapters`: the folders of the final one and of its average.
    """
    if not all(holds_adapter(folder) for folder in adapters[: 1 + bool(config.ema_decay)]):
        return
    if state.is_out_of_patience(config.early_stop_patience):
        raise ConfigError(
            f"There is nothing left to do: {state.epochs_since_best} epochs brought no better held-out loss.",
            hint="Raise --early-stop-patience (0 never stops) to train on, and --epochs, if they are done as well.",
        )
    if state.step >= pace.total_steps:
        raise ConfigError(
            f"There is nothing left to do: {state.step} of {pace.total_steps} steps are done.",
            hint="Raise --epochs (or --max-steps) to train on. The folder of the checkpoint holds its adapter too.",
        )


def _law(checkpoint: Checkpoint) -> Sampler:
    if checkpoint.is_turbo:
        return Discrete(TURBO_SHIFT)
    return Continuous(checkpoint.timestep_mu, checkpoint.timestep_sigma)


def _ema(config: TrainConfig, adapter: Adapter, snapshot: Snapshot | None) -> Ema | None:
    if not config.ema_decay:
        return None
    return Ema.of(adapter.parameters, decay=config.ema_decay, average=snapshot.ema if snapshot else None)


def _snapshot(config: TrainConfig, identity: Mapping[str, str], emit: Emit) -> Snapshot | None:
    """Read the checkpoint to go on from; ModelError when its songs or its model were others."""
    if config.resume_from is None:
        return None
    folder, snapshot, problems = newest_good(resume_candidates(config.resume_from))
    for problem in problems:
        emit(Notice(text=f"{problem.message} Going on from {folder.name}, the newest good one.", level="warning"))
    names = {"songs": "songs (or other lengths or words of them)", "decoder": "model"}
    for key, value in identity.items():
        if snapshot.identity.get(key) != value:
            raise ModelError(
                f"{folder} was trained with other {names[key]}.",
                hint="Resume with what that run was started with, or start a new run with --init-from.",
            )
    return snapshot


def _begin(snapshot: Snapshot | None, adapter: Adapter, stepper: Stepper) -> None:
    """Go on from a checkpoint, where there is one; all processes begin with the same weights."""
    if snapshot:
        _restore(snapshot, adapter, stepper)
    for parameter in adapter.parameters.values():
        stepper.processes.copy_first(parameter.detach())


def _restore(snapshot: Snapshot, adapter: Adapter, stepper: Stepper) -> None:
    load_values(adapter, snapshot.adapter, source="The checkpoint")
    optimizer = stepper.optimizer
    machine = [{key: group[key] for key in _OF_THE_MACHINE & group.keys()} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(dict(snapshot.optimizer))
    except (ValueError, KeyError) as error:
        raise ModelError(f"The checkpoint's optimizer state does not fit: {error}.") from error
    for group, own in zip(optimizer.param_groups, machine, strict=True):
        group.update(own)
    if snapshot.scaler and stepper.scaler.is_enabled():
        stepper.scaler.load_state_dict(dict(snapshot.scaler))


def _report_groups(plan: Plan, emit: Emit) -> None:
    """Say how songs were grouped by length, where that is not one whole song a batch."""
    songs = plan.songs
    whole = [group for group in plan.groups if group.frames != plan.chunk_frames]
    left_out = [songs[at].frames - group.frames for group in whole for at in group.songs]
    cropped = sum(frames > 0 for frames in left_out)
    cut = f"{cropped} cropped, by {max(left_out) / FRAMES_PER_SECOND:.1f} s at most" if cropped else ""
    if plan.chunk_frames:
        short = f"; {len(left_out)} shorter ones whole{cut and f', {cut}'}" if left_out else ""
        seconds = plan.chunk_frames / FRAMES_PER_SECOND
        emit(Notice(text=f"{len(songs) - len(left_out)} songs in windows of {seconds:g} s{short}."))
    elif plan.batch_size > 1:
        alone = sum(len(group.songs) < plan.batch_size for group in plan.groups)
        small = f"; {alone} groups do not fill a batch (--chunk-duration makes lengths equal)" if alone else ""
        text = f"{len(songs)} songs in {len(plan.groups)} groups of equal length for batches of {plan.batch_size}"
        emit(Notice(text=f"{text}{cut and f'; {cut}'}{small}."))
    elif cropped:
        emit(Notice(text=f"Of {len(songs)} songs {cut}: on a GPU each length takes time to get ready."))
