"""Songs that overlap come to the same tensors, reports and errors as songs one after the other."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sidestep.data.prompts import Prompt
from sidestep.demo.checkpoint import build_toy_checkpoint
from sidestep.errors import DataError, RunError
from sidestep.events import Event, Notice, StageDone, TrackDone, TrackSkipped
from sidestep.model.checkpoint import Checkpoint, find_checkpoint
from sidestep.model.loading import load_condition_encoder, load_silence_latent, load_text_encoder
from sidestep.preprocess import run as run_module
from sidestep.preprocess.encode_condition import encode_condition, encode_conditions, encode_timbre
from sidestep.preprocess.encode_text import encode_prompt, encode_tokens, tokenize_prompt
from sidestep.preprocess.plan import tensor_name
from sidestep.preprocess.stage import READ_AHEAD_SECONDS, Flow, Work, Written, run_stage
from sidestep.preprocess.tensors import read_sample, sample_paths
from tests.torch.test_preprocess import CHECKPOINTS, contents, make_dataset, run

OVERLAPPED = Flow(threads=3, rows=0)
TOGETHER = Flow(threads=3, rows=600)
NAMES = tuple(f"{letter}.wav" for letter in "abcde")
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return find_checkpoint(CHECKPOINTS, "turbo")


@dataclass(frozen=True)
class Piece:
    """A song as far as a stage knows it."""

    name: str
    seconds: float = 1.0


def told(events: Sequence[Event]) -> list[object]:
    """The events without their times, and without the notices that songs do not cause."""
    return [
        (event.title, event.done, event.skipped) if isinstance(event, StageDone) else event
        for event in events
        if not isinstance(event, Notice)
    ]


def test_overlapping_songs_come_to_the_same_bytes_and_the_same_reports(tmp_path: Path, checkpoint: Checkpoint) -> None:
    dataset = make_dataset(tmp_path / "songs", *NAMES)
    (tmp_path / "songs" / "c.wav").write_bytes(b"no sound")
    plain, before = run(dataset, tmp_path / "plain", checkpoint)
    overlapped, after = run(dataset, tmp_path / "overlapped", checkpoint, flow=OVERLAPPED)
    assert overlapped == plain
    assert plain.skipped == 1
    assert told(after) == told(before)
    assert contents(tmp_path / "overlapped") == contents(tmp_path / "plain")


def test_words_encoded_together_come_to_the_same_numbers_but_for_rounding(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    dataset = make_dataset(tmp_path / "songs", *NAMES)
    run(dataset, tmp_path / "apart", checkpoint)
    _, events = run(dataset, tmp_path / "together", checkpoint, flow=TOGETHER)
    done = [event.name for event in events if isinstance(event, TrackDone)]
    assert done == list(NAMES) * 4
    for apart, together in zip(sample_paths(tmp_path / "apart"), sample_paths(tmp_path / "together"), strict=True):
        one, other = read_sample(apart), read_sample(together)
        assert one.metadata == other.metadata
        assert torch.equal(one.target_latents, other.target_latents)
        torch.testing.assert_close(one.encoder_hidden_states, other.encoder_hidden_states, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("variant", ["turbo", "xl-turbo"])
def test_prompts_and_lyrics_of_any_lengths_can_share_a_pass(tmp_path: Path, variant: str) -> None:
    checkpoint = find_checkpoint(build_toy_checkpoint(tmp_path, variant=variant), variant)
    tokenizer, text_encoder = load_text_encoder(checkpoint, **CPU)
    encoder = load_condition_encoder(checkpoint, **CPU)
    timbre = load_silence_latent(checkpoint, frames=750)
    prompts = [Prompt(text="a song " * n, lyrics="la la " * m) for n, m in ((3, 40), (30, 1), (1, 90))]
    apart = [encode_prompt(tokenizer, text_encoder, prompt) for prompt in prompts]
    together = encode_tokens(text_encoder, [tokenize_prompt(tokenizer, prompt) for prompt in prompts])
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(one.text, other.text, atol=1e-5, rtol=1e-5)
        assert torch.equal(one.lyrics, other.lyrics)
        assert one.counts == other.counts
    words = [(song.text, song.lyrics) for song in apart]
    rows = encode_conditions(encoder, words, timbre_row=encode_timbre(encoder, timbre))
    for (text, lyrics), found in zip(words, rows, strict=True):
        alone = encode_condition(encoder, text=text, lyrics=lyrics, timbre=timbre)
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", ["encode_wave", "encode_tokens", "encode_conditions"])
def test_an_interrupted_run_of_overlapping_songs_leaves_nothing_partial_and_goes_on(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    dataset = make_dataset(tmp_path / "songs", *NAMES)
    original, calls = getattr(run_module, place), []

    def interrupted(*arguments: object, **settings: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(dataset, tmp_path / "tensors", checkpoint, flow=OVERLAPPED)
    assert not list((tmp_path / "tensors").rglob("*.writing"))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("preprocess")]
    (tmp_path / "tensors" / ".a1b2c3d4.writing").write_text("what a killed run leaves")
    result, _ = run(dataset, tmp_path / "tensors", checkpoint, flow=OVERLAPPED)
    assert not list((tmp_path / "tensors").rglob("*.writing"))
    assert result.done + result.unchanged == len(NAMES)
    run(dataset, tmp_path / "fresh", checkpoint)
    assert contents(tmp_path / "tensors") == contents(tmp_path / "fresh")


def test_a_full_disk_ends_overlapping_songs_with_one_error(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset(tmp_path / "songs", *NAMES)

    def full(_file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(RunError, match="The disk is full"):
            run(dataset, tmp_path / "tensors", checkpoint, flow=OVERLAPPED)
    assert run(dataset, tmp_path / "tensors", checkpoint, flow=OVERLAPPED)[0].done == len(NAMES)
    assert (tmp_path / "tensors" / tensor_name("e.wav")).is_file()


def test_songs_are_read_while_another_is_encoded_and_no_more_than_fit() -> None:
    read: list[str] = []
    lock, all_read = threading.Lock(), threading.Event()
    pieces = [Piece(str(number), READ_AHEAD_SECONDS / 3) for number in range(9)]

    def reading(piece: Piece) -> str:
        with lock:
            read.append(piece.name)
            if len(read) == 3:
                all_read.set()
        return piece.name

    def encode(names: Sequence[str]) -> Sequence[str]:
        if names == ["0"]:
            # The memory has room for the one that is encoded and two more.
            assert all_read.wait(60)
            with lock:
                assert len(read) == 3
        return names

    work: Work[Piece, str, str] = Work(read=reading, encode=encode, write=lambda piece, name: Written())
    done = run_stage("Reading", pieces, work, flow=Flow(threads=8, rows=0), emit=lambda event: None)
    assert done == pieces


@pytest.mark.parametrize("lengths", [[240, 240, 240, 240, 240, 1200, 240], [200] * 6 + [1200] * 3, [300] * 9], ids=str)
def test_no_more_music_is_in_memory_than_was_said_whatever_the_lengths(lengths: list[int]) -> None:
    lock, held, most = threading.Lock(), [0.0], [0.0]

    def reading(piece: Piece) -> Piece:
        with lock:
            held[0] += piece.seconds
            most[0] = max(most[0], held[0])
        return piece

    def encode(pieces: Sequence[Piece]) -> Sequence[Piece]:
        with lock:
            held[0] -= sum(piece.seconds for piece in pieces)
        return pieces

    pieces = [Piece(str(number), seconds) for number, seconds in enumerate(lengths)]
    work: Work[Piece, Piece, Piece] = Work(read=reading, encode=encode, write=lambda piece, made: Written())
    run_stage("Reading", pieces, work, flow=Flow(threads=6, rows=0), emit=lambda event: None)
    assert max(lengths) <= most[0] <= READ_AHEAD_SECONDS


def test_songs_share_a_pass_as_far_as_their_padded_rows_allow() -> None:
    passes: list[list[int]] = []
    lengths = [200, 300, 100, 600, 900, 10, 10, 0, 10]
    pieces = [Piece(str(number)) for number in range(len(lengths))]

    def encode(rows: Sequence[int]) -> Sequence[int]:
        passes.append(list(rows))
        return rows

    def read(piece: Piece) -> int:
        if piece.name == "6":
            raise DataError("It cannot be read.")
        return lengths[int(piece.name)]

    work: Work[Piece, int, int] = Work(
        read=read, encode=encode, write=lambda piece, rows: Written(), rows=lambda rows: rows
    )
    events: list[Event] = []
    done = run_stage("Encoding", pieces, work, flow=Flow(threads=2, rows=900), emit=events.append)
    assert passes == [[200, 300, 100], [600], [900], [10], [0], [10]]
    assert [event.name for event in events if isinstance(event, TrackDone | TrackSkipped)] == list("012345678")
    assert [piece.name for piece in done] == list("01234578")


def test_a_stage_says_how_long_it_waited_for_songs() -> None:
    def seconds_waited(flow: Flow, pause: float) -> float:
        def read(piece: Piece) -> Tensor:
            threading.Event().wait(pause)
            return torch.zeros(1)

        events: list[Event] = []
        work: Work[Piece, Tensor, Tensor] = Work(read=read, encode=list, write=lambda piece, tensor: Written())
        run_stage("Reading", [Piece("a"), Piece("b")], work, flow=flow, emit=events.append)
        (done,) = [event for event in events if isinstance(event, StageDone)]
        assert done.waited_seconds <= done.seconds
        return done.waited_seconds

    for flow in (Flow(threads=0, rows=0), OVERLAPPED):
        assert seconds_waited(flow, 0.05) > seconds_waited(flow, 0.0)
