"""One sitting at the wizard, on the toy model: a folder of audio becomes a dataset, tensors and an adapter."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sidestep.demo.checkpoint import build_toy_checkpoint
from tests.pseudo_terminal import Screen

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals of this kind")
ENTER, DOWN, ESCAPE = "\r", "\x1b[B", "\x1b"
PATIENCE = 300.0  # Torch is loaded and audio is encoded on the way, on a machine that does other things too.


@pytest.fixture
def screen(tmp_path: Path):
    models = build_toy_checkpoint(tmp_path / "models", variant="base")
    songs = tmp_path / "歌"
    songs.mkdir()
    time = np.arange(24_000) / 48_000
    tone = 0.3 * np.sin(2 * np.pi * 220 * time).astype(np.float32)
    soundfile.write(songs / "tone.wav", np.stack([tone, tone], axis=1), 48_000)
    (songs / "tone.caption.txt").write_text("a tone", encoding="utf-8")
    screen = Screen("--yes", home=tmp_path, SIDESTEP_CHECKPOINT_DIR=str(models), NO_COLOR="1", OMP_NUM_THREADS="1")
    yield screen
    screen.close()


def answer(screen: Screen, *steps: tuple[str, str]) -> None:
    """Wait for each question and press its keys."""
    for question, keys in steps:
        screen.wait_for(question, seconds=PATIENCE)
        screen.press(keys)


def test_from_a_folder_of_audio_to_an_adapter_in_one_sitting(screen: Screen, tmp_path: Path):
    answer(
        screen,
        ("Exit", DOWN * 2 + ENTER),
        ("Songs", f"{tmp_path / '歌'}{ENTER}"),
        ("Tag", ENTER),
        ("Ready?", ENTER),
        ("Preprocess these songs", ENTER),
        *((question, ENTER) for question in ("Checkpoint folder", "Model", "Songs", "Tensor output", "Normalize")),
        ("Ready?", ENTER),
        ("Train a LoRA on them", ENTER),
        *((question, ENTER) for question in ("Start from", "How much to decide", "Checkpoint folder", "Model")),
        ("Dataset", ENTER),
        ("Output dir", f"{tmp_path / 'run'}{ENTER}"),
        ("Rank", f"8{ENTER}"),
        *((question, ENTER) for question in ("Alpha", "Learning rate", "Batch size", "Gradient accumulation")),
        ("Epochs", f"2{ENTER}"),
        ("Chunk duration", ENTER),
        ("Save every", ENTER),
        # Back from the review: three questions to the epochs, and five more to the rank.
        ("Ready?", ESCAPE),
        ("Save every", ESCAPE),
        ("Chunk duration", ESCAPE),
        ("Epochs", f"1{ENTER}"),
        ("Chunk duration", ESCAPE),
        *((question, ESCAPE) for question in ("Epochs", "Gradient accumulation", "Batch size", "Learning rate")),
        ("Alpha", ESCAPE),
        ("Rank", f"2{ENTER}"),
        *((question, ENTER) for question in ("Alpha", "Learning rate", "Batch size", "Gradient accumulation")),
        *((question, ENTER) for question in ("Epochs", "Chunk duration", "Save every", "Ready?")),
        ("What next?", ENTER),
    )
    screen.wait_for("code 0 heavy", seconds=PATIENCE)
    (adapter,) = (path for path in (tmp_path / "run").glob("lora_*") if path.is_dir())
    written = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert (written["r"], written["lora_alpha"]) == (2, 2)
    used = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["settings"]
    assert (used["rank"], used["alpha"], used["epochs"]) == (2, 4.0, 1)
    assert len(list((tmp_path / "歌_tensors").glob("*.pt"))) == 1
    assert "Traceback" not in screen.seen
