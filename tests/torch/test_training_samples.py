"""Samples while training: heard beside the plain model, and without a trace in what is trained."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sidestep.config.train import TrainConfig
from sidestep.demo.checkpoint import build_toy_checkpoint
from sidestep.events import Event, Notice, SampleRendered
from sidestep.listen import samples
from sidestep.listen.samples import TrainingSamples, prepare_wordings, without_adapter
from sidestep.model.checkpoint import Checkpoint, find_checkpoint
from sidestep.training.run import carry_out
from sidestep.ui.tensorboard import TensorBoard
from tests.torch.tiny import Trained, adapter_tensors, assert_identical, prepare, tiny_config, train, write_songs

FRAMES = (30, 41, 30)


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Turbo needs few steps for a sample."""
    return find_checkpoint(build_toy_checkpoint(tmp_path_factory.mktemp("turbo"), variant="turbo"), "turbo")


def prompts_file(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("warm synths\na fast polka\n")
    return path


def sampled(tmp_path: Path, checkpoint: Checkpoint, *, stop_after: int | None = None, **changes: Any) -> Trained:
    """Train with samples as the command does."""
    settings = {"sample_every_n_epochs": 2, "sample_prompts": prompts_file(tmp_path), "sample_duration": 1.0}
    config: TrainConfig = tiny_config(**{**settings, **changes})
    songs = write_songs(tmp_path / "songs", checkpoint, FRAMES)
    events: list[Event] = []
    wordings = prepare_wordings(config, checkpoint, songs)
    run = prepare(config, checkpoint, songs, tmp_path / "run", emit=events.append)
    listen = TrainingSamples(run, wordings, emit=events.append)

    def stop_requested() -> bool:
        return stop_after is not None and run.state.step >= stop_after

    reason = carry_out(run, emit=events.append, stop_requested=stop_requested, listen=listen)
    return Trained(run, reason, events)


def index_of(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "run" / "samples" / "samples.json").read_text())


def rendered(tmp_path: Path) -> list[tuple[int | None, int, int]]:
    return [(entry["epoch"], entry["step"], entry["prompt"]) for entry in index_of(tmp_path)["renderings"]]


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.1, "gradient_checkpointing": True, "batch_size": 2},
        {"bias": "all"},
        {"adapter_type": "dora", "ema_decay": 0.9},
        {"adapter_type": "lokr", "rank": 2, "dropout": 0.1},
        {"adapter_type": "loha", "val_split": 0.34},
    ],
    ids=["lora", "biases", "dora", "lokr", "loha"],
)
def test_a_run_with_samples_ends_as_one_without_bit_for_bit(tmp_path: Path, turbo: Checkpoint, changes: dict[str, Any]):
    with_samples = sampled(tmp_path, turbo, sample_every_n_epochs=1, **changes)
    songs = write_songs(tmp_path / "songs", turbo, FRAMES)
    without = train(tiny_config(**changes), turbo, songs, tmp_path / "without")
    assert len(with_samples.all_of(SampleRendered)) == 6
    assert with_samples.losses == without.losses
    assert_identical(with_samples.weights, without.weights)
    assert_identical(with_samples.state, without.state)
    assert_identical(
        adapter_tensors(with_samples.run.output_dir / "tiny"), adapter_tensors(without.run.output_dir / "tiny")
    )


def test_the_model_alone_is_rendered_once_and_the_adapter_every_n_epochs_and_at_the_end(
    tmp_path: Path, turbo: Checkpoint
):
    run = sampled(tmp_path, turbo, epochs=3)
    assert rendered(tmp_path) == [
        (None, 0, 1), (None, 0, 2), (2, 6, 1), (2, 6, 2), (3, 9, 1), (3, 9, 2)
    ]  # fmt: skip
    index = index_of(tmp_path)
    assert [(prompt["caption"], prompt["seed"]) for prompt in index["prompts"]] == [
        ("warm synths", 42), ("a fast polka", 43)
    ]  # fmt: skip
    assert index["sampling"] == {"steps": 8, "guidance": 1.0, "shift": 3.0}
    folder = run.run.output_dir / "samples"
    base, adapter = (soundfile.read(folder / label / "1_warm-synths.flac") for label in ("base", "epoch_0003"))
    assert base[1] == 48_000 and base[0].shape == (48_000, 2)
    assert np.abs(base[0] - adapter[0]).max() > 1e-3


def test_the_sample_is_what_the_saved_adapter_sounds_like(tmp_path: Path, turbo: Checkpoint):
    from sidestep.listen.render import usual_sampling
    from sidestep.listen.studio import Studio

    run = sampled(tmp_path, turbo, learning_rate=0.01)
    folder = run.run.output_dir
    floats = {"device": torch.device("cpu"), "dtype": torch.float32}
    config = run.run.config
    (wording, _) = prepare_wordings(config, turbo, tmp_path / "songs")
    for adapter, label in ((None, "base"), (folder / "tiny", "epoch_0002")):
        sampling = usual_sampling(turbo)
        studio = Studio(turbo, [wording.prompt], adapter=adapter, seconds=1, seed=42, sampling=sampling, **floats)
        wanted = studio.renderer.render(studio.wordings[0], sampling)
        found = soundfile.read(folder / "samples" / label / "1_warm-synths.flac")[0].T
        assert np.abs(found - wanted).max() < 1e-3


