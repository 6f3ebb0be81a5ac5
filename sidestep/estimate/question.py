"""What every method of estimating works with: the frozen decoder, its layers, the songs and the draws."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sidestep.config.recipe import Recipe, resolve_recipe
from sidestep.config.tasks import EstimateConfig, focus_range, run_of
from sidestep.estimate.draws import Asked, halves, tasks
from sidestep.estimate.taps import Shape
from sidestep.events import Emit, TrackDone
from sidestep.model.attention import use_processors
from sidestep.model.capabilities import check_training
from sidestep.model.checkpoint import Checkpoint
from sidestep.model.device import choose_device, choose_dtype, reset_memory_peak
from sidestep.model.loading import load_null_condition
from sidestep.model.names import to_diffusers
from sidestep.preprocess.tensors import FRAMES_PER_SECOND
from sidestep.training.accelerate import can_capture
from sidestep.training.adapters.base import target_names
from sidestep.training.assemble import common_rows
from sidestep.training.batches import Plan, Song, plan_batches
from sidestep.training.build import frozen_decoder
from sidestep.training.objective import MinSnr, Task
from sidestep.training.passes import Model
from sidestep.training.songs import find_songs, hold_out
from sidestep.training.timesteps import sampler_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The parts of an estimate. `songs` are all of the dataset; those held out are in none of the draws."""

    config: EstimateConfig
    recipe: Recipe
    songs: Sequence[Song]
    plan: Plan
    first: Sequence[Sequence[Asked]]
    second: Sequence[Sequence[Asked]]
    model: Model
    layers: Mapping[str, nn.Module]
    shapes: Mapping[str, Shape]
    emit: Emit

    def tasks(self, batches: Sequence[Sequence[Asked]]) -> Iterator[tuple[list[int], Task]]:
        """Make the tasks of these batches."""
        rows = common_rows(self.plan) if can_capture(self.model.device) else 0
        return tasks(batches, self.plan, cfg_ratio=self.recipe.cfg_ratio, rows=rows)

    def losses(self, task: Task) -> Tensor:
        """Return the losses as they count in training, [B]; the task is on the model's device."""
        return self.model.weighted(self.model.losses(task), task)

    def report(self, songs: Sequence[int]) -> None:
        """Tell that a batch of these songs is done."""
        for song in songs:
            path, frames = self.plan.songs[song].path, self.plan.songs[song].frames
            self.emit(TrackDone(name=path.stem, seconds=frames / FRAMES_PER_SECOND))


def prepare(config: EstimateConfig, *, checkpoint: Checkpoint, emit: Emit) -> Question:
    """Check the songs, lay out the draws, load the decoder; errors are those of training."""
    device = choose_device(config.device)
    dtype = choose_dtype(config.precision, device)
    run = run_of(config)
    check_training(optimizer_type=run.optimizer_type, quantize=run.quantize, device=device)
    recipe = resolve_recipe(run, name=config.recipe, is_turbo=checkpoint.is_turbo)
    songs = find_songs(config.dataset_dir, checkpoint, emit=emit)
    plan = plan_batches(
        hold_out(songs, config.val_split)[0],
        batch_size=config.batch_size,
        chunk_seconds=config.chunk_duration,
        repeats=1,
        seed=config.seed,
        few_lengths=can_capture(device),
    )
    law = sampler_of(recipe, mu=checkpoint.timestep_mu, sigma=checkpoint.timestep_sigma)
    first, second = halves(
        plan, law, batches=config.estimate_batches, within=focus_range(config.timestep_focus), seed=config.seed
    )
    reset_memory_peak(device)
    decoder = frozen_decoder(checkpoint, quantize=config.quantize, device=device, dtype=dtype)
    model = Model(
        decoder=decoder,
        cross_attention=use_processors(decoder, device=device, dtype=dtype),
        null_condition=load_null_condition(checkpoint, device=device, dtype=dtype),
        weighting=MinSnr.normed(recipe.snr_gamma, law) if recipe.loss_weighting == "min_snr" else None,
        recompute=[config.gradient_checkpointing] * len(decoder.layers),
        dropout_seed=torch.zeros((), dtype=torch.int32, device=device),
        device=device,
        dtype=dtype,
    )
    names = target_names(
        len(decoder.layers), attention_type=config.attention_type, target_modules=config.target_modules
    )
    layers: dict[str, Any] = {name: decoder.get_submodule(to_diffusers(name)) for name in names}
    return Question(
        config=config,
        recipe=recipe,
        songs=songs,
        plan=plan,
        first=first,
        second=second,
        model=model,
        layers=layers,
        shapes={name: (layer.out_features, layer.in_features) for name, layer in layers.items()},
        emit=emit,
    )
