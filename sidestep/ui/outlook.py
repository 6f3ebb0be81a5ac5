"""What a run will take: what an earlier run like it took, else what is certain. Nothing is guessed; no torch."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sidestep.config.train import TrainConfig
from sidestep.errors import SidestepError
from sidestep.model.checkpoint import Checkpoint, decoder_tensors
from sidestep.ui.flow import Facts
from sidestep.ui.run_list import FoundRun, Pace, find_runs, pace_of
from sidestep.ui.wording import duration

GIB, MIB = 2**30, 2**20
# What decides how long a step takes and what it needs. Two runs that agree in these go at the same pace here.
DECISIVE = (
    "model_variant", "device", "precision", "adapter_type", "rank", "target_modules", "attention_type", "rank_map",
    "batch_size", "gradient_accumulation", "optimizer_type", "gradient_checkpointing", "gradient_checkpointing_ratio",
    "quantize", "compile", "chunk_duration",
)  # fmt: skip


def what_it_takes(config: TrainConfig, checkpoint: Checkpoint, *, steps: int, places: Sequence[Path]) -> Facts:
    """Rows for time and memory: those of the newest run in `places` that agrees in all that decides them."""
    alike = [(run, pace) for run in find_runs(places) if is_like(run, config) and (pace := pace_of(run.folder))]
    if alike:
        return _as_before(*alike[0], steps)
    return [
        ("Time", "not known before the first steps: no run like this one was timed here"),
        ("Memory", f"{_weights(config, checkpoint)}on CUDA a step is measured before the run begins"),
    ]


def is_like(run: FoundRun, config: TrainConfig) -> bool:
    """Whether a run trained on the same songs with the same settings, as far as they decide its pace."""
    data = config.tensor_output if config.preprocess else config.dataset_dir
    return (
        bool(run.settings)
        and data is not None
        and run.settings["dataset_dir"] == data.resolve()
        and all(_whole(run.settings[name]) == _whole(getattr(config, name)) for name in DECISIVE)
    )


def _whole(value: Any) -> Any:
    """Return what makes two values the same: of a file its content, as a run keeps a copy of its rank map."""
    if not isinstance(value, Path):
        return value
    return value.read_bytes() if value.is_file() else value.resolve()


def _as_before(run: FoundRun, pace: Pace, steps: int) -> Facts:
    rows = [("Time", f"about {duration(steps * pace.seconds_per_step)}, at the pace of {run.folder.name}")]
    if pace.memory_gib is not None:
        rows.append(("Memory", f"{pace.memory_gib:.1f} GiB of the device, as in {run.folder.name}"))
    return rows


def _weights(config: TrainConfig, checkpoint: Checkpoint) -> str:
    try:
        numbers = sum(math.prod(tensor.shape) for tensor in decoder_tensors(checkpoint).values())
    except SidestepError:  # The run says what is wrong with the file.
        return ""
    bits = {"int8": 8, "nf4": 4}.get(config.quantize, 32 if config.precision == "fp32" else 16)
    size = numbers * bits // 8
    shown = f"{size / GIB:.1f} GiB" if size > GIB // 10 else f"{size / MIB:.1f} MiB"
    return f"{shown} for the model's weights in {bits} bits; "
