"""What is proposed, and what --auto-fit changes, when a step does not fit."""

from dataclasses import replace
from pathlib import Path

import pytest

from sidestep.config.train import TrainConfig
from sidestep.errors import NoRoomError
from sidestep.events import Event, Notice
from sidestep.model.checkpoint import Checkpoint
from sidestep.training import fit
from sidestep.training.assemble import Run
from sidestep.training.fit import Fit, assemble_fitting, flags_between, takes_less, ways_to_take_less
from tests.torch.tiny import prepare, tiny_config, write_songs


def test_the_cheapest_ways_come_first_and_keep_the_effective_batch():
    config = TrainConfig(batch_size=3, gradient_accumulation=2, gradient_checkpointing=False)
    first, second, *_ = ways_to_take_less(config, 30)
    assert flags_between(config, first) == "--gradient-checkpointing"
    assert (second.batch_size, second.gradient_accumulation) == (1, 6)
    four = ways_to_take_less(replace(config, batch_size=4), 30)[1]
    assert (four.batch_size, four.gradient_accumulation) == (2, 4)


def test_a_run_that_goes_on_changes_only_what_it_may():
    config = TrainConfig(batch_size=4, resume_from=Path("run"), gradient_checkpointing=False)
    assert [flags_between(config, way) for way in ways_to_take_less(config, 240)] == ["--gradient-checkpointing"]
    assert takes_less(replace(config, gradient_checkpointing=True), 240) == "These take less: a smaller model."


def test_the_ranks_of_a_map_are_not_halved():
    """They are the map's: a smaller --rank takes no less memory, and its smaller --alpha changes the training."""
    small = TrainConfig(quantize="nf4", optimizer_type="adamw8bit")
    assert [flags_between(small, way) for way in ways_to_take_less(small, 30)] == ["--rank 32 --alpha 64"]
    assert ways_to_take_less(replace(small, rank_map=Path("rank_map.json")), 30) == []


def test_auto_fit_cuts_no_windows_for_songs_that_are_shorter(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    tried: list[TrainConfig] = []

    def measure(run: Run) -> Fit:
        tried.append(run.config)
        raise NoRoomError("too small")

    monkeypatch.setattr(fit, "measure", measure)
    config = tiny_config(
        gradient_checkpointing=True, quantize="int8", optimizer_type="adafactor", rank=32, max_duration=240.0,
        auto_fit=True,
    )  # fmt: skip
    with pytest.raises(NoRoomError):
        assemble_fitting(
            config,
            emit=lambda event: None,
            recipe_name="fixed",
            checkpoint=base,
            dataset_dir=write_songs(tmp_path / "songs", base, (50,)),
            output_dir=tmp_path / "run",
            run_name="run",
            version="0",
        )
    assert [(each.quantize, each.rank, each.chunk_duration) for each in tried] == [
        ("int8", 32, 0), ("nf4", 32, 0), ("nf4", 16, 0),
    ]  # fmt: skip


@pytest.mark.parametrize("auto_fit", [True, False])
def test_auto_fit_goes_down_until_a_step_fits(
    auto_fit: bool, tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    tried: list[TrainConfig] = []
    events: list[Event] = []

    def measure(run: Run) -> Fit:
        tried.append(run.config)
        if run.config.quantize == "none":
            raise NoRoomError("too small")
        return Fit(step_seconds=2.0, peak_gib=3.5, device_gib=8.0)

    monkeypatch.setattr(fit, "measure", measure)
    config = tiny_config(gradient_checkpointing=False, auto_fit=auto_fit, epochs=5, gradient_accumulation=1)
    parts = {
        "recipe_name": "fixed",
        "checkpoint": base,
        "dataset_dir": write_songs(tmp_path / "songs", base, (50,)),
        "output_dir": tmp_path / "run",
        "run_name": "run",
        "version": "0",
    }
    if not auto_fit:
        with pytest.raises(NoRoomError, match="too small"):
            assemble_fitting(config, emit=events.append, **parts)
        return
    run = assemble_fitting(config, emit=events.append, **parts)
    assert [(each.gradient_checkpointing, each.quantize) for each in tried] == [
        (False, "none"), (True, "none"), (True, "int8"),
    ]  # fmt: skip
    assert run.config.quantize == "int8"
    texts = [event.text for event in events if isinstance(event, Notice)]
    assert texts[-1] == "Measured at the longest sample (2 s): 3.5 of 8 GiB, 2.00 s a step; 10 s to the end at most."
    assert "That does not fit; trying with --quantize int8." in texts


@pytest.mark.parametrize(
    ("settings", "peak_gib", "device_gib", "is_proposed"),
    [
        ({}, 4.0, 24.0, True),
        ({}, 4.0, 5.0, False),
        ({}, 4.0, 4.0 / fit.ROOM, False),
        ({"gradient_checkpointing_ratio": 0.5}, 4.0, 24.0, False),
        ({"gradient_checkpointing": False}, 4.0, 24.0, False),
    ],
)
def test_keeping_activations_is_proposed_where_there_is_room_for_them(
    settings: dict[str, object], peak_gib: float, device_gib: float, is_proposed: bool, tmp_path: Path, base: Checkpoint
):
    songs = write_songs(tmp_path / "songs", base, (50,))
    run = prepare(tiny_config(**{"gradient_checkpointing": True, **settings}), base, songs, tmp_path / "run")
    found: list[Event] = []
    fit.report(run, Fit(step_seconds=1.0, peak_gib=peak_gib, device_gib=device_gib), found.append)
    (notice,) = found
    assert isinstance(notice, Notice)
    assert ("--no-gradient-checkpointing" in notice.text) == is_proposed