def test_prompts_come_from_the_songs_where_none_are_given(tmp_path: Path, turbo: Checkpoint):
    songs = write_songs(tmp_path / "songs", turbo, FRAMES)
    wordings = prepare_wordings(tiny_config(sample_prompts=None, sample_duration=3.0), turbo, songs)
    assert [(wording.seed, wording.seconds) for wording in wordings] == [(42, 3.0), (43, 3.0)]


def test_an_adapter_that_training_starts_from_is_heard_before_the_first_step(tmp_path: Path, turbo: Checkpoint):
    first = sampled(tmp_path / "first", turbo) if (tmp_path / "first").mkdir() is None else None
    assert first is not None
    sampled(tmp_path, turbo, init_from=first.run.output_dir / "tiny", epochs=1)
    assert rendered(tmp_path)[:4] == [(None, 0, 1), (None, 0, 2), (0, 0, 1), (0, 0, 2)]


def test_a_resumed_run_keeps_what_was_rendered_and_goes_on(tmp_path: Path, turbo: Checkpoint):
    stopped = sampled(tmp_path, turbo, epochs=4, stop_after=7, save_every=2)
    assert stopped.reason == "interrupted"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "samples").rglob("*.flac")}
    resumed = sampled(tmp_path, turbo, epochs=4, save_every=2, resume_from=tmp_path / "run")
    assert rendered(tmp_path)[-2:] == [(4, 12, 1), (4, 12, 2)]
    assert len(resumed.all_of(SampleRendered)) == 2
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_the_model_alone_has_its_own_biases(tmp_path: Path, turbo: Checkpoint):
    (tmp_path / "first").mkdir()
    first = sampled(tmp_path / "first", turbo, bias="all", learning_rate=0.01)
    sampled(tmp_path, turbo, bias="all", init_from=first.run.output_dir / "tiny", epochs=1)
    before, after = (folder / "samples" / "base" for folder in (first.run.output_dir, tmp_path / "run"))
    for name in ("1_warm-synths.flac", "2_a-fast-polka.flac"):
        assert np.array_equal(soundfile.read(before / name)[0], soundfile.read(after / name)[0])


def test_entries_that_were_changed_by_hand_are_rendered_again(tmp_path: Path, turbo: Checkpoint):
    sampled(tmp_path, turbo, epochs=4, stop_after=7, save_every=2)
    index = index_of(tmp_path)
    del index["renderings"][0]["step"], index["renderings"][1]["file"]
    (tmp_path / "run" / "samples" / "samples.json").write_text(json.dumps(index))
    sampled(tmp_path, turbo, epochs=4, save_every=2, resume_from=tmp_path / "run")
    assert sorted(rendered(tmp_path), key=str) == [
        (2, 6, 1), (2, 6, 2), (4, 12, 1), (4, 12, 2), (None, 7, 1), (None, 7, 2)
    ]  # fmt: skip


def test_no_room_for_samples_is_said_and_training_goes_on(
    tmp_path: Path, turbo: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    def no_room(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(samples.Renderer, "render", no_room)
    run = sampled(tmp_path, turbo)
    texts = [event.text for event in run.all_of(Notice)]
    assert run.reason == "finished"
    assert [text for text in texts if text.startswith("No samples")] == [
        "No samples at epoch 0: there is no room. Training goes on.",
        "No samples at epoch 2: there is no room. Training goes on.",
    ]
    assert run.run.stepper.model.decoder.training


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "loha"])
def test_without_its_adapter_the_decoder_is_the_plain_one(tmp_path: Path, turbo: Checkpoint, kind: str):
    from sidestep.model.loading import load_decoder
    from tests.torch.test_exports import SETTINGS, response, trained

    trained(tmp_path / "run", turbo, **SETTINGS[kind])
    songs = write_songs(tmp_path / "songs", turbo, FRAMES)
    run = prepare(tiny_config(**SETTINGS[kind], init_from=tmp_path / "run"), turbo, songs, tmp_path / "out")
    decoder = run.stepper.model.decoder.eval()
    plain = load_decoder(turbo, device=torch.device("cpu"), dtype=torch.float32)
    module = run.adapter.modules[0]
    trainable = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    adapted = response(decoder, module)
    with without_adapter(decoder):
        assert torch.equal(response(decoder, module), response(plain, module))
    assert torch.equal(response(decoder, module), adapted)
    assert not torch.equal(adapted, response(plain, module))
    assert {name for name, parameter in decoder.named_parameters() if parameter.requires_grad} == trainable


def test_tensorboard_plays_and_shows_samples(tmp_path: Path):
    from sidestep.listen.sound import write_flac

    time = np.arange(4800) / 48_000
    path = tmp_path / "a.flac"
    write_flac(path, np.stack([np.sin(600 * time), np.sin(900 * time)]))
    with TensorBoard(tmp_path / "runs", first_step=0) as board:
        for epoch, step in ((None, 0), (3, 30)):
            board(SampleRendered(step=step, epoch=epoch, prompt=1, caption="x", path=path, seconds=0.1))
    events = EventAccumulator(str(tmp_path / "runs"), size_guidance={"audio": 0, "images": 0}).Reload()
    assert sorted(events.Tags()["audio"]) == ["sample_1/adapter", "sample_1/base"]
    (sound,) = events.Audio("sample_1/adapter")
    assert sound.step == 30 and sound.sample_rate == 48_000 and sound.length_frames == 4800
    (image,) = events.Images("sample_1/base/spectrogram")
    assert (image.width, image.height) == (320, 96)
