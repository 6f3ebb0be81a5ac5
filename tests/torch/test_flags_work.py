"""The flags of `fixed` and `vanilla`, typed: each does what it says."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sidestep.config.places import PROJECT, product_version
from sidestep.config.presets import preset_folders
from sidestep.demo.checkpoint import build_toy_checkpoint
from sidestep.main import main
from sidestep.model.checkpoint import Checkpoint, find_checkpoint
from sidestep.model.dropout import SeededDropout
from sidestep.training.batches import Batch, Batches
from sidestep.training.objective import Task
from tests.torch.command_line import NAME, Left, differ, modules_of, train
from tests.torch.tiny import assert_identical, prepare, tiny_config, write_songs
from tests.unit.terminal import Terminal

FOUR = {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.fixture(autouse=True)
def no_named_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIDESTEP_CHECKPOINT_DIR", raising=False)


@pytest.fixture
def songs(tmp_path: Path, base: Checkpoint) -> Path:
    return write_songs(tmp_path / "songs", base, (20, 20))


def test_a_run_goes_logs_saves_and_is_named_as_it_was_typed(tmp_path: Path, base: Checkpoint, songs: Path):
    words = ["--dataset-repeats", 3, "--gradient-accumulation", 2, "--max-steps", 7, "--save-every", 1]
    words += ["--log-every", 2, "--log-heavy-every", 3, "--log-dir", tmp_path / "board", "--run-name", "my song"]
    left = train(base, songs, tmp_path / "out", *words)
    # Two songs three times are six passes an epoch, and two passes a step.
    assert (left.start["steps_per_epoch"], left.start["steps"]) == (3, 7)
    assert left.readings("step") == [2, 4, 6, 7]
    assert [event["step"] for event in left.events("checkpoint_saved")] == [3, 6, 7]
    assert {path.name for path in (tmp_path / "out" / "checkpoints").iterdir()} == {
        "epoch_1", "epoch_2", "epoch_2_step_7"
    }  # fmt: skip
    assert (tmp_path / "out" / "my song" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "runs").exists()
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    layers = [tag for tag in board.Tags()["scalars"] if "layers.0" in tag]
    assert layers and [point.step for point in board.Scalars(layers[0])] == [3, 6]


def test_the_model_and_its_folder_are_the_ones_that_were_typed(tmp_path: Path):
    root = build_toy_checkpoint(tmp_path / "ck", variant="base")
    build_toy_checkpoint(root, variant="turbo")
    base, turbo = find_checkpoint(root, "base"), find_checkpoint(root, "turbo")
    shutil.copytree(base.folder, root / "mine")
    values = json.loads((root / "mine" / "config.json").read_text(encoding="utf-8"))
    del values["model_version"]
    (root / "mine" / "config.json").write_text(json.dumps(values), encoding="utf-8")
    songs = {each.variant: write_songs(tmp_path / each.variant, each, (20,)) for each in (base, turbo)}
    found = {}
    for name, dataset, words in (
        ("base", "base", []), ("turbo", "turbo", []), ("mine", "base", ["--base-model", "turbo"])
    ):  # fmt: skip
        left = train(base, songs[dataset], tmp_path / f"out_{name}", "--model-variant", name, *words)
        assert left.start["facts"]["Model"].startswith(name)
        assert left.start["facts"]["Songs"].startswith("1 ")
        found[name] = "the eight timesteps" in left.start["recipe"]
    assert found == {"base": False, "turbo": True, "mine": True}


def test_the_device_is_the_one_that_was_typed(
    tmp_path: Path, base: Checkpoint, songs: Path, capsys: pytest.CaptureFixture[str]
):
    assert train(base, songs, tmp_path / "out").start["facts"]["Model"] == "base (float32, cpu)"
    words = ["-c", str(base.root), "-M", "base", "-d", str(songs), "-o", str(tmp_path / "no"), "--plain"]
    for device in ("cuda:99", "tpu"):
        assert main(["fixed", *words, "--device", device]) == 2
        assert device in capsys.readouterr().err


def test_in_bfloat16_the_model_is_held_in_it_and_the_adapter_is_not(tmp_path: Path, base: Checkpoint, songs: Path):
    whole = train(base, songs, tmp_path / "whole")
    half = train(base, songs, tmp_path / "half", "--precision", "bf16")
    assert half.start["facts"]["Model"] == "base (bfloat16, cpu)"
    assert {tensor.dtype for tensor in half.tensors.values()} == {torch.float32}
    assert half.readings("loss") != whole.readings("loss")
    assert half.readings("loss") == pytest.approx(whole.readings("loss"), rel=0.02)
    decoder = prepare(tiny_config(precision="bf16"), base, songs, tmp_path / "x").stepper.model.decoder
    kinds = {p.requires_grad: p.dtype for name, p in decoder.named_parameters() if "proj" in name or "lora" in name}
    assert kinds == {False: torch.bfloat16, True: torch.float32}


@pytest.mark.parametrize(
    ("words", "modules"),
    [
        ([], {f"{part}.{name}" for part in ("self_attn", "cross_attn") for name in FOUR}),
        (["--attention-type", "self"], {f"self_attn.{name}" for name in FOUR}),
        (["--attention-type", "cross", "--target-modules", "q_proj", "down_proj"],
         {"cross_attn.q_proj", "mlp.down_proj"}),
    ],
)  # fmt: skip
def test_the_adapter_sits_where_it_was_typed(
    tmp_path: Path, base: Checkpoint, songs: Path, words: list[str], modules: set[str]
):
    left = train(base, songs, tmp_path / "out", *words)
    assert modules_of(left.tensors) == modules


def test_an_adapter_has_the_kind_the_rank_the_dropout_and_the_biases_that_were_typed(
    tmp_path: Path, base: Checkpoint, songs: Path
):
    left = train(base, songs, tmp_path / "out", "-a", "dora", "--rank", 3, "--bias", "all", "--dropout", 0.4)
    assert left.peft["lora_dropout"] == 0.4
    shapes = {tuple(t.shape)[:1] for name, t in left.tensors.items() if "lora_A" in name}
    assert shapes == {(3,)} and left.peft["r"] == 3
    assert left.peft["use_dora"] and any("lora_magnitude_vector" in name for name in left.tensors)
    dropped = prepare(tiny_config(dropout=0.4), base, songs, tmp_path / "dropped").stepper.model.decoder
    assert {part.p for part in dropped.modules() if isinstance(part, SeededDropout)} == {left.peft["lora_dropout"]}
    assert left.peft["bias"] == "all" and any(name.endswith(".bias") for name in left.tensors)


def size(left: Left) -> float:
    """Give how far the written lora_B has moved: from zero, by AdamW's first step, whose size is the learning rate."""
    return max(tensor.abs().max().item() for name, tensor in left.tensors.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("words", "times"),
    [
        (["--alpha", 12], 3.0),
        (["--rank", 8], 0.25),
        (["--use-rslora"], 2**0.5),
        (["--learning-rate", 0.0005], 0.5),
        (["--lr", 0.002], 2.0),
        (["--warmup-steps", 10], 0.1),
    ],
    ids=str,
)
def test_what_scales_the_first_step_scales_what_is_written(
    tmp_path: Path, base: Checkpoint, songs: Path, words: list[Any], times: float
):
    # Alpha 4 over rank 2, or over its root; what is written has the scale folded in.
    usual = train(base, songs, tmp_path / "usual", "--max-steps", 1)
    left = train(base, songs, tmp_path / "out", "--max-steps", 1, *words)
    assert size(usual) == pytest.approx(2 * 0.001, rel=1e-3)
    assert size(left) / size(usual) == pytest.approx(times, rel=1e-3)


