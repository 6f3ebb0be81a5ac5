"""Songs become batches of one length, without padding; every draw follows from the seed alone."""

import multiprocessing
import os
import pickle
import random
import signal
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sidestep.config.recipe import resolve_recipe
from sidestep.errors import DataError, ReadingError
from sidestep.events import Notice
from sidestep.model.checkpoint import Checkpoint
from sidestep.preprocess.tensors import FRAMES_PER_SECOND, read_sample
from sidestep.training import assemble
from sidestep.training.batches import Batch, Plan, Song, mix, plan_batches, window_starts
from tests.torch.tiny import assert_identical, prepare, tiny_config, write_songs

SONGS = st.lists(
    st.builds(Song, st.just(Path("song.pt")), st.integers(1, 400), st.integers(1, 3)), min_size=1, max_size=8
)
PLANS = st.builds(
    plan_batches,
    SONGS,
    batch_size=st.integers(1, 4),
    chunk_seconds=st.sampled_from([0.0, 1.0, 2.5, 8.0]),
    repeats=st.integers(1, 3),
    seed=st.integers(0, 2**53),
)
WHOLE_SONG_PLANS = st.builds(
    plan_batches, SONGS, batch_size=st.just(1), chunk_seconds=st.just(0.0), repeats=st.just(1), seed=st.integers(0, 99)
)


def covered(plan: Plan, epoch: int) -> dict[int, Counter[int]]:
    """Count how often an epoch shows each frame of each song."""
    frames: dict[int, Counter[int]] = {song: Counter() for song in range(len(plan.songs))}
    for batch in plan.epoch(epoch):
        for draw in batch:
            frames[draw.song].update(range(draw.start, draw.start + draw.frames))
    return frames


@given(PLANS, st.integers(0, 5))
def test_a_batch_holds_samples_of_one_length_that_lie_within_their_songs(plan: Plan, epoch: int):
    for batch in plan.epoch(epoch):
        assert 1 <= len(batch) <= plan.batch_size
        assert len({draw.frames for draw in batch}) == 1
        for draw in batch:
            assert 0 <= draw.start <= draw.start + draw.frames <= plan.songs[draw.song].frames


@given(PLANS, st.integers(0, 5))
def test_every_epoch_has_the_promised_number_of_batches(plan: Plan, epoch: int):
    assert len(plan.epoch(epoch)) == plan.batches_per_epoch


@given(PLANS, st.integers(0, 5))
def test_the_same_plan_gives_the_same_epoch(plan: Plan, epoch: int):
    assert plan.epoch(epoch) == plan.epoch(epoch)


@given(PLANS, st.integers(0, 5))
def test_no_two_samples_of_two_epochs_share_their_noise(plan: Plan, epoch: int):
    seeds = [draw.seed for at in (epoch, epoch + 1) for batch in plan.epoch(at) for draw in batch]
    assert len(set(seeds)) == len(seeds)


@given(WHOLE_SONG_PLANS, st.integers(0, 5))
def test_whole_songs_are_seen_once_for_each_of_their_repeats(plan: Plan, epoch: int):
    for song, frames in covered(plan, epoch).items():
        assert frames == Counter(dict.fromkeys(range(plan.songs[song].frames), plan.songs[song].repeat))


