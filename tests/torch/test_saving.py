"""What is saved is saved whole or not at all."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sidestep.config.runs import CHECKPOINTS, RUN_CONFIG, STATE_FILE, checkpoints_in
from sidestep.errors import RunError
from sidestep.events import AdapterSaved, CheckpointSaved, Event, Metrics, StepDone, Validated
from sidestep.model.checkpoint import Checkpoint
from sidestep.training.checkpoints import write_folder
from sidestep.training.run import carry_out
from tests.torch.tiny import (
    RUN_NAME,
    adapter_tensors,
    assert_identical,
    prepare,
    steps_of,
    tiny_config,
    train,
    write_songs,
)


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes: what writes more meets the error of a real disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill_with_text(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"x" * 100_000)


def fill_with_torch(folder: Path) -> None:
    with (folder / "a.pt").open("wb") as file:
        torch.save({"a": torch.zeros(50_000)}, file)


def fill_with_safetensors(folder: Path) -> None:
    save_file({"a": torch.zeros(50_000)}, folder / "a.safetensors")


FILLS = [fill_with_text, fill_with_torch, fill_with_safetensors]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("fill", FILLS)
def test_a_full_disk_leaves_what_was_there_and_nothing_half_written(tmp_path: Path, fill):
    target = tmp_path / "deep" / "target"
    write_folder(target, lambda folder: (folder / "old.txt").write_text("old") and None)
    before = files_of(tmp_path)
    with disk_of(20_000), pytest.raises(RunError, match=r"could not be written: .*File too large") as caught:
        write_folder(target, fill)
    assert files_of(tmp_path) == before
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert "disk space" in caught.value.hint
    assert caught.value.exit_code == 1
    write_folder(target, fill)
    assert "old.txt" not in files_of(target)


@pytest.mark.parametrize("error", [RunError("out of memory"), RuntimeError("a bug"), KeyboardInterrupt()], ids=repr)
def test_whatever_else_stops_the_writing_passes_and_leaves_nothing_behind(tmp_path: Path, error: BaseException):
    def fill(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(type(error)) as caught:
        write_folder(tmp_path / "target", fill)
    assert caught.value is error
    assert not list(tmp_path.iterdir())


def test_what_was_there_stays_when_it_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "target"
    write_folder(target, lambda folder: (folder / "old.txt").write_text("old") and None)
    replace = Path.replace

    def fail(path: Path, to: Path) -> Path:
        if path.name.endswith(".writing"):
            raise PermissionError(13, "Permission denied")
        return replace(path, to)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(RunError, match="Permission denied"):
        write_folder(target, fill_with_text)
    assert files_of(tmp_path) == {"target/old.txt": b"old"}


def test_a_folder_where_a_file_is_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunError, match="could not be written"):
        write_folder(tmp_path / "file" / "target", fill_with_text)


def test_what_an_earlier_crash_left_behind_is_no_obstacle(tmp_path: Path):
    for name in (".target.writing", ".target.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rest").write_text("rest")
    (tmp_path / "target").mkdir()
    write_folder(tmp_path / "target", fill_with_text)
    assert list(files_of(tmp_path)) == ["target/a.txt"]


def test_a_disk_that_fills_up_in_training_ends_the_run_at_its_last_checkpoint(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (20, 20))
    config = tiny_config(epochs=3, save_every=1)
    whole = train(config, base, songs, tmp_path / "whole")
    train(replace(config, epochs=1, scheduler_type="cosine"), base, songs, tmp_path / "run")
    run = prepare(replace(config, resume_from=tmp_path / "run"), base, songs, tmp_path / "run")
    before = files_of(tmp_path / "run")
    events = []
    with disk_of(30_000), pytest.raises(RunError, match="epoch_2 could not be written"):
        carry_out(run, emit=events.append, stop_requested=lambda: False)
    assert files_of(tmp_path / "run") == before
    assert steps_of(events) == [3, 4]
    resumed = train(replace(config, resume_from=tmp_path / "run"), base, songs, tmp_path / "run")
    assert steps_of(resumed.events) == steps_of(whole.events)[2:]


@pytest.mark.parametrize(
    ("kind", "log_every", "name"),
    [
        (StepDone, 1, "epoch_1_step_3"),
        (Metrics, 1, "epoch_1_step_3"),
        (Metrics, 3, "epoch_1_step_3"),
        (Validated, 2, "epoch_2"),
    ],
)
def test_what_was_done_is_saved_when_a_file_that_is_reported_to_cannot_be_written(
    tmp_path: Path, base: Checkpoint, kind: type[Event], log_every: int, name: str
):
    songs = write_songs(tmp_path / "songs", base, (20, 20, 20))
    config = tiny_config(epochs=3, ema_decay=0.5, val_split=0.34, log_every=log_every)
    whole = train(config, base, songs, tmp_path / "whole")
    run = prepare(config, base, songs, tmp_path / "run")
    failure = RunError("The disk is full: board cannot be written.", hint="Free some space.")

    def full(event: Event) -> None:
        # Once it is full it stays full.
        if run.state.step >= 3 and (isinstance(event, kind) or failure.__traceback__):
            raise failure

    with pytest.raises(RunError, match="board cannot be written") as caught:
        carry_out(run, emit=full, stop_requested=lambda: False)
    assert caught.value.hint.startswith("Free some space. What was done is saved:\n  ")
    assert [folder.name for folder in checkpoints_in(tmp_path / "run")] == [name]
    resumed = train(replace(config, resume_from=tmp_path / "run"), base, songs, tmp_path / "run")
    for part in ("adapter", "ema", "optimizer"):
        assert_identical(resumed.state[part], whole.state[part])


def test_the_best_adapter_is_saved_though_a_sink_fails_on_hearing_of_it(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (20, 20, 20))
    run = prepare(tiny_config(val_split=0.34), base, songs, tmp_path / "run")

    def full(event: Event) -> None:
        if isinstance(event, Validated) and event.is_best:
            raise RunError("The disk is full.")

    with pytest.raises(RunError, match="disk is full"):
        carry_out(run, emit=full, stop_requested=lambda: False)
    (checkpoint,) = checkpoints_in(tmp_path / "run")
    assert_identical(adapter_tensors(tmp_path / "run" / f"{RUN_NAME}_best"), adapter_tensors(checkpoint))


def test_checkpoints_are_saved_every_so_many_epochs_and_at_the_end(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (20, 20))
    trained = train(tiny_config(epochs=5, save_every=2), base, songs, tmp_path / "run")
    saved = [(event.folder.name, event.step) for event in trained.all_of(CheckpointSaved)]
    assert saved == [("epoch_2", 4), ("epoch_4", 8), ("epoch_5", 10)]
    assert sorted(path.name for path in (tmp_path / "run" / CHECKPOINTS).iterdir()) == ["epoch_2", "epoch_4", "epoch_5"]
    assert [event.folder.name for event in trained.all_of(AdapterSaved)] == [RUN_NAME]


def test_a_checkpoint_holds_the_adapter_the_settings_and_the_raw_state(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (20, 20))
    trained = train(tiny_config(), base, songs, tmp_path / "run")
    folder = trained.checkpoint("epoch_2")
    names = {path.name for path in folder.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", RUN_CONFIG, STATE_FILE}
    assert_identical(trained.state["adapter"], trained.weights)
    final = files_of(tmp_path / "run" / RUN_NAME)
    assert final == {name: content for name, content in files_of(folder).items() if name in final}


def test_the_same_run_gives_the_same_files(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (20, 20))
    for name in ("one", "two"):
        train(tiny_config(dropout=0.1), base, songs, tmp_path / name)
    one, two = (files_of(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        # The entries of a safetensors header come in any order.
        assert name.endswith(".safetensors") or one[name] == two[name], name
    assert_identical(adapter_tensors(tmp_path / "one" / RUN_NAME), adapter_tensors(tmp_path / "two" / RUN_NAME))
