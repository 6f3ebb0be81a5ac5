"""One optimizer step: the mean over its samples, however they are divided; and what stops it."""

import math
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sidestep.config.recipe import resolve_recipe
from sidestep.config.runs import STATE_FILE
from sidestep.errors import DataError, NonFiniteError, ReadingError, RunError
from sidestep.events import CheckpointSaved, EpochDone, Event, LayerGradients, Metrics
from sidestep.model.checkpoint import Checkpoint
from sidestep.preprocess.tensors import Sample, read_sample, write_sample
from sidestep.training.assemble import Run
from sidestep.training.batches import Batch
from sidestep.training.objective import MinSnr
from sidestep.training.run import carry_out
from sidestep.training.timesteps import Continuous, Discrete, sampler_of
from tests.torch.tiny import adapter_tensors, assert_identical, prepare, steps_of, tiny_config, train, write_songs

PROMPTS = [(9,), (9, 14, 6, 11)]
SAME_OR_OTHER = pytest.mark.parametrize("rows", PROMPTS, ids=["prompts of one length", "prompts of other lengths"])


def gradients(run: Run, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Make a step with a learning rate of zero and give the gradients it found, not clipped."""
    run.stepper(batches, lr=0.0, seeds=range(len(batches)))
    return {name: parameter.grad.clone() for name, parameter in run.adapter.parameters.items()}  # pyright: ignore


def lively(run: Run) -> Run:
    """Give the adapter's zeros some weight, so that every parameter has a gradient."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in run.adapter.parameters.values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return run


def losses(run: Run, batch: Batch) -> Tensor:
    with torch.no_grad():
        return run.stepper.model.losses(batch.task)


@SAME_OR_OTHER
def test_four_passes_of_one_sample_train_like_one_pass_of_four(tmp_path: Path, base: Checkpoint, rows: tuple[int, ...]):
    songs = write_songs(tmp_path / "songs", base, (40,) * 8, rows=rows)
    config = tiny_config(cfg_ratio=0.3, epochs=3)
    four = train(replace(config, batch_size=4), base, songs, tmp_path / "four")
    single = train(replace(config, gradient_accumulation=4), base, songs, tmp_path / "single")
    assert steps_of(four.events) == steps_of(single.events) == [1, 2, 3, 4, 5, 6]
    assert single.losses == pytest.approx(four.losses, rel=1e-5)
    for name, weight in four.weights.items():
        torch.testing.assert_close(single.weights[name], weight, atol=2e-5, rtol=1e-4)


@SAME_OR_OTHER
def test_a_batch_has_the_losses_and_the_gradient_of_its_samples(
    tmp_path: Path, base: Checkpoint, rows: tuple[int, ...]
):
    songs = write_songs(tmp_path / "songs", base, (41,) * 4, rows=rows)
    config = tiny_config(cfg_ratio=0.5, max_grad_norm=0.0, seed=1)
    together = lively(prepare(replace(config, batch_size=4), base, songs, tmp_path / "run"))
    apart = lively(prepare(config, base, songs, tmp_path / "run"))
    (batch,), singles = list(together.batches.epoch(0)), list(apart.batches.epoch(0))
    assert 0 < batch.task.is_dropped_B.sum() < 4
    torch.testing.assert_close(losses(together, batch), torch.cat([losses(apart, one) for one in singles]))
    found, expected = gradients(together, [batch]), gradients(apart, singles)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)
    # Each sample alone, too: the mean of four steps' gradients.
    alone = [gradients(apart, [one]) for one in singles]
    for name, gradient in expected.items():
        torch.testing.assert_close(sum(one[name] for one in alone) / 4, gradient, atol=1e-6, rtol=1e-4)


def test_a_padding_row_of_a_shorter_prompt_changes_nothing(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (40, 40), rows=(9, 14))
    run = lively(prepare(tiny_config(batch_size=2, cfg_ratio=0.0), base, songs, tmp_path / "run"))
    (batch,) = run.batches.epoch(0)
    task = batch.task
    assert task.rows_BL is not None
    before = run.stepper.model.losses(task)
    filled = torch.where(task.rows_BL[:, :, None], task.condition_BLD, 100.0)
    after = run.stepper.model.losses(replace(task, condition_BLD=filled))
    assert torch.equal(before, after)
    unmasked = run.stepper.model.losses(replace(task, condition_BLD=filled, rows_BL=None))
    assert not torch.allclose(before, unmasked)