@given(PLANS, st.integers(0, 5))
def test_songs_count_as_often_as_their_repeats_say(plan: Plan, epoch: int):
    seen = Counter(draw.song for batch in plan.epoch(epoch) for draw in batch)
    for place, song in enumerate(plan.songs):
        windows = -(-song.frames // plan.chunk_frames) if song.frames >= plan.chunk_frames > 0 else 1
        assert seen[place] == windows * song.repeat * plan.repeats


@given(PLANS, st.integers(0, 5))
def test_windows_show_every_frame_once_or_twice_and_cropping_leaves_out_less_than_a_second(plan: Plan, epoch: int):
    for song, frames in covered(plan, epoch).items():
        times = plan.songs[song].repeat * plan.repeats
        length = plan.songs[song].frames
        if length >= plan.chunk_frames > 0:
            assert all(times <= frames[at] <= 2 * times for at in range(length))
        else:
            assert sum(frames.values()) > times * (length - FRAMES_PER_SECOND)


@given(PLANS)
def test_songs_in_one_group_differ_by_less_than_a_second(plan: Plan):
    for group in plan.groups:
        for song in group.songs:
            surplus = plan.songs[song].frames - group.frames
            assert surplus >= 0
            assert surplus < FRAMES_PER_SECOND or group.frames == plan.chunk_frames
            assert surplus == 0 or plan.batch_size > 1 or plan.chunk_frames


@given(st.integers(1, 2000), st.integers(1, 300), st.integers())
def test_windows_cover_a_song_with_as_few_as_can(length: int, window: int, seed: int):
    window = min(window, length)
    starts = window_starts(length, window, random.Random(seed))
    assert len(starts) == -(-length // window)
    assert (starts[0], starts[-1]) == (0, length - window)
    assert all(0 < later - earlier <= window for earlier, later in pairwise(starts))


def test_every_part_of_a_song_is_as_likely_as_whole_windows_allow():
    for length, window, most in ((240, 60, 1), (260, 100, 3 / 2), (200, 60, 4 / 3), (290, 60, 5 / 4)):
        draws = [window_starts(length, window, random.Random(seed)) for seed in range(2000)]
        seen = Counter(frame for starts in draws for start in starts for frame in range(start, start + window))
        likely = [seen[frame] / len(draws) for frame in range(length)]
        assert min(likely) == 1
        assert max(likely) < most + 0.05


def test_a_song_shorter_than_the_window_is_trained_whole():
    songs = [Song(Path("long.pt"), 200), Song(Path("short.pt"), 60), Song(Path("shorter.pt"), 50)]
    plan = plan_batches(songs, batch_size=2, chunk_seconds=3, repeats=1, seed=1)
    lengths = Counter((draw.song, draw.frames) for batch in plan.epoch(0) for draw in batch)
    # The two short ones share a batch, cropped to the shorter; neither is cut in two.
    assert lengths == {(0, 75): 3, (1, 50): 1, (2, 50): 1}


def test_four_batches_of_one_are_the_samples_of_one_batch_of_four():
    songs = [Song(Path(f"{at}.pt"), 50) for at in range(8)]
    single, four = (plan_batches(songs, batch_size=size, chunk_seconds=0, repeats=1, seed=3) for size in (1, 4))
    draws = [draw for (draw,) in single.epoch(2)]
    assert four.epoch(2) == [draws[:4], draws[4:]]


def test_another_seed_or_epoch_gives_another_order():
    songs = [Song(Path(f"{at}.pt"), 50) for at in range(12)]
    orders = [
        [draw.song for (draw,) in plan_batches(songs, batch_size=1, chunk_seconds=0, repeats=1, seed=seed).epoch(epoch)]
        for seed, epoch in ((1, 0), (1, 1), (2, 0))
    ]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(12)) for order in orders)


def test_seeds_depend_on_every_part_and_never_change():
    assert mix(42, 0, "order") == 8428238560865113555
    assert len({mix(1, 2), mix(2, 1), mix(12), mix(1, "2"), mix(1, 2, 0)}) == 5


@pytest.mark.parametrize("chunk", [0.0, 2.0])
def test_going_on_from_a_position_gives_the_rest_of_the_epoch(tmp_path: Path, base: Checkpoint, chunk: float):
    songs = write_songs(tmp_path, base, (60, 60, 75, 90, 75), rows=(9, 11))
    batches = prepare(tiny_config(batch_size=2, chunk_duration=chunk), base, songs, tmp_path / "run").batches
    whole = list(batches.epoch(3))
    assert len(whole) == batches.plan.batches_per_epoch
    for position in range(len(whole) + 1):
        rest = list(batches.epoch(3, position=position))
        assert_identical([parts(batch) for batch in rest], [parts(batch) for batch in whole[position:]])