def test_a_lokr_is_made_as_it_was_typed(tmp_path: Path, base: Checkpoint, songs: Path):
    plain = train(base, songs, tmp_path / "plain", "--adapter-type", "lokr")
    words = ["--rank", 1, "--lokr-factor", 4, "--lokr-decompose-both", "--lokr-use-tucker", "--lokr-weight-decompose"]
    left = train(base, songs, tmp_path / "out", "--adapter-type", "lokr", *words)
    stem = "lycoris_layers_0_self_attn_q_proj"
    assert f"{stem}.lokr_w1" in plain.tensors and f"{stem}.dora_scale" not in plain.tensors
    # 64 x 48 is (4 x 16) x (4 x 12): the first factor is 4 x 4, of rank 1.
    assert left.tensors[f"{stem}.lokr_w1_a"].shape == (4, 1)
    assert left.tensors[f"{stem}.lokr_w2_a"].shape == (16, 1)
    assert left.tensors[f"{stem}.dora_scale"].shape == (64, 1)
    stated = json.loads(left.header["lokr_config"])
    assert {name: stated[name] for name in ("factor", "decompose_both", "use_tucker", "weight_decompose")} == {
        "factor": 4, "decompose_both": True, "use_tucker": True, "weight_decompose": True,
    }  # fmt: skip
    scaled = prepare(tiny_config(adapter_type="lokr", lokr_use_scalar=True), base, songs, tmp_path / "x")
    assert sum(name.endswith(".scalar") for name in scaled.adapter.parameters) == len(scaled.adapter.modules)


