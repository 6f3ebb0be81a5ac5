"""A whole training: 20 songs of 120 to 240 s, as `train.py fixed` runs it, against the reference loop on them.

    uv run python benchmarks/train.py --epochs 100 --reference-passes 40

Ours is the real command, with compiling, capturing, reading from disk and saving in its time. The reference loop is
timed for some passes over the same lengths and scaled to as many as ours made. Random weights of real size, written to
disk in ACE-Step's own layout first; random latents. `--cap` limits what torch may allocate, `--arguments` go to the
command.
"""

import argparse
import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import repository  # noqa: F401
import torch
from safetensors.torch import save_file

from benchmarks.step import Case, reference
from benchmarks.subject import SIZES, build_decoder, make_batch, this_machine
from sidestep.main import main as sidestep
from sidestep.model.names import to_original
from sidestep.preprocess.tensors import FRAMES_PER_SECOND, Sample, write_sample

GIB = 2**30
SONGS = 20
ROWS = range(300, 1100, 40)


def write_checkpoint(root: Path, size: str) -> Path:
    """Write a checkpoint with a decoder of this size and as little else as training reads; returns `root`."""
    machine = this_machine()
    decoder = build_decoder(size, machine)
    sizes = dict(decoder.config)
    width = sizes["encoder_hidden_size"] or sizes["hidden_size"]
    tensors = {f"decoder.{to_original(name)}": value.cpu().contiguous() for name, value in decoder.state_dict().items()}
    tensors["null_condition_emb"] = torch.randn(1, 1, width, dtype=machine.dtype)
    tensors["encoder.text_projector.weight"] = torch.zeros(width, 1024, dtype=machine.dtype)
    folder = root / "acestep-v15-base"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    kept = {name: value for name, value in sizes.items() if not name.startswith("_") and value is not None}
    (folder / "config.json").write_text(json.dumps({**kept, "model_type": "acestep", "model_version": "base"}))
    return root


def write_songs(folder: Path, *, shortest: float, longest: float, width: int) -> list[float]:
    """Write tensor files of random latents, lengths spread evenly; returns their seconds."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    lengths = [shortest + (longest - shortest) * place / (SONGS - 1) for place in range(SONGS)]
    for place, (seconds, rows) in enumerate(zip(lengths, ROWS, strict=True)):
        frames = round(seconds * FRAMES_PER_SECOND)
        context = torch.cat([torch.randn(frames, 64, generator=generator), torch.ones(frames, 64)], dim=1)
        sample = Sample(
            torch.randn(frames, 64, generator=generator).bfloat16(),
            torch.randn(rows, width, generator=generator).bfloat16(),
            context.bfloat16(),
            {"duration": int(seconds), "caption": "random"},
        )
        write_sample(folder / f"song{place:02}.pt", sample)
    return lengths


def reference_seconds(size: str, lengths: list[float], passes: int) -> float:
    """Return the wall time of one pass of the reference loop, the mean over these lengths."""
    case = Case(mode="reference", seconds=0, recomputed=1, batch_size=1, size=size, rank=64, dropout=0.1,
                optimizer="adamw", quantize="none", is_fused=False, adapter="lora", has_padding=False)  # fmt: skip
    machine = this_machine()
    subject = reference(case, machine)
    decoder = build_decoder("tiny", machine) if machine.device.type == "cpu" else build_decoder(size, machine)
    batches = [make_batch(decoder, seconds, batch_size=1, seed=place) for place, seconds in enumerate(lengths)]
    subject.run(batches[-1])
    start = time.perf_counter()
    for place in range(passes):
        subject.run(batches[place % len(batches)])
    return (time.perf_counter() - start) / passes


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the beginning of a run, its readings, and its end."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = [line for line in lines if line["event"] in {"run_started", "metrics", "run_done"}]
    if not kept or kept[-1]["event"] != "run_done":
        raise SystemExit("The run did not come to its end: no figures.")
    return kept


def main() -> None:
    """Write the data, run both, print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="2b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--shortest", type=float, default=120)
    parser.add_argument("--longest", type=float, default=240)
    parser.add_argument("--reference-passes", type=int, default=40)
    parser.add_argument("--cap", type=float, default=0, help="GiB that torch may allocate; 0 is all")
    parser.add_argument("--arguments", default="", help="further flags of the command, in one string")
    options = parser.parse_args()
    if options.cap:
        torch.cuda.set_per_process_memory_fraction(options.cap * GIB / torch.cuda.get_device_properties(0).total_memory)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = SIZES[options.size]
        width = sizes.get("encoder_hidden_size") or sizes.get("hidden_size", 2048)
        write_checkpoint(folder / "checkpoints", options.size)
        torch.cuda.empty_cache()
        lengths = write_songs(folder / "tensors", shortest=options.shortest, longest=options.longest, width=width)
        words = ["--plain", "fixed", "-c", folder / "checkpoints", "-M", "base", "-d", folder / "tensors"]
        words += ["-o", folder / "out", "--epochs", options.epochs, "--save-every", options.epochs]
        start, started = time.perf_counter(), datetime.now(UTC)
        code = sidestep([str(word) for word in [*words, *options.arguments.split()]])
        ours = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else float("nan")
        began, *readings, done = read_events(folder / "out" / "metrics.jsonl")
        ready = (datetime.fromisoformat(began["time"]) - started).total_seconds()
        print(f"ready for the first step after {ready:.1f} s (loaded, measured at the longest sample)")
        # By what was done: a run that was stopped has made fewer than were asked for.
        passes = done["step"] * SONGS // began["steps_per_epoch"]
        losses = f"loss {readings[0]['loss']:.2f} to {readings[-1]['loss']:.2f}" if readings else "no loss was read"
        print(f"exit code {code}: {ours:.0f} s for {passes} passes, {losses}, peak {peak:.2f} GiB", flush=True)
        if options.reference_passes:
            a_pass = reference_seconds(options.size, lengths, options.reference_passes)
            theirs = a_pass * passes
            print(f"reference loop: {a_pass:.3f} s a pass, {theirs:.0f} s in all; ours is {theirs / ours:.1f} x faster")


if __name__ == "__main__":
    main()