def test_the_gradient_is_clipped_to_its_norm_and_reported_as_it_was(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (40,))
    norms, reported = [], []
    for limit in (0.0, 1e-3):
        run = lively(prepare(tiny_config(max_grad_norm=limit), base, songs, tmp_path / "run"))
        (batch,) = run.batches.epoch(0)
        reading = run.stepper([batch], lr=0.0, seeds=[1])
        reported.append(float(reading.values[1]))
        norms.append(torch.cat([p.grad.flatten() for p in run.adapter.parameters.values()]).norm().item())  # pyright: ignore
    assert norms == pytest.approx([reported[0], 1e-3], rel=1e-3)
    assert reported[0] == reported[1] > 1e-3


def test_gradient_checkpointing_computes_every_block_twice_and_gives_the_same_gradients(
    tmp_path: Path, base: Checkpoint
):
    songs = write_songs(tmp_path / "songs", base, (40,))
    found = []
    for is_on, expected in ((True, 2), (False, 1)):
        config = tiny_config(gradient_checkpointing=is_on, dropout=0.2, max_grad_norm=0.0)
        run = lively(prepare(config, base, songs, tmp_path / "run"))
        passes = [0] * 4
        for at, block in enumerate(run.stepper.model.decoder.layers):
            # A part that runs as a module in fused blocks, too.
            block.mlp_norm.register_forward_hook(counter(passes, at))
        (batch,) = run.batches.epoch(0)
        found.append(gradients(run, [batch]))
        assert passes == [expected] * 4
    assert_identical(*found)


def counter(passes: list[int], at: int) -> Any:
    def count(*call: Any) -> None:
        passes[at] += 1

    return count


def test_gradient_checkpointing_is_on_unless_it_is_turned_off():
    from sidestep.config.train import TrainConfig

    assert TrainConfig().gradient_checkpointing


def test_dropout_is_drawn_anew_for_every_batch_and_again_for_the_same_seed(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (40,))
    run = lively(prepare(tiny_config(dropout=0.5), base, songs, tmp_path / "run"))
    (batch,) = run.batches.epoch(0)
    first, again, other = (float(run.stepper([batch], lr=0.0, seeds=[seed]).values[0]) for seed in (1, 1, 2))
    assert first == again
    assert abs(first - other) > 1e-4


def test_layer_gradients_add_up_to_the_whole(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (40,) * 3)
    trained = train(tiny_config(log_heavy_every=2, epochs=2), base, songs, tmp_path / "run")
    layers = trained.all_of(LayerGradients)
    assert [event.step for event in layers] == [2, 4, 6]
    assert list(layers[0].norms) == list(trained.run.adapter.modules)
    norms = {event.step: event.grad_norm for event in trained.all_of(Metrics)}
    for event in layers:
        assert sum(norm**2 for norm in event.norms.values()) ** 0.5 == pytest.approx(norms[event.step], rel=1e-4)


# What stops a run


def spoil(songs: Path, run: Run, *, size: float) -> str:
    """Make the last song of the first epoch so loud that its loss overflows; give its name."""
    song = run.batches.plan.songs[run.batches.plan.epoch(0)[-1][0].song].path
    sample = read_sample(song)
    write_sample(song, Sample(sample.target_latents * size, *(getattr(sample, n) for n in sample.__slots__[1:])))
    return song.stem


def carry_until_error(run: Run, error: type[Exception], **match: str) -> tuple[Any, list[Event]]:
    events: list[Event] = []
    with pytest.raises(error, **match) as caught:
        carry_out(run, emit=events.append, stop_requested=lambda: False)
    return caught.value, events


@pytest.mark.parametrize("log_every", [1, 10])
def test_a_loss_that_is_not_finite_names_its_songs_and_keeps_what_was_done(
    tmp_path: Path, base: Checkpoint, log_every: int
):
    songs = write_songs(tmp_path / "songs", base, (40,) * 4)
    config = tiny_config(log_every=log_every)
    run = prepare(config, base, songs, tmp_path / "run")
    name = spoil(songs, run, size=1e30)
    error, events = carry_until_error(run, NonFiniteError, match="loss is no longer a finite number")
    assert f"songs: {name})" in error.message
    assert "--lr" in error.hint and "--init-from" in error.hint
    assert "--resume-from" not in error.hint, "the same seed leads to the same step"
    (saved,) = [event for event in events if isinstance(event, CheckpointSaved)]
    assert (saved.folder.name, saved.step) == ("epoch_0_step_3", 3)
    for weight in adapter_tensors(saved.folder).values():
        assert weight.isfinite().all()

    good = write_songs(tmp_path / "songs", base, (40,) * 4)
    whole = train(config, base, good, tmp_path / "whole")
    resumed = train(replace(config, resume_from=tmp_path / "run"), base, good, tmp_path / "run")
    assert_identical(resumed.state, whole.state)
    losses = [event.loss for event in whole.all_of(EpochDone)]
    assert [event.loss for event in resumed.all_of(EpochDone)] == losses


