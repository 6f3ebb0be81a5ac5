"""The flags of `sample` and `export`, typed: each does what it says."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from safetensors.torch import load_file

from sidestep.demo.checkpoint import build_toy_checkpoint
from sidestep.main import main
from sidestep.model.checkpoint import Checkpoint, find_checkpoint
from tests.torch.test_exports import SETTINGS, trained

RATE = 48_000


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A base model, a turbo one beside it, and a fine-tune `mine` that does not say what it descends from."""
    root = build_toy_checkpoint(tmp_path_factory.mktemp("models"), variant="base")
    build_toy_checkpoint(root, variant="turbo")
    base = find_checkpoint(root, "base")
    shutil.copytree(base.folder, root / "mine")
    values = json.loads((root / "mine" / "config.json").read_text(encoding="utf-8"))
    del values["model_version"]
    (root / "mine" / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return base


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, models: Checkpoint) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "run"
    trained(folder, models, **SETTINGS["lora"])
    return folder


def sample(models: Checkpoint, output: Path, *words: object) -> dict[str, np.ndarray]:
    """Type a sample and give the sounds by file name; what is said in `words` wins over a short one's settings."""
    typed = [str(word) for word in words]
    usual = {"-M": "base", "--duration": "1", "--steps": "2", "--device": "cpu", "--prompt": "warm synths"}
    if "--prompts" in typed:
        del usual["--prompt"]
    rest = [word for flag, value in usual.items() if flag not in typed for word in (flag, value)]
    assert main(["sample", "-c", str(models.root), "--output", str(output), "--plain", *rest, *typed]) == 0
    return {path.name: soundfile.read(path)[0] for path in sorted(output.glob("*.flac"))}


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory, models: Checkpoint) -> np.ndarray:
    """The sound of the model alone."""
    (sound,) = sample(models, tmp_path_factory.mktemp("usual")).values()
    return sound


@pytest.mark.parametrize(
    "words",
    [
        ["--prompt", "a fast polka"],
        ["--lyrics", "[Verse] la la la"],
        ["--language", "en"],
        ["--bpm", 90],
        ["--keyscale", "C major"],
        ["--timesignature", "3"],
        ["--seed", 7],
        ["--steps", 3],
        ["--guidance", 2],
        ["--shift", 1],
        ["--precision", "bf16"],
        ["-M", "turbo"],
        ["-M", "mine", "--base-model", "turbo"],
    ],
    ids=lambda words: words[-2],
)
def test_every_word_of_a_sample_is_heard(tmp_path: Path, models: Checkpoint, usual: np.ndarray, words: list[Any]):
    ((name, sound),) = sample(models, tmp_path, *words).items()
    assert sound.shape == (RATE, 2)
    assert np.abs(sound - usual).max() > 1e-3
    assert ("seed7" in name) == ("--seed" in words)


def test_the_same_words_give_the_same_sound_and_the_duration_its_length(
    tmp_path: Path, models: Checkpoint, usual: np.ndarray
):
    (sound,) = sample(models, tmp_path / "again", "--seed", 42).values()
    assert np.array_equal(sound, usual)
    (long,) = sample(models, tmp_path / "long", "--duration", 2).values()
    assert long.shape == (2 * RATE, 2)


def test_prompts_come_from_a_file(tmp_path: Path, models: Checkpoint, usual: np.ndarray):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"caption": "warm synths", "seed": 42}, {"caption": "brass", "duration": 2}]))
    sounds = sample(models, tmp_path / "out", "--prompts", path)
    # The second prompt's seed is the next one where it states none.
    assert {name.split("_seed")[0]: sound.shape[0] for name, sound in sounds.items()} == {
        "warm-synths": RATE, "brass": 2 * RATE
    }  # fmt: skip
    assert np.array_equal(sounds["warm-synths_seed42_x0.flac"], usual)


def test_what_no_sample_hears_is_said(tmp_path: Path, models: Checkpoint, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "prompts.txt").write_text("warm synths")
    words = ["--prompts", tmp_path / "prompts.txt", "--lyrics", "[Verse] la", "--bpm", 90, "--strengths", "0.5"]
    sample(models, tmp_path / "out", *words)
    said = capsys.readouterr()
    for flag in ("--lyrics", "--bpm", "--strengths"):
        assert f"{flag} has no effect here" in said.out + said.err
    assert "--keyscale" not in said.out + said.err


