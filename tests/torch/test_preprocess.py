"""From songs to a folder of tensors: deterministic, incremental, song by song, never half-written."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from sidestep.data.dataset_file import Dataset, Track
from sidestep.demo.checkpoint import build_toy_checkpoint
from sidestep.errors import DataError, ModelError, RunError
from sidestep.events import StageDone, StageStarted, TrackDone, TrackSkipped
from sidestep.files import held_alone
from sidestep.listen.conditions import encode_prompts
from sidestep.listen.prompts import SamplePrompt
from sidestep.model.checkpoint import Checkpoint, Layout, encoder_fingerprint, find_checkpoint
from sidestep.preprocess import run as run_module
from sidestep.preprocess.parts import has_part, write_part
from sidestep.preprocess.plan import tensor_name
from sidestep.preprocess.run import LOCK_NAME, PreprocessResult, preprocess
from sidestep.preprocess.tensors import read_sample, sample_paths

CHECKPOINTS = Path(__file__).parents[1] / "golden" / "reference" / "checkpoints"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return find_checkpoint(CHECKPOINTS, "turbo")


def write_song(path: Path, *, seconds: float = 0.22, hertz: float = 440.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * 48000)) / 48000)
    soundfile.write(path, np.stack([samples, samples], axis=1), 48000)


def make_track(folder: Path, name: str, **fields: object) -> Track:
    settings = {"caption": f"the song {name}", "lyrics": "[Verse]\nla la la", "language": "en", "duration": 3} | fields
    return Track(id="0123abcd", audio_path=folder / name, name=name, **settings)


def make_dataset(folder: Path, *names: str) -> Dataset:
    for number, name in enumerate(names):
        write_song(folder / name, hertz=220.0 * (number + 1))
    return Dataset(folder=folder, tracks=tuple(make_track(folder, name) for name in names), name="songs")


def run(dataset: Dataset, output: Path, checkpoint: Checkpoint, **changes: object) -> tuple[PreprocessResult, list]:
    events: list = []
    settings: dict = {
        "checkpoint": checkpoint,
        "output": output,
        "max_duration": 240.0,
        "normalize": "none",
        "target_db": -1.0,
        "target_lufs": -14.0,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "emit": events.append,
    }
    return preprocess(dataset, **(settings | changes)), events


def stages(events: list) -> list[tuple[str, int]]:
    return [(event.title, event.total) for event in events if isinstance(event, StageStarted)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.pt")}


def test_songs_become_tensors_with_everything_training_needs(tmp_path: Path, checkpoint: Checkpoint) -> None:
    dataset = replace(make_dataset(tmp_path / "songs", "a.wav", "disc 1/ü.wav"), custom_tag="band")
    result, events = run(dataset, tmp_path / "tensors", checkpoint)
    assert result == PreprocessResult(done=2, unchanged=0, skipped=0, removed=0)
    assert stages(events) == [
        ("Looking for what changed", 2),
        ("Pass 1: audio", 2),
        ("Pass 1: text", 2),
        ("Pass 2: conditions and tensor files", 2),
    ]
    assert sum(isinstance(event, TrackDone) for event in events) == 8
    assert [event.skipped for event in events if isinstance(event, StageDone)] == [0, 0, 0, 0]

    paths = sample_paths(tmp_path / "tensors")
    assert [path.name for path in paths] == [tensor_name("a.wav"), tensor_name("disc 1/ü.wav")]
    assert paths[1].name.startswith("disc 1__ü-")
    sample = read_sample(paths[1])
    assert sample.target_latents.shape == (5, 64)  # 0.22 s are 5.5 frames
    assert sample.context_latents.shape == (5, 128)
    metadata = sample.metadata
    assert sample.encoder_hidden_states.shape == (metadata["caption_tokens"] + 1 + metadata["lyric_tokens"], 40)
    assert metadata["prompt"].splitlines()[4] == "band, the song disc 1/ü.wav"
    assert metadata["lyrics_prompt"] == "# Languages\nen\n\n# Lyric\n[Verse]\nla la la<|endoftext|>"
    assert metadata["encoder_fingerprint"] == encoder_fingerprint(checkpoint)
    assert (metadata["audio_path"], metadata["filename"]) == ("disc 1/ü.wav", "ü.wav")
    assert (metadata["format_version"], metadata["preprocess_mode"], metadata["model_variant"]) == (2, "lora", "turbo")
    assert (metadata["caption_truncated"], metadata["lyrics_truncated"]) == (0, 0)

    manifest = json.loads((tmp_path / "tensors" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["samples"] == [path.name for path in paths]
    assert (manifest["num_samples"], manifest["metadata"]["custom_tag"]) == (2, "band")
    meta = json.loads((tmp_path / "tensors" / "preprocess_meta.json").read_text(encoding="utf-8"))
    assert (meta["total"], meta["processed"], meta["failed"], meta["model_variant"]) == (2, 2, 0, "turbo")
    assert meta["songs"] == {tensor_name("a.wav"): "a.wav", tensor_name("disc 1/ü.wav"): "disc 1/ü.wav"}
    assert set(meta["checksums"]) == set(meta["songs"])
    assert not (tmp_path / "tensors" / ".pass1").exists()


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_the_words_of_a_song_come_to_what_a_sample_is_prompted_with(tmp_path: Path, layout: Layout) -> None:
    model = find_checkpoint(build_toy_checkpoint(tmp_path / "model", variant="base", layout=layout), "base")
    dataset = make_dataset(tmp_path / "songs", "a.wav")
    run(dataset, tmp_path / "tensors", model)
    (path,), (track,) = sample_paths(tmp_path / "tensors"), dataset.tracks
    prompt = SamplePrompt(caption=track.caption, lyrics=track.lyrics, language=track.language)
    (wording,) = encode_prompts(model, [prompt], seconds=3, seed=0, device=torch.device("cpu"), dtype=torch.float32)
    torch.testing.assert_close(read_sample(path).encoder_hidden_states, wording.rows_BLD[0], atol=1e-5, rtol=1e-5)


def test_the_same_songs_and_settings_give_the_same_bytes(tmp_path: Path, checkpoint: Checkpoint) -> None:
    run(make_dataset(tmp_path / "x", "a.wav", "b.wav"), tmp_path / "first", checkpoint)
    run(make_dataset(tmp_path / "moved" / "x", "a.wav", "b.wav"), tmp_path / "second", checkpoint)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert (tmp_path / "first/manifest.json").read_bytes() == (tmp_path / "second/manifest.json").read_bytes()


def test_unchanged_songs_are_not_done_again(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset(tmp_path / "songs", "a.wav", "b.wav")
    run(dataset, tmp_path / "tensors", checkpoint)
    before = contents(tmp_path / "tensors")
    for name in ("load_vae", "load_text_encoder", "load_condition_encoder"):
        monkeypatch.delattr(run_module, name)  # Nothing is loaded, so nothing is missed.
    result, events = run(dataset, tmp_path / "tensors", checkpoint)
    assert result == PreprocessResult(done=0, unchanged=2, skipped=0, removed=0)
    assert [event.unchanged for event in events if isinstance(event, TrackDone)] == [True, True]
    assert contents(tmp_path / "tensors") == before


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        (lambda track: replace(track, repeat=3), []),
        (lambda track: replace(track, caption="another"), ["Pass 1: text"]),
        (lambda track: replace(track, lyrics="other words"), ["Pass 1: text"]),
    ],
)
def test_only_what_changed_is_encoded_again_and_equals_a_fresh_run(
    tmp_path: Path, checkpoint: Checkpoint, change: Callable[[Track], Track], redone: list[str]
) -> None:
    dataset = make_dataset(tmp_path / "songs", "a.wav", "b.wav")
    run(dataset, tmp_path / "tensors", checkpoint)
    changed = replace(dataset, tracks=(change(dataset.tracks[0]), dataset.tracks[1]))
    result, events = run(changed, tmp_path / "tensors", checkpoint)
    assert (result.done, result.unchanged) == (1, 1)
    assert [title for title, _ in stages(events)[1:-1]] == redone
    run(changed, tmp_path / "fresh", checkpoint)
    assert contents(tmp_path / "tensors") == contents(tmp_path / "fresh")


def test_changed_audio_or_level_is_encoded_again_but_its_words_are_not(tmp_path: Path, checkpoint: Checkpoint) -> None:
    dataset = make_dataset(tmp_path / "songs", "a.wav", "b.wav")
    run(dataset, tmp_path / "tensors", checkpoint)
    write_song(tmp_path / "songs" / "a.wav", hertz=555.0)
    result, events = run(dataset, tmp_path / "tensors", checkpoint)
    assert (result.done, stages(events)[1:]) == (1, [("Pass 1: audio", 1), ("Pass 2: conditions and tensor files", 1)])
    # A target that the level does not depend on changes nothing.
    assert run(dataset, tmp_path / "tensors", checkpoint, target_db=-3.0)[0].unchanged == 2
    assert run(dataset, tmp_path / "tensors", checkpoint, normalize="peak")[0].done == 2
    assert run(dataset, tmp_path / "tensors", checkpoint, normalize="peak", target_db=-3.0)[0].done == 2
    run(dataset, tmp_path / "fresh", checkpoint, normalize="peak", target_db=-3.0)
    assert contents(tmp_path / "tensors") == contents(tmp_path / "fresh")


def test_another_precision_is_stored_and_makes_other_tensors(tmp_path: Path, checkpoint: Checkpoint) -> None:
    dataset = make_dataset(tmp_path / "songs", "a.wav")
    run(dataset, tmp_path / "tensors", checkpoint)
    assert run(dataset, tmp_path / "tensors", checkpoint, dtype=torch.bfloat16)[0].done == 1
    sample = read_sample(tmp_path / "tensors" / tensor_name("a.wav"))
    tensors = (sample.target_latents, sample.encoder_hidden_states, sample.context_latents)
    assert [tensor.dtype for tensor in tensors] == [torch.bfloat16] * 3


def test_songs_that_cannot_be_used_are_named_and_the_rest_goes_on(tmp_path: Path, checkpoint: Checkpoint) -> None:
    folder = tmp_path / "songs"
    dataset = make_dataset(folder, "a.wav", "b.wav", "c.wav", "d.wav")
    (folder / "b.wav").write_text("this is no audio")
    (folder / "c.wav").unlink()
    soundfile.write(folder / "d.wav", np.full((24000, 2), np.nan, dtype=np.float32), 48000, subtype="FLOAT")
    result, events = run(dataset, tmp_path / "tensors", checkpoint)
    assert result == PreprocessResult(done=1, unchanged=0, skipped=3, removed=0)
    skipped = {event.name: event.reason for event in events if isinstance(event, TrackSkipped)}
    assert sorted(skipped) == ["b.wav", "c.wav", "d.wav"]
    assert sample_paths(tmp_path / "tensors") == [tmp_path / "tensors" / tensor_name("a.wav")]
    # The song is mended: only it is done.
    write_song(folder / "b.wav", hertz=440.0)
    assert run(dataset, tmp_path / "tensors", checkpoint)[0] == PreprocessResult(1, 1, 2, 0)


def test_no_usable_song_is_an_error(tmp_path: Path, checkpoint: Checkpoint) -> None:
    dataset = make_dataset(tmp_path / "songs", "a.wav")
    (tmp_path / "songs" / "a.wav").write_text("this is no audio")
    with pytest.raises(DataError, match="None of the 1 songs"):
        run(dataset, tmp_path / "tensors", checkpoint)
    with pytest.raises(DataError, match="no songs"):
        run(replace(dataset, tracks=()), tmp_path / "tensors", checkpoint)
    assert not list((tmp_path / "tensors").glob("*.pt"))


@pytest.mark.parametrize("module", ["vae", "text"])
def test_numbers_that_are_not_finite_fail_that_song_by_name(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    dataset = make_dataset(tmp_path / "songs", "a.wav", "b.wav")
    name = {"vae": "encode_wave", "text": "encode_tokens"}[module]
    original = getattr(run_module, name)
    calls: list[int] = []

    def spoiled(*arguments: object, **settings: object) -> object:
        encoded = original(*arguments, **settings)
        calls.append(1)
        if len(calls) == 1:
            (encoded if module == "vae" else encoded[0].text).view(-1)[3] = torch.nan
        return encoded

    monkeypatch.setattr(run_module, name, spoiled)
    result, events = run(dataset, tmp_path / "tensors", checkpoint)
    (skipped,) = [event for event in events if isinstance(event, TrackSkipped)]
    assert (result.done, result.skipped, skipped.name) == (1, 1, "a.wav")
    assert "not finite" in skipped.reason


@pytest.mark.parametrize("place", ["load_wave", "encode_tokens", "encode_conditions"])
def test_an_interrupted_run_leaves_nothing_partial_and_goes_on(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    dataset = make_dataset(tmp_path / "songs", "a.wav", "b.wav", "c.wav")
    original = getattr(run_module, place)
    calls: list[int] = []

    def interrupted(*arguments: object, **settings: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(dataset, tmp_path / "tensors", checkpoint)
    assert not list((tmp_path / "tensors").rglob("*.writing"))
    with pytest.raises(DataError, match="interrupted"):
        sample_paths(tmp_path / "tensors")
    result, events = run(dataset, tmp_path / "tensors", checkpoint)
    assert result.done + result.unchanged == 3
    left = {"load_wave": ("Pass 1: audio", 2), "encode_tokens": ("Pass 1: text", 2)}
    assert stages(events)[1] == left.get(place, ("Pass 2: conditions and tensor files", 2))
    run(dataset, tmp_path / "fresh", checkpoint)
    assert contents(tmp_path / "tensors") == contents(tmp_path / "fresh")


def test_what_the_first_pass_kept_holds_for_its_key_alone(tmp_path: Path) -> None:
    (tmp_path / ".pass1").mkdir()
    write_part(tmp_path, "song", {"latents": torch.ones(2)}, key="one")
    assert has_part(tmp_path, "song", key="one")
    assert not has_part(tmp_path, "song", key="two")
    assert not has_part(tmp_path, "other", key="one")
    (tmp_path / ".pass1" / "song.safetensors").write_bytes(b"damaged")
    assert not has_part(tmp_path, "song", key="one")


def test_a_damaged_tensor_file_is_written_anew(tmp_path: Path, checkpoint: Checkpoint) -> None:
    dataset = make_dataset(tmp_path / "songs", "a.wav")
    run(dataset, tmp_path / "tensors", checkpoint)
    path = tmp_path / "tensors" / tensor_name("a.wav")
    whole = path.read_bytes()
    path.write_bytes(whole[:3000])
    assert run(dataset, tmp_path / "tensors", checkpoint)[0].done == 1
    assert path.read_bytes() == whole


def test_names_that_could_collide_get_files_of_their_own() -> None:
    names = ["a.wav", "a.flac", "A.wav", "x/y.wav", "x__y.wav", "x/y.mp3", "a.b.wav", "ü.wav"]
    files = [tensor_name(name) for name in names]
    assert len({file.casefold() for file in files}) == len(names)
    assert tensor_name("a.wav") == tensor_name("a.wav")


@pytest.mark.parametrize(
    "name", [".hidden.wav", 'q?:"*<>|\\.wav', "x" * 250 + ".wav", "\U0001f3b5" * 60 + ".wav", "..wav"]
)
def test_every_name_becomes_one_that_any_file_system_takes(name: str) -> None:
    file = tensor_name(name)
    assert len(file.encode()) < 150
    assert not file.startswith(".")
    assert not set(file) & set('<>:"/\\|?*')
    assert file.endswith(".pt")
    assert not file.endswith(".tmp.pt")


def test_a_song_without_a_duration_is_said_to_last_as_long_as_its_file(tmp_path: Path, checkpoint: Checkpoint) -> None:
    write_song(tmp_path / "songs" / "a.wav", seconds=2.4)
    track = make_track(tmp_path / "songs", "a.wav", duration=0)
    run(Dataset(folder=tmp_path / "songs", tracks=(track,)), tmp_path / "tensors", checkpoint)
    metadata = read_sample(tmp_path / "tensors" / tensor_name("a.wav")).metadata
    assert metadata["duration"] == 2
    assert "- duration: 2 seconds\n" in metadata["prompt"]


def test_a_cropped_song_has_the_frames_and_the_duration_of_the_crop(tmp_path: Path, checkpoint: Checkpoint) -> None:
    write_song(tmp_path / "songs" / "a.wav", seconds=3.2)
    dataset = Dataset(folder=tmp_path / "songs", tracks=(make_track(tmp_path / "songs", "a.wav"),))
    run(dataset, tmp_path / "tensors", checkpoint, max_duration=1.0)
    sample = read_sample(tmp_path / "tensors" / tensor_name("a.wav"))
    assert sample.target_latents.shape[0] == 25
    assert "- duration: 1 seconds\n" in sample.metadata["prompt"]


def test_a_full_disk_is_one_error_and_the_next_run_goes_on(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset(tmp_path / "songs", "a.wav")

    def full(_file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(RunError, match="The disk is full"):
            run(dataset, tmp_path / "tensors", checkpoint)
    assert {path.name for path in (tmp_path / "tensors").rglob("*")} == {".pass1", LOCK_NAME}
    assert run(dataset, tmp_path / "tensors", checkpoint)[0].done == 1


def test_full_memory_is_one_error(tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object, **_settings: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run_module, "encode_wave", full)
    with pytest.raises(RunError, match="memory of cpu is full"):
        run(make_dataset(tmp_path / "songs", "a.wav"), tmp_path / "tensors", checkpoint)


def test_an_output_that_cannot_be_a_folder_is_one_error(tmp_path: Path, checkpoint: Checkpoint) -> None:
    (tmp_path / "tensors").write_text("a file")
    with pytest.raises(RunError, match="cannot be written"):
        run(make_dataset(tmp_path / "songs", "a.wav"), tmp_path / "tensors", checkpoint)


def test_a_missing_part_of_the_model_is_said_before_anything_is_written(tmp_path: Path, checkpoint: Checkpoint) -> None:
    dataset = make_dataset(tmp_path / "songs", "a.wav")
    with pytest.raises(ModelError, match="VAE is missing"):
        run(dataset, tmp_path / "tensors", replace(checkpoint, vae=tmp_path / "vae"))
    assert not (tmp_path / "tensors").exists()


def test_a_second_process_is_kept_out_and_disturbs_nothing(tmp_path: Path, checkpoint: Checkpoint) -> None:
    dataset, output = make_dataset(tmp_path / "songs", "a.wav"), tmp_path / "tensors"
    write_part(output, "kept", {"latents": torch.ones(2)}, key="one")
    with held_alone(output / LOCK_NAME, taken=RunError("never")), pytest.raises(RunError, match="Another Side-Step"):
        run(dataset, output, checkpoint)
    assert has_part(output, "kept", key="one")
    assert run(dataset, output, checkpoint)[0].done == 1