def test_the_average_takes_in_nothing_after_a_number_that_is_not_finite_though_it_is_found_later(
    tmp_path: Path, base: Checkpoint
):
    songs = write_songs(tmp_path / "songs", base, (40,) * 4)
    config = tiny_config(ema_decay=0.5, log_every=100, epochs=3)
    good = self_guarding(prepare(config, base, songs, tmp_path / "good"))
    carry_out(good, emit=lambda event: None, stop_requested=lambda: good.state.step == 3)
    run = self_guarding(prepare(config, base, songs, tmp_path / "run"))
    spoil(songs, run, size=1e30)
    _, events = carry_until_error(run, NonFiniteError)
    assert steps_of(events) == [1, 2, 3, 4] and run.state.step == 3
    assert good.ema and run.ema
    assert_identical(run.ema.values(), good.ema.values())
    assert run.state == good.state, "the losses of the steps before it count"


def self_guarding(run: Run) -> Run:
    """Have the optimizer skip by a flag of its own, as on CUDA."""
    stepper = run.stepper
    parameters = list(stepper.parameters.values())
    stepper.optimizer = torch.optim.AdamW(parameters, fused=True)
    stepper.optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    stepper.guards_itself = True
    stepper._not_finite = stepper.optimizer.found_inf  # type: ignore[attr-defined]
    return run


def test_a_gradient_that_is_not_finite_leaves_the_weights_and_the_optimizer_as_they_were(
    tmp_path: Path, base: Checkpoint
):
    songs = write_songs(tmp_path / "songs", base, (40,))
    run = lively(prepare(tiny_config(), base, songs, tmp_path / "run"))
    before = {name: parameter.detach().clone() for name, parameter in run.adapter.parameters.items()}
    first = next(iter(run.adapter.parameters.values()))
    first.register_hook(lambda gradient: gradient * float("inf"))
    _, events = carry_until_error(run, NonFiniteError, match="gradient is no longer a finite number")
    assert_identical({name: parameter.detach() for name, parameter in run.adapter.parameters.items()}, before)
    assert not run.stepper.optimizer.state_dict()["state"]
    # Nothing was done, so nothing is saved.
    assert not [event for event in events if isinstance(event, CheckpointSaved)]


def test_a_gradient_that_overflows_in_float16_costs_its_update_and_not_the_run(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (40,) * 4)
    run = prepare(tiny_config(precision="fp16"), base, songs, tmp_path / "run")
    scaler = run.stepper.scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**26})
    events: list[Event] = []
    assert carry_out(run, emit=events.append, stop_requested=lambda: False) == "finished"
    norms = [event.grad_norm for event in events if isinstance(event, Metrics)]
    skipped = [not math.isfinite(norm) for norm in norms]
    assert skipped[0] and not skipped[-1]
    assert scaler.get_scale() == 2.0 ** (26 - sum(skipped))
    updates = next(iter(run.stepper.optimizer.state.values()))["step"]
    assert updates == len(norms) - sum(skipped)


def test_a_gradient_that_is_not_finite_unscaled_stops_a_run_in_float16_too(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (40,) * 4)
    run = prepare(tiny_config(precision="fp16", epochs=10), base, songs, tmp_path / "run")
    next(iter(run.adapter.parameters.values())).register_hook(lambda gradient: gradient * float("inf"))
    carry_until_error(run, NonFiniteError, match="gradient is no longer a finite number")
    assert run.state.step == 16  # From 65536 to 1.


def test_a_song_that_goes_bad_names_itself_and_keeps_what_was_done(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (40,) * 4)
    run = prepare(tiny_config(), base, songs, tmp_path / "run")
    song = run.batches.plan.songs[run.batches.plan.epoch(0)[-1][0].song].path
    song.write_bytes(b"PK\x03\x04 and nothing more")
    error, events = carry_until_error(run, DataError, match=song.name)
    assert f"fixed --resume-from {tmp_path / 'run'}" in error.hint
    assert [event.step for event in events if isinstance(event, CheckpointSaved)] == [3]


def test_a_reading_process_that_is_killed_costs_no_finished_step(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (40,) * 4)
    config = tiny_config(num_workers=1, prefetch_factor=1, persistent_workers=False, dataset_repeats=10)
    run = prepare(config, base, songs, tmp_path / "run")
    run.stepper.optimizer.register_step_post_hook(kill_readers)
    error, events = carry_until_error(run, ReadingError, match="was killed")
    (saved,) = [event for event in events if isinstance(event, CheckpointSaved)]
    assert saved.step == steps_of(events)[-1]
    assert "--num-workers 0" in error.hint


def kill_readers(*call: Any) -> None:
    for process in multiprocessing.active_children():
        process.kill()


