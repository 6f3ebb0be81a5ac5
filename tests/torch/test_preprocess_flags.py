"""The flags of `--preprocess`, typed: which songs become tensors, how long and how loud, and on which device."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from sidestep.listen import samples
from sidestep.main import main
from sidestep.model.checkpoint import Checkpoint
from sidestep.preprocess import run as preprocessing
from sidestep.preprocess.encode_audio import load_wave
from sidestep.preprocess.tensors import read_sample, sample_paths
from tests.torch.command_line import NAME
from tests.torch.tiny import tiny_config, write_songs

REFERENCE = Path(__file__).parents[1] / "golden" / "reference" / "checkpoints"
RATE = 48_000


def write_song(path: Path, *, seconds: float = 0.2, level: float = 0.25) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = level * np.sin(2 * np.pi * 440 * np.arange(round(seconds * RATE)) / RATE)
    soundfile.write(path, np.stack([wave, wave], axis=1), RATE, subtype="FLOAT")


def preprocess(tensors: Path, *words: object) -> int:
    paths = ["-c", str(REFERENCE), "-M", "turbo", "--tensor-output", str(tensors)]
    return main(["fixed", "--preprocess", *paths, "--device", "cpu", "--plain", *map(str, words)])


@pytest.fixture
def waves(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What the VAE is given, song by song."""
    heard: list[torch.Tensor] = []

    def listen(*arguments: Any, **named: Any) -> torch.Tensor:
        heard.append(load_wave(*arguments, **named))
        return heard[-1]

    monkeypatch.setattr(preprocessing, "load_wave", listen)
    return heard


def test_songs_of_the_folder_become_tensors_where_it_was_typed(tmp_path: Path):
    write_song(tmp_path / "songs" / "a.wav")
    write_song(tmp_path / "songs" / "deeper" / "b.wav")
    assert preprocess(tmp_path / "tensors", "--audio-dir", tmp_path / "songs") == 0
    names = [read_sample(path).metadata["audio_path"] for path in sample_paths(tmp_path / "tensors")]
    assert names == ["a.wav", "deeper/b.wav"]


def test_a_dataset_file_says_which_songs_and_what_they_are(tmp_path: Path):
    for name in ("a.wav", "b.wav"):
        write_song(tmp_path / "songs" / name)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"samples": [{"audio_path": "songs/b.wav", "caption": "brass"}]}), encoding="utf-8")
    assert preprocess(tmp_path / "tensors", "--dataset-json", path) == 0
    (tensors,) = sample_paths(tmp_path / "tensors")
    assert (read_sample(tensors).metadata["filename"], read_sample(tensors).metadata["caption"]) == ("b.wav", "brass")


@pytest.mark.parametrize("listed", [False, True])
def test_a_song_that_is_left_out_while_they_are_looked_for_counts_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], listed: bool
):
    write_song(tmp_path / "songs" / "a.wav")
    (tmp_path / "songs" / "b.mp3").write_text("I am no song")
    if listed:
        samples = [{"audio_path": "a.wav"}, {"audio_path": "gone.wav"}]
        (tmp_path / "songs" / "dataset.json").write_text(json.dumps({"samples": samples}), encoding="utf-8")
    assert preprocess(tmp_path / "tensors", "--audio-dir", tmp_path / "songs") == 1
    assert "1 songs encoded, 0 unchanged, 1 skipped" in capsys.readouterr().out


def test_an_output_folder_that_is_taken_is_refused_before_the_songs_are_encoded(tmp_path: Path):
    write_song(tmp_path / "songs" / "a.wav")
    words = ["--audio-dir", tmp_path / "songs", "-o", tmp_path, "--run-name", "songs"]
    assert preprocess(tmp_path / "tensors", *words) == 2
    assert (tmp_path / "songs" / "a.wav").is_file()
    assert not (tmp_path / "tensors").exists()


def test_the_config_of_a_model_is_not_taken_for_a_runs(tmp_path: Path):
    write_song(tmp_path / "songs" / "a.wav")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "acestep"}')
    assert preprocess(tmp_path / "tensors", "--audio-dir", tmp_path / "songs", "-o", tmp_path / "model") == 2
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]
    assert "acestep" in (tmp_path / "model" / "config.json").read_text()