def test_a_sample_is_written_into_a_folder_only(tmp_path: Path, models: Checkpoint, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").touch()
    words = ["sample", "-c", str(models.root), "-M", "base", "--prompt", "x", "--output", str(tmp_path / "file")]
    assert main([*words, "--plain"]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_an_adapter_is_heard_at_its_strengths_and_knows_its_model(
    tmp_path: Path, models: Checkpoint, adapter: Path, usual: np.ndarray, capsys: pytest.CaptureFixture[str]
):
    words = ["sample", "-c", str(models.root), "--adapter", str(adapter), "--prompt", "warm synths", "--plain"]
    words += ["--duration", "1", "--steps", "2", "--device", "cpu", "--strengths", "0", "1"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    # Without --model-variant it is the one that the adapter was trained on.
    assert "Loading base" in capsys.readouterr().out
    sounds = [soundfile.read(tmp_path / "out" / f"warm-synths_seed42_x{strength}.flac")[0] for strength in (0, 1)]
    assert np.array_equal(sounds[0], usual)
    assert np.abs(sounds[1] - usual).max() > 1e-3


def test_a_sample_on_a_device_that_is_not_there_is_refused(models: Checkpoint, capsys: pytest.CaptureFixture[str]):
    words = ["sample", "-c", str(models.root), "-M", "base", "--prompt", "x", "--plain"]
    assert main([*words, "--device", "cuda:99"]) == 2
    assert "cuda:99" in capsys.readouterr().err


def export(models: Checkpoint, adapter: Path, output: Path, *words: object) -> int:
    typed = ["-c", str(models.root), "--output", str(output), "--plain", *map(str, words)]
    return main(["export", "--adapter", str(adapter), *typed])


@pytest.mark.parametrize(
    ("target", "file"),
    [
        ("diffusers", "pytorch_lora_weights.safetensors"),
        ("comfyui", "out.safetensors"),
        ("peft", "adapter_config.json"),
        ("merged", "config.json"),
    ],
)
def test_an_adapter_is_exported_for_whom_and_to_where_it_was_typed(
    tmp_path: Path, models: Checkpoint, adapter: Path, target: str, file: str
):
    assert export(models, adapter, tmp_path / "out", "--to", target) == 0
    assert (tmp_path / "out" / file).is_file()


def test_an_export_has_the_rank_that_was_typed(tmp_path: Path, models: Checkpoint, adapter: Path):
    assert export(models, adapter, tmp_path / "out", "--to", "peft", "--rank", 3) == 0
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {3}
    assert export(models, adapter, tmp_path / "other", "--to", "merged", "--rank", 3) == 2


def test_a_name_that_hides_a_merged_turbo_is_pointed_out(
    tmp_path: Path, models: Checkpoint, adapter: Path, capsys: pytest.CaptureFixture[str]
):
    for variant, is_hidden in (("turbo", True), ("base", False)):
        output = tmp_path / variant / "acestep-v15-Merged"
        assert export(models, adapter, output, "--to", "merged", "-M", variant) == 0
        assert ("rename it" in capsys.readouterr().out) is is_hidden


def test_a_dot_in_the_name_of_a_folder_for_the_app_is_pointed_out(
    tmp_path: Path, models: Checkpoint, adapter: Path, capsys: pytest.CaptureFixture[str]
):
    for name, target, is_said in (("my.lora", "peft", True), ("mine", "peft", False), ("my.file", "comfyui", False)):
        assert export(models, adapter, tmp_path / name, "--to", target) == 0
        assert ("rename it" in capsys.readouterr().out) is is_said


@pytest.mark.parametrize(
    ("settings", "is_for_it"),
    [(SETTINGS["lora"], True), (SETTINGS["dora"], False), ({**SETTINGS["lora"], "bias": "all"}, False)],
)
def test_an_export_names_acestep_cpp_only_where_it_reads_it(
    tmp_path: Path, models: Checkpoint, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], is_for_it: bool
):
    trained(tmp_path / "run", models, **settings)
    assert export(models, tmp_path / "run", tmp_path / "out", "--to", "peft", "-M", "base") == 0
    said = capsys.readouterr().out
    assert ("ACE-Step's app, PEFT, acestep.cpp: give them" in said) is is_for_it
    assert ("it knows no DoRA and no biases" in said) is not is_for_it


@pytest.mark.parametrize("output", [".", "..", "below/.."])
def test_an_export_takes_no_folder_without_a_name(
    tmp_path: Path, models: Checkpoint, adapter: Path, monkeypatch: pytest.MonkeyPatch, output: str
):
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    assert export(models, adapter, Path(output), "--to", "comfyui") == 2


def test_an_export_reads_the_model_that_was_typed(
    tmp_path: Path, models: Checkpoint, adapter: Path, capsys: pytest.CaptureFixture[str]
):
    assert export(models, adapter, tmp_path / "a", "--to", "peft", "--model-variant", "none-such") == 1
    assert export(models, adapter, tmp_path / "b", "--to", "peft", "-M", "mine") in (1, 2)
    assert "--base-model" in capsys.readouterr().err
    assert export(models, adapter, tmp_path / "c", "--to", "peft", "-M", "mine", "--base-model", "base") == 0
    assert "(mine)" in capsys.readouterr().out
    assert main(["export", "--adapter", str(adapter), "--to", "peft", "--output", str(tmp_path / "d"),
                 "-c", str(tmp_path / "nowhere"), "--plain"]) == 1  # fmt: skip