@pytest.mark.parametrize("steps", [0, 2])
def test_running_out_of_memory_is_an_error_that_says_which_settings_take_less(
    tmp_path: Path, base: Checkpoint, steps: int
):
    songs = write_songs(tmp_path / "songs", base, (40,) * 8)
    config = tiny_config(batch_size=2, gradient_accumulation=3, rank=32, epochs=5)
    run = prepare(config, base, songs, tmp_path / "run")
    run.stepper.optimizer.register_step_pre_hook(full_after(steps))
    error, _ = carry_until_error(run, RunError, match="out of memory")
    for way in (
        "--gradient-checkpointing",
        "--batch-size 1 --gradient-accumulation 6",
        "--optimizer-type adamw8bit",
        "--rank 16",
    ):
        assert way in error.hint
    assert ("--resume-from" in error.hint) == (steps > 0)
    assert (tmp_path / "run" / "checkpoints").exists() == (steps > 0)
    assert error.exit_code == 1


def full_after(steps: int) -> Any:
    left: Iterator[int] = iter(range(steps))

    def fill(*call: Any) -> None:
        if next(left, None) is None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return fill


def test_long_songs_are_to_be_cut_into_windows_when_memory_runs_out(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (25 * 90,))
    run = prepare(tiny_config(gradient_checkpointing=True), base, songs, tmp_path / "run")
    run.stepper.optimizer.register_step_pre_hook(full_after(0))
    error, _ = carry_until_error(run, RunError)
    assert "--chunk-duration 60" in error.hint
    assert "--gradient-checkpointing" not in error.hint  # It is on already.


def test_a_model_that_does_not_fit_into_memory_is_an_error(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    def load(*arguments: Any, **more: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("sidestep.training.build.load_decoder", load)
    songs = write_songs(tmp_path / "songs", base, (40,))
    with pytest.raises(RunError, match="base does not fit into the free memory of cpu"):
        prepare(tiny_config(), base, songs, tmp_path / "run")


# Weighting


SAMPLERS = [Continuous(-0.4, 1.0), Continuous(0.3, 0.7), Discrete(3.0), Discrete(1.0)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("gamma", [0.5, 5.0, 50.0])
def test_min_snr_weights_have_mean_one_under_the_sampler(sampler: Continuous | Discrete, gamma: float):
    drawn = sampler.draw(400_000, torch.Generator().manual_seed(1))
    weights = MinSnr.normed(gamma, sampler)(drawn)
    assert weights.min() >= 0
    # 400 000 draws of a weight whose deviation is about its mean: four standard errors are 0.0063.
    assert weights.mean().item() == pytest.approx(1, abs=0.0065)


def test_min_snr_weighs_the_velocity_as_min_snr_gamma_weighs_the_clean_latents():
    generator = torch.Generator().manual_seed(2)
    clean, noise, error = torch.randn(3, 500, 64, dtype=torch.float64, generator=generator)
    t = torch.rand(500, 1, dtype=torch.float64, generator=generator).clamp(0.02, 0.98)
    noisy = (1 - t) * clean + t * noise
    velocity = noise - clean + error
    # The clean latents that a velocity implies are x_t - t v; their error is t times that of the velocity.
    torch.testing.assert_close(noisy - t * velocity - clean, -t * error)
    snr = ((1 - t) / t).square()
    expected = (snr.clamp(max=5.0) * (noisy - t * velocity - clean).square()).mean(1)
    weighting = MinSnr(gamma=5.0, mean=1.0)
    torch.testing.assert_close(weighting(t[:, 0]) * (velocity - (noise - clean)).square().mean(1), expected)


def test_min_snr_weights_the_loss_of_a_step(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (40,) * 3)
    config = tiny_config(batch_size=3, loss_weighting="min_snr", snr_gamma=2.0)
    run = prepare(config, base, songs, tmp_path / "run")
    (batch,) = run.batches.epoch(0)
    t = batch.task.timesteps_B
    recipe = resolve_recipe(config, name="fixed", is_turbo=False)
    law = sampler_of(recipe, mu=base.timestep_mu, sigma=base.timestep_sigma)
    weights = torch.minimum((1 - t) ** 2, 2 * t**2) / MinSnr.normed(2.0, law).mean
    expected = (weights * losses(run, batch)).mean().item()
    loss = run.stepper([batch], lr=0.0, seeds=[1]).values[0].item()
    assert loss == pytest.approx(expected, rel=1e-6)
    assert loss != pytest.approx(losses(run, batch).mean().item(), rel=1e-3)


def test_the_numbers_of_a_step_are_those_of_the_checkpoint_it_leaves(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (40,) * 3)
    trained = train(tiny_config(epochs=1), base, songs, tmp_path / "run")
    state = torch.load(trained.checkpoint("epoch_1") / STATE_FILE, weights_only=True)
    assert state["state"]["step"] == 3
    assert_identical(state["adapter"], trained.weights)
