"""Tests of the demo and of the pipeline it renders with: the whole way, once, with what lies on disk afterwards."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from diffusers import AceStepPipeline

from sidestep.commands import demo
from sidestep.config import places
from sidestep.config.flags import parse
from sidestep.config.shell import shell_line
from sidestep.demo.checkpoint import build_toy_checkpoint
from sidestep.errors import RunError
from sidestep.main import main
from sidestep.model.checkpoint import find_checkpoint
from sidestep.model.pipeline import load_pipeline

CPU = torch.device("cpu")


def printed_commands(text: str) -> list[list[str]]:
    """The command lines in what was printed, joined where they are broken, as words."""
    joined = text.replace("\\\n", " ")
    return [line.split()[3:] for line in joined.splitlines() if line.strip().startswith("uv run train.py ")]


def test_the_demo_goes_the_whole_way(tmp_path: Path, monkeypatch, capsys):
    settings = tmp_path / "settings"
    monkeypatch.setattr(places, "config_folder", lambda: settings)
    monkeypatch.setattr(demo, "SONG_SECONDS", (0.6, 0.8))
    monkeypatch.setattr(demo, "EPOCHS", 1)
    monkeypatch.setattr(demo, "MORE_EPOCHS", 2)
    monkeypatch.setattr(demo, "RENDERED_SECONDS", 0.4)
    (tmp_path / "my demo" / "run-1").mkdir(parents=True)
    (tmp_path / "my demo" / "run-1" / "mine.txt").write_text("mine", encoding="utf-8")

    assert main(["demo", "--folder", str(tmp_path / "my demo"), "--plain"]) == 0

    assert (tmp_path / "my demo" / "run-1" / "mine.txt").read_text(encoding="utf-8") == "mine"
    assert not settings.exists()
    place = demo.Place(tmp_path / "my demo" / "run-2")
    assert find_checkpoint(place.checkpoints, "base").layout == "original"
    assert len(json.loads((place.songs / "dataset.json").read_text(encoding="utf-8"))["samples"]) == 4
    assert len(list(place.tensors.glob("*.pt"))) == 4
    assert {path.name for path in (place.output / "checkpoints").iterdir()} == {"epoch_1", "epoch_2"}
    assert (place.adapter / "adapter_model.safetensors").is_file()
    sounds = [soundfile.read(place.folder / "sound" / f"{name}_adapter.wav") for name in ("without", "with")]
    for samples, rate in sounds:
        assert samples.shape == (19_200, 2)
        assert rate == 48_000
        assert np.isfinite(samples).all()
        assert np.sqrt(np.square(samples).mean()) > 0.01
    difference = np.sqrt(np.square(sounds[1][0] - sounds[0][0]).mean() / np.square(sounds[0][0]).mean())
    text = capsys.readouterr().out
    (shown,) = re.findall(r"differ by ([\d.]+)%", text)
    assert float(shown) / 100 == pytest.approx(difference, abs=0.006)
    assert difference > 0.01
    assert "toy" in text
    assert shell_line(["--logdir", place.output / "runs"]) in text
    ran = [words for words in printed_commands(text) if str(place.folder) in " ".join(words)]
    assert [words[0] for words in ran] == ["build-dataset", "fixed", "fixed", "fixed"]


def test_every_command_it_shows_for_real_music_can_be_typed(tmp_path: Path):
    for step in demo.commands(demo.Place(tmp_path)):
        assert parse(step.real).command == parse(step.words).command == step.words[0]


def test_the_command_that_shows_the_curves_can_be_copied_whatever_the_folder_is_called(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(demo, "_loss_after", lambda place, epoch: "1")
    place = demo.Place(tmp_path / "it's a demo")
    (shown,) = (line for step in demo.commands(place)[:3] for line in step.after().splitlines() if "--logdir" in line)
    assert shlex.split(shown)[-1] == str(place.output / "runs")


def test_a_command_is_broken_between_flags_only():
    words = ("fixed", "--audio-dir", "my songs", "--preprocess", "--rank", "8")
    lines = list(demo.command_lines(words, width=40))
    assert lines == ["uv run train.py fixed \\", "  --audio-dir 'my songs' --preprocess \\", "  --rank 8"]
    assert list(demo.command_lines(words, width=10_000)) == [
        "uv run train.py fixed --audio-dir 'my songs' --preprocess --rank 8"
    ]


def test_each_demo_gets_a_folder_of_its_own(tmp_path: Path):
    (tmp_path / "run-2").write_text("a file in the way", encoding="utf-8")
    assert [demo.fresh_folder(tmp_path).name for _ in range(2)] == ["run-1", "run-3"]


def test_a_folder_that_cannot_be_made_is_an_error_with_a_way_out(tmp_path: Path):
    (tmp_path / "demo").write_text("a file", encoding="utf-8")
    with pytest.raises(RunError, match="demo cannot be written") as caught:
        demo.fresh_folder(tmp_path / "demo")
    assert "another folder" in caught.value.hint


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_the_pipeline_of_either_layout_sounds_as_diffusers_own(tmp_path: Path, layout):
    theirs = AceStepPipeline.from_pretrained(
        build_toy_checkpoint(tmp_path / "theirs", variant="turbo", layout="diffusers"), local_files_only=True
    )
    theirs.set_progress_bar_config(disable=True)
    root = build_toy_checkpoint(tmp_path / "ours", variant="turbo", layout=layout)
    ours = load_pipeline(find_checkpoint(root, "turbo"), device=CPU, dtype=torch.float32)
    assert ours.is_turbo
    words = {"prompt": "a bright melody", "lyrics": "[Verse]\nla", "audio_duration": 0.2, "num_inference_steps": 2}
    sounds = [
        pipeline(**words, generator=torch.Generator().manual_seed(0), output_type="pt").audios
        for pipeline in (ours, theirs)
    ]
    torch.testing.assert_close(sounds[0], sounds[1], rtol=0, atol=1e-3)


def test_a_fine_tune_whose_config_does_not_say_it_is_turbo_is_rendered_as_turbo(tmp_path: Path):
    root = build_toy_checkpoint(tmp_path, variant="base")
    (root / "acestep-v15-base").rename(root / "mine")
    config = root / "mine" / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    del values["model_version"]
    config.write_text(json.dumps(values), encoding="utf-8")
    for family in ("turbo", "sft"):
        checkpoint = find_checkpoint(root, "mine", base_model=family)
        assert load_pipeline(checkpoint, device=CPU, dtype=torch.float32).is_turbo == (family == "turbo")