def test_the_same_seed_gives_the_same_weights_and_another_one_others(tmp_path: Path, base: Checkpoint, songs: Path):
    first, again, other = (
        train(base, songs, tmp_path / name, "--seed", seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert_identical(first.tensors, again.tensors)
    assert differ(first.tensors, other.tensors)


def tasks(batches: Batches) -> list[Task]:
    return [batch.task for batch in batches.epoch(0)]


def test_the_objective_is_the_one_that_was_typed(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (4,) * 4)
    plain = tiny_config(batch_size=4, dataset_repeats=50)
    drawn = {}
    for name, config in {
        "dropped": replace(plain, cfg_ratio=1.0),
        "discrete": replace(plain, timestep_mode="discrete", shift=1.0),
        "continuous": replace(plain, timestep_mode="continuous"),
    }.items():
        drawn[name] = tasks(prepare(config, base, songs, tmp_path / name).batches)
    assert all(task.is_dropped_B.all() for task in drawn["dropped"])
    timesteps = {
        name: {round(t, 4) for task in found for t in task.timesteps_B.tolist()} for name, found in drawn.items()
    }
    # Without a shift the eight timesteps are eighths.
    assert timesteps["discrete"] == {place / 8 for place in range(1, 9)}
    assert len(timesteps["continuous"]) > 150


def test_songs_are_read_as_it_was_typed_and_are_the_same(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (20, 20, 30))
    here = prepare(tiny_config(), base, songs, tmp_path / "here").batches
    config = tiny_config(num_workers=2, prefetch_factor=3, persistent_workers=False, epochs=1)
    for persistent in (False, True):
        there = prepare(replace(config, persistent_workers=persistent), base, songs, tmp_path / "there").batches
        loader = there._loader
        assert (loader.num_workers, loader.prefetch_factor, loader.persistent_workers) == (2, 3, persistent)
        before = len(multiprocessing.active_children())
        found = [parts(batch) for batch in there.epoch(0)]
        assert (len(multiprocessing.active_children()) == before + 2) == persistent
        assert_identical(found, [parts(batch) for batch in here.epoch(0)])
    assert (here._loader.num_workers, here._loader.prefetch_factor, here._loader.persistent_workers) == (0, None, False)


def parts(batch: Batch) -> list[object]:
    return [batch.names, *batch.task.parts()]


@pytest.mark.parametrize("asked", [True, False])
def test_batches_are_pinned_for_a_gpu_alone_and_where_that_is_wanted(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch, asked: bool
):
    from sidestep.training import assemble

    songs = write_songs(tmp_path / "songs", base, (20,))
    config = tiny_config(pin_memory=asked)
    run = prepare(config, base, songs, tmp_path / "run")
    assert not run.batches.pin_memory  # There is nothing to copy to.
    cuda = assemble._batches(
        config,
        run.batches.plan,
        run.law,
        run.recipe,
        run.pace,
        device=torch.device("cuda"),
        dtype=torch.float32,
        processes=run.processes,
    )
    assert cuda.pin_memory == cuda._loader.pin_memory == asked


def test_settings_come_from_a_preset_or_an_earlier_run_and_can_be_kept(
    tmp_path: Path, base: Checkpoint, songs: Path, capsys: pytest.CaptureFixture[str]
):
    train(base, songs, tmp_path / "first", "--rank", 5, "--save-preset", "mine", "--target-modules", "v_proj")
    saved = json.loads((preset_folders()[0] / "mine.json").read_text(encoding="utf-8"))
    assert (saved["rank"], saved["target_modules"]) == (5, ["v_proj"])
    paths = ["-c", str(base.root), "-M", "base", "-d", str(songs), "--device", "cpu", "--plain", "--run-name", NAME]
    for name, words in (
        ("preset", ["--preset", "mine"]),
        ("config", ["--config", str(tmp_path / "first/config.json")]),
    ):
        assert main(["fixed", *paths, "-o", str(tmp_path / name), *words]) == 0
        left = Left(tmp_path / name)
        assert modules_of(left.tensors) == {"self_attn.v_proj", "cross_attn.v_proj"}
        assert left.peft["r"] == 5
    capsys.readouterr()


def test_a_run_goes_on_with_its_own_learning_rate_typed_and_with_no_other(
    tmp_path: Path, base: Checkpoint, songs: Path, capsys: pytest.CaptureFixture[str]
):
    paths = ["-c", str(base.root), "-M", "base", "-d", str(songs), "--device", "cpu", "--plain", "--num-workers", "0"]
    assert main(["fixed", *paths, "-o", str(tmp_path / "run"), "--run-name", NAME, "--epochs", "1"]) == 0
    more = ["fixed", "--resume-from", str(tmp_path / "run"), "--epochs", "2", "--device", "cpu", "--plain"]
    capsys.readouterr()
    assert main([*more, "--lr", "0.001", "--cfg-ratio", "0.5"]) == 2
    said = capsys.readouterr().err
    assert "--learning-rate was 0.0001 in that run and cannot become 0.001" in said
    assert "--cfg-ratio was left at its default (0.15; turbo: 0) in that run and cannot become 0.5" in said
    assert main([*more, "--lr", "1e-4"]) == 0


def test_a_run_goes_on_from_the_checkpoint_that_was_typed(tmp_path: Path, base: Checkpoint, songs: Path):
    whole = train(base, songs, tmp_path / "whole", "--epochs", 2, "--save-every", 1)
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", part)
    shutil.rmtree(part / "checkpoints" / "epoch_2")
    (part / NAME / "adapter_model.safetensors").unlink()
    assert main(["fixed", "--resume-from", str(part / "checkpoints" / "epoch_1"), "--device", "cpu", "--plain"]) == 0
    assert_identical(Left(part).tensors, whole.tensors)


def test_samples_are_rendered_as_it_was_typed(tmp_path: Path, turbo: Checkpoint):
    songs = write_songs(tmp_path / "songs", turbo, (20,))
    (tmp_path / "prompts.txt").write_text("a slow waltz\n", encoding="utf-8")
    words = ["--epochs", 3, "--sample-every-n-epochs", 2, "--sample-prompts", tmp_path / "prompts.txt"]
    train(turbo, songs, tmp_path / "out", *words, "--sample-duration", 2)
    samples = sorted((tmp_path / "out" / "samples").rglob("*.flac"))
    assert [path.parent.name for path in samples] == ["base", "epoch_0002", "epoch_0003"]
    assert {path.name for path in samples} == {"1_a-slow-waltz.flac"}
    assert {soundfile.info(path).frames for path in samples} == {96_000}


def test_vanilla_trains_with_its_pins(tmp_path: Path, base: Checkpoint, songs: Path):
    left = train(base, songs, tmp_path / "out", command="vanilla")
    assert left.start["recipe"].startswith("vanilla: the eight timesteps of shift 3, no condition dropout")
    pins = {name: left.config[name] for name in ("timestep_mode", "shift", "cfg_ratio")}
    assert pins == {"timestep_mode": "discrete", "shift": 3.0, "cfg_ratio": 0.0}


def test_no_question_is_ever_asked(tmp_path: Path, base: Checkpoint, songs: Path, monkeypatch: pytest.MonkeyPatch):
    def asked(*_: object) -> str:
        raise AssertionError("something was asked")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr("sys.stdin.readline", asked, raising=False)
    train(base, songs, tmp_path / "out", "--yes")
    train(base, songs, tmp_path / "other", "-y")


def test_version_says_what_is_at_work(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Side-Step {product_version()}"
    assert f"torch {torch.__version__.split('+')[0]}" in "\n".join(lines)
    assert {line.split()[0] for line in lines} >= {"torch", "diffusers", "peft", "CUDA"}


def test_versions_that_nobody_reads_to_the_end_are_no_bug():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, PROJECT / "train.py", "--version"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_plain_lines_hold_no_escape_code_even_on_a_terminal(
    tmp_path: Path, base: Checkpoint, songs: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = []
    words = ["fixed", "-c", str(base.root), "-M", "base", "-d", str(songs), "--max-steps", "1", "--num-workers", "0"]
    for name, plain in (("plain", ["--plain"]), ("live", [])):
        terminal = Terminal()
        monkeypatch.setattr("sys.stdout", terminal)
        assert main([*words, *plain, "--device", "cpu", "-o", str(tmp_path / name)]) == 0
        shown.append(terminal.getvalue())
    assert "Step 1/1" in shown[0] and "\x1b[" not in shown[0]
    assert "\x1b[" in shown[1]