@pytest.mark.parametrize("persistent", [True, False])
def test_reading_processes_give_the_same_tensors(tmp_path: Path, base: Checkpoint, persistent: bool):
    songs = write_songs(tmp_path, base, (60, 60, 75, 90), rows=(9, 11))
    config = tiny_config(batch_size=2, chunk_duration=2.0)
    here = prepare(config, base, songs, tmp_path / "run").batches
    there = prepare(
        tiny_config(batch_size=2, chunk_duration=2.0, num_workers=2, persistent_workers=persistent),
        base,
        songs,
        tmp_path / "run",
    ).batches
    for epoch in range(2):
        assert_identical([parts(b) for b in there.epoch(epoch)], [parts(b) for b in here.epoch(epoch)])


def parts(batch: Batch) -> list[object]:
    task = batch.task
    return [batch.names, *(getattr(task, name) for name in task.__slots__)]


def test_what_reads_the_songs_can_be_sent_to_a_process(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path, base, (40,))
    batches = prepare(tiny_config(), base, songs, tmp_path / "run").batches
    ((draw,),) = batches.plan.epoch(0)
    sent = pickle.loads(pickle.dumps(batches.draws))
    assert torch.equal(sent[draw].noise_TC, batches.draws[draw].noise_TC)


def test_a_window_takes_its_latents_from_its_place_and_its_context_from_the_start(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path, base, (130,))
    batches = prepare(tiny_config(chunk_duration=2.0), base, songs, tmp_path / "run").batches
    sample = read_sample(songs / "song_0.pt")
    draws = [draw for (draw,) in batches.plan.epoch(0)]
    assert sorted(draw.start for draw in draws)[1:] != [0, 0]
    for draw, batch in zip(draws, batches.epoch(0), strict=True):
        latents = sample.target_latents[draw.start : draw.start + 50]
        assert torch.equal(batch.task.latents_BTC[0], latents)
        assert torch.equal(batch.task.context_BTC[0], sample.context_latents[:50])


def test_shorter_prompts_are_padded_behind_a_mask(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path, base, (40, 40, 40), rows=(9, 11, 6))
    (batch,) = prepare(tiny_config(batch_size=3), base, songs, tmp_path / "run").batches.epoch(0)
    assert batch.task.rows_BL is not None
    rows = dict(zip(batch.names, batch.task.rows_BL.sum(1).tolist(), strict=True))
    assert rows == {"song_0": 9, "song_1": 11, "song_2": 6}
    assert batch.task.condition_BLD.shape[1] == 11


def test_prompts_of_one_length_need_no_mask(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path, base, (40, 40))
    (batch,) = prepare(tiny_config(batch_size=2), base, songs, tmp_path / "run").batches.epoch(0)
    assert batch.task.rows_BL is None


def test_samples_lose_their_prompt_one_by_one_at_the_ratio_of_the_recipe(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path, base, (4,) * 4)
    config = tiny_config(batch_size=4, dataset_repeats=250)
    batches = prepare(config, base, songs, tmp_path / "run").batches
    dropped = torch.stack([batch.task.is_dropped_B for batch in batches.epoch(0)]).float()
    assert resolve_recipe(config, name="fixed", is_turbo=False).cfg_ratio == 0.15
    # 1000 draws: four standard deviations are 0.045. Whole batches at once would vary far more between rows.
    assert abs(dropped.mean().item() - 0.15) < 0.045
    assert (dropped.sum(1) == 4).sum() < 5