def test_songs_are_cut_at_the_duration(tmp_path: Path, waves: list[torch.Tensor]):
    write_song(tmp_path / "songs" / "a.wav", seconds=0.5)
    assert preprocess(tmp_path / "tensors", "--audio-dir", tmp_path / "songs", "--max-duration", 0.12) == 0
    assert waves[0].shape == (2, round(0.12 * RATE))
    assert read_sample(sample_paths(tmp_path / "tensors")[0]).target_latents.shape[0] == 3


def test_songs_are_brought_to_the_peak(tmp_path: Path, waves: list[torch.Tensor]):
    write_song(tmp_path / "songs" / "a.wav")
    peaks = []
    for name, words in (("none", ["none"]), ("usual", ["peak"]), ("typed", ["peak", "--target-db", "-6"])):
        assert preprocess(tmp_path / name, "--audio-dir", tmp_path / "songs", "--normalize", *words) == 0
        peaks.append(waves[-1].abs().max().item())
    assert peaks == pytest.approx([0.25, 10 ** (-1 / 20), 10 ** (-6 / 20)], rel=1e-3)


def test_songs_are_brought_to_the_loudness(tmp_path: Path, waves: list[torch.Tensor]):
    # Loudness is measured in blocks of 0.4 s.
    write_song(tmp_path / "songs" / "a.wav", seconds=0.5)
    sizes = []
    for name, words in (("usual", []), ("typed", ["--target-lufs", "-20"])):
        assert preprocess(tmp_path / name, "--audio-dir", tmp_path / "songs", "--normalize", "lufs", *words) == 0
        sizes.append(waves[-1].square().mean().sqrt().item())
    assert sizes[0] / sizes[1] == pytest.approx(10 ** (6 / 20), rel=1e-3)
    # Two equal channels count twice, 3.01 dB; the weighting of the measure is small at 440 Hz.
    assert 20 * np.log10(sizes[1]) == pytest.approx(-20 - 3.01, abs=1.3)


def test_tensors_are_stored_in_the_precision(tmp_path: Path):
    write_song(tmp_path / "songs" / "a.wav")
    assert preprocess(tmp_path / "tensors", "--audio-dir", tmp_path / "songs", "--precision", "bf16") == 0
    assert read_sample(sample_paths(tmp_path / "tensors")[0]).target_latents.dtype == torch.bfloat16


def test_with_an_output_folder_training_follows(tmp_path: Path):
    write_song(tmp_path / "songs" / "a.wav")
    words = ["--audio-dir", tmp_path / "songs", "-o", tmp_path / "out", "--epochs", 1, "--run-name", NAME]
    assert preprocess(tmp_path / "tensors", *words, "--num-workers", 0, "--rank", 2) == 0
    assert (tmp_path / "out" / NAME / "adapter_model.safetensors").is_file()


class Devices:
    """Stands before the loaders, notes the device that each is asked for, and loads on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, *names: str) -> None:
        self.asked: dict[str, str] = {}
        for name in names:
            monkeypatch.setattr(module, name, self._noting(name, getattr(module, name)))

    def _noting(self, name: str, load: Any) -> Any:
        def noting(*arguments: Any, device: torch.device, **named: Any) -> Any:
            self.asked[name] = device.type
            return load(*arguments, device=torch.device("cpu"), **named)

        return noting


@pytest.mark.parametrize("offload", [True, False])
def test_the_encoders_of_words_and_conditions_stay_off_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offload: bool
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    loaders = ("load_vae", "load_text_encoder", "load_condition_encoder")
    devices = Devices(monkeypatch, preprocessing, *loaders)
    write_song(tmp_path / "songs" / "a.wav")
    words = ["--audio-dir", tmp_path / "songs", "--device", "cuda", "--precision", "fp32"]
    assert preprocess(tmp_path / "tensors", *words, "--offload-encoder" if offload else "--no-offload-encoder") == 0
    wanted = "cpu" if offload else "cuda"
    assert devices.asked == {"load_vae": "cuda", "load_text_encoder": wanted, "load_condition_encoder": wanted}


def test_the_prompts_of_samples_are_encoded_off_the_gpu_too(
    tmp_path: Path, turbo: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    asked = []
    monkeypatch.setattr(samples, "encode_prompts", lambda *_, device, **__: asked.append(device.type))
    monkeypatch.setattr(samples, "choose_device", lambda name: torch.device("cuda"))
    songs = write_songs(tmp_path / "songs", turbo, (20,))
    for offload in (True, False):
        samples.prepare_wordings(tiny_config(offload_encoder=offload), turbo, songs)
    assert asked == ["cpu", "cuda"]
