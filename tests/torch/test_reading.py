"""Nothing waits for the songs: headers by processes, the next batch and the next epoch begun in time."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sidestep.errors import DataError
from sidestep.model.checkpoint import Checkpoint
from sidestep.preprocess.tensors import Sample, is_finite, read_sample
from sidestep.training import batches as batches_module
from sidestep.training import songs as songs_module
from sidestep.training.songs import dataset_fingerprint, find_songs
from sidestep.training.transfer import on_device, one_ahead
from tests.torch.tiny import prepare, tiny_config, write_songs


def ignore(event: object) -> None:
    """Take no notice."""


def test_the_headers_of_many_files_are_read_by_processes_in_their_order(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_songs(tmp_path, base, range(30, 170), rows=(5, 7), repeats=(1, 2, 3))
    alone = find_songs(folder, base, emit=ignore)
    monkeypatch.setattr(songs_module, "MANY_FILES", 100)
    assert find_songs(folder, base, emit=ignore, num_workers=2) == alone
    assert sorted(song.frames for song in alone) == list(range(30, 170))


def test_songs_of_programs_that_keep_no_account_are_known_by_their_numbers(tmp_path: Path, base: Checkpoint) -> None:
    folders = [write_songs(tmp_path / f"{place}", base, (30, 40), seed=seed) for place, seed in enumerate((0, 0, 1))]
    first, again, other = (dataset_fingerprint(find_songs(folder, base, emit=ignore)) for folder in folders)
    assert first == again != other


@pytest.mark.parametrize("many", [1, 100])
def test_a_damaged_file_is_named_whoever_reads_it(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    folder = write_songs(tmp_path, base, (30, 40, 50))
    (folder / "song_1.pt").write_bytes(b"damaged")
    monkeypatch.setattr(songs_module, "MANY_FILES", many)
    with pytest.raises(DataError, match=r"song_1\.pt"):
        find_songs(folder, base, emit=ignore, num_workers=1)


def test_an_item_is_begun_before_the_one_before_it_is_used() -> None:
    story: list[str] = []

    def begin(item: int) -> int:
        story.append(f"begin {item}")
        return item

    for item in one_ahead(range(3), begin):
        story.append(f"use {item}")
    assert story == ["begin 0", "begin 1", "use 0", "begin 2", "use 1", "use 2"]
    assert list(one_ahead([], begin)) == []


def test_what_is_wrong_with_an_item_is_raised_after_the_one_before_it_was_used() -> None:
    def items() -> Iterator[int]:
        yield from (1, 2)
        raise DataError("the third went bad")

    used: list[int] = []
    with pytest.raises(DataError, match="the third"):
        used.extend(one_ahead(items(), abs))
    assert used == [1, 2]


def test_without_a_gpu_batches_are_trained_on_as_they_were_read(tmp_path: Path, base: Checkpoint) -> None:
    batches = prepare(tiny_config(), base, write_songs(tmp_path, base, (40, 50)), tmp_path / "run").batches
    read = list(batches.epoch(0))
    assert [batch.task.latents_BTC.shape for batch in on_device(read, torch.device("cpu"))] == [
        batch.task.latents_BTC.shape for batch in read
    ]


@pytest.mark.parametrize("persistent", [True, False])
def test_the_next_epoch_is_read_while_the_last_batch_of_this_one_is_trained_on(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch, persistent: bool
) -> None:
    songs = write_songs(tmp_path / "songs", base, (40, 50, 60))
    config = tiny_config(num_workers=1, persistent_workers=persistent)
    batches = prepare(config, base, songs, tmp_path / "run").batches
    log = tmp_path / "read"

    def logged(path: Path) -> Sample:
        with log.open("a") as file:
            file.write(f"{path.stem}\n")
        return read_sample(path)

    monkeypatch.setattr(batches_module, "read_sample", logged)
    laid_out = [batches.plan.songs[draws[0].song].path.stem for at in (0, 1) for draws in batches.plan.epoch(at)]
    trained_on = [batch.names[0] for batch in batches.epoch(0)]
    deadline = time.monotonic() + 60
    while len(log.read_text().split()) < 4:
        assert time.monotonic() < deadline, "nothing of the next epoch is read"
        time.sleep(0.01)
    trained_on += [batch.names[0] for batch in batches.epoch(1)]
    assert trained_on == laid_out
    assert log.read_text().split()[:6] == laid_out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_number_that_is_not_finite_is_found_and_large_ones_are_no_mistake(dtype: torch.dtype) -> None:
    numbers = torch.full((300, 64), torch.finfo(dtype).max / 2, dtype=dtype)
    assert is_finite(numbers)
    for wrong in (torch.nan, torch.inf, -torch.inf):
        spoiled = numbers.clone()
        spoiled[123, 45] = wrong
        assert not is_finite(spoiled)
    both = numbers.clone()
    both[0, 0], both[1, 1] = torch.inf, -torch.inf
    assert not is_finite(both)