@pytest.mark.parametrize(("recipe", "variant"), [("vanilla", "base"), ("fixed", "turbo")])
def test_vanilla_and_turbo_never_lose_a_prompt_and_draw_the_eight_timesteps(
    tmp_path: Path, request: pytest.FixtureRequest, recipe: str, variant: str
):
    checkpoint: Checkpoint = request.getfixturevalue(variant)
    songs = write_songs(tmp_path, checkpoint, (4,) * 4)
    config = tiny_config(batch_size=4, dataset_repeats=50, cfg_ratio=0.0 if recipe == "vanilla" else None)
    if recipe == "vanilla":
        config = tiny_config(batch_size=4, dataset_repeats=50, cfg_ratio=0.0, timestep_mode="discrete", shift=3.0)
    batches = list(prepare(config, checkpoint, songs, tmp_path / "run", recipe=recipe).batches.epoch(0))
    assert not torch.stack([batch.task.is_dropped_B for batch in batches]).any()
    drawn = {round(t, 4) for batch in batches for t in batch.task.timesteps_B.tolist()}
    assert drawn == {1.0, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_song_that_goes_bad_while_training_is_named(tmp_path: Path, base: Checkpoint, workers: int):
    songs = write_songs(tmp_path, base, (40, 40))
    batches = prepare(tiny_config(num_workers=workers), base, songs, tmp_path / "run").batches
    (songs / "song_1.pt").write_bytes(b"PK\x03\x04 and nothing more")
    with pytest.raises(DataError, match="song_1"):
        list(batches.epoch(0))


def read_first(epoch: Iterator[Batch]) -> BaseProcess:
    """Read the first batch and give the process that read it."""
    before = set(multiprocessing.active_children())
    next(epoch)
    (worker,) = set(multiprocessing.active_children()) - before
    return worker


def one_reader(tmp_path: Path, checkpoint: Checkpoint) -> Iterator[Batch]:
    songs = write_songs(tmp_path, checkpoint, (40,) * 3)
    config = tiny_config(num_workers=1, dataset_repeats=10, prefetch_factor=1, persistent_workers=False)
    return prepare(config, checkpoint, songs, tmp_path / "run").batches.epoch(0)


def test_a_reading_process_that_is_killed_is_explained(tmp_path: Path, base: Checkpoint):
    epoch = one_reader(tmp_path, base)
    read_first(epoch).kill()
    with pytest.raises(ReadingError, match="was killed") as caught:
        list(epoch)
    assert "--num-workers 0" in caught.value.hint


def test_a_reading_process_goes_on_when_its_whole_group_is_told_to_stop(tmp_path: Path, base: Checkpoint):
    epoch = one_reader(tmp_path, base)
    worker = read_first(epoch)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid or 0, number)
    assert len(list(epoch)) == 29


def test_a_reading_process_ends_when_it_is_told_twice(tmp_path: Path, base: Checkpoint):
    epoch = one_reader(tmp_path, base)
    worker = read_first(epoch)
    while worker.is_alive():
        worker.terminate()
        worker.join(0.2)
    assert worker.exitcode == -signal.SIGTERM


def test_what_was_grouped_is_reported(tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    songs = write_songs(tmp_path, base, (50, 50, 60, 100))

    def notices(**changes: object) -> list[str]:
        events: list[object] = []
        prepare(tiny_config(**changes), base, songs, tmp_path / "run", emit=events.append)
        return [event.text for event in events if isinstance(event, Notice)]

    assert notices() == []
    assert notices(batch_size=3) == [
        "4 songs in 2 groups of equal length for batches of 3; 1 cropped, by 0.4 s at most; "
        "1 groups do not fill a batch (--chunk-duration makes lengths equal)."
    ]
    assert notices(chunk_duration=2.0) == ["4 songs in windows of 2 s."]
    assert notices(chunk_duration=3.0, batch_size=3) == [
        "1 songs in windows of 3 s; 3 shorter ones whole, 1 cropped, by 0.4 s at most."
    ]
    assert notices(chunk_duration=4.0) == ["1 songs in windows of 4 s; 3 shorter ones whole."]
    # Captured passes crop songs that are alone in their batch too, and by more than a second.
    monkeypatch.setattr(assemble, "can_capture", lambda device: True)
    assert notices() == ["Of 4 songs 4 cropped, by 2.1 s at most: on a GPU each length takes time to get ready."]
