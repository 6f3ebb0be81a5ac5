"""Batches for captured passes: few lengths, and prompts of one length, without changing what is learned from a song."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sidestep.model.checkpoint import Checkpoint
from sidestep.training import assemble
from sidestep.training.batches import FRAMES_PER_SECOND, LENGTH_STEP, Collate, Plan, Song, plan_batches
from tests.torch.tiny import prepare, tiny_config, write_songs

MOST_LEFT_OUT = 4 * FRAMES_PER_SECOND + LENGTH_STEP
LENGTHS = st.lists(st.integers(1, 6000), min_size=1, max_size=12)


def plan(lengths: list[int], *, batch_size: int = 1, chunk_seconds: float = 0.0) -> Plan:
    songs = [Song(Path(f"{place}.pt"), frames) for place, frames in enumerate(lengths)]
    return plan_batches(songs, batch_size=batch_size, chunk_seconds=chunk_seconds, repeats=1, seed=1, few_lengths=True)


@given(LENGTHS, st.integers(1, 3))
def test_lengths_are_multiples_of_sixteen_and_little_of_a_song_is_left_out(lengths: list[int], batch_size: int):
    draws = [draw for batch in plan(lengths, batch_size=batch_size).epoch(0) for draw in batch]
    assert Counter(draw.song for draw in draws) == Counter(range(len(lengths)))
    for draw in draws:
        whole = lengths[draw.song]
        assert draw.frames % LENGTH_STEP == 0 or draw.frames == whole < LENGTH_STEP or whole < MOST_LEFT_OUT
        assert 0 <= whole - draw.frames < MOST_LEFT_OUT
        assert 0 <= draw.start <= whole - draw.frames


@given(LENGTHS)
def test_songs_of_at_least_a_step_are_cut_to_whole_steps(lengths: list[int]):
    for group in plan(lengths).groups:
        assert group.frames % LENGTH_STEP == 0 or group.frames <= LENGTH_STEP


@given(LENGTHS)
def test_there_are_no_more_lengths_than_four_seconds_apart(lengths: list[int]):
    groups = plan(lengths).groups
    shortest = [min(lengths[song] for song in group.songs) for group in groups]
    assert all(later - earlier >= 4 * FRAMES_PER_SECOND for earlier, later in pairwise(shortest))
    spread = max(lengths) - min(lengths)
    assert len(groups) <= spread // (4 * FRAMES_PER_SECOND) + 1


def test_an_album_has_few_lengths_and_other_parts_are_left_out_in_other_epochs():
    lengths = [5000 + 7 * place for place in range(60)]  # 60 songs within 17 s of each other.
    laid_out = plan(lengths)
    assert len(laid_out.groups) == 4
    starts = {draw.start for epoch in range(30) for (draw,) in laid_out.epoch(epoch) if draw.song == 59}
    assert len(starts) > 5


@pytest.mark.parametrize("seconds", [1.0, 2.5, 30.0])
def test_windows_are_whole_steps_too_and_still_cover_every_frame(seconds: float):
    laid_out = plan([2000, 1999], chunk_seconds=seconds)
    assert laid_out.chunk_frames % LENGTH_STEP == 0
    assert abs(seconds * FRAMES_PER_SECOND - laid_out.chunk_frames) < LENGTH_STEP
    assert laid_out.chunk_frames >= FRAMES_PER_SECOND
    seen = [set(), set()]
    for batch in laid_out.epoch(0):
        for draw in batch:
            seen[draw.song] |= set(range(draw.start, draw.start + draw.frames))
    assert [len(frames) for frames in seen] == [2000, 1999]


def test_without_captured_passes_no_frame_is_left_out():
    songs = [Song(Path("a.pt"), 1000), Song(Path("b.pt"), 1017)]
    whole = plan_batches(songs, batch_size=1, chunk_seconds=0, repeats=1, seed=1)
    assert sorted(group.frames for group in whole.groups) == [1000, 1017]


def test_prompts_that_are_padded_further_have_the_losses_they_had(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (30,) * 3, rows=(9, 14, 6))
    run = prepare(tiny_config(batch_size=3, cfg_ratio=0.5, seed=1), base, songs, tmp_path / "run")
    (draws,) = run.batches.plan.epoch(0)
    items = [run.batches.draws[draw] for draw in draws]
    with torch.no_grad():
        short = Collate()(items)
        long = Collate(rows=24)(items)
        assert short.task.condition_BLD.shape[1] == 14 and long.task.condition_BLD.shape[1] == 24  # pyright: ignore
        assert long.task.rows_BL.sum(1).tolist() == short.task.rows_BL.sum(1).tolist()  # pyright: ignore
        model = run.stepper.model
        wanted = torch.cat([model.losses(Collate()([item]).task) for item in items])  # pyright: ignore
        for batch in (short, long):
            torch.testing.assert_close(model.losses(batch.task), wanted, atol=1e-6, rtol=1e-5)  # pyright: ignore


def test_one_length_of_prompts_serves_all_where_passes_are_captured(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(assemble, "can_capture", lambda device: True)
    config = tiny_config(cfg_ratio=0.0)
    for rows, expected in (((9, 14, 6), 16), ((9,), 9)):
        songs = write_songs(tmp_path / f"songs_{expected}", base, (48,) * 3, rows=rows)
        run = prepare(config, base, songs, tmp_path / "run")
        shapes = {(batch.task.condition_BLD.shape[1], batch.task.rows_BL is None) for batch in run.batches.epoch(0)}
        assert shapes == {(expected, len(rows) == 1)}
