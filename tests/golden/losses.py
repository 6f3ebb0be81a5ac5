"""The first losses of every recipe with every adapter, and how they are recorded.

    uv run python -m tests.golden.losses

writes them anew into `losses.json`. A change that alters them shows the difference and says why.
"""

import json
import tempfile
from pathlib import Path

from sidestep.config.recipe import RECIPE_PINS
from sidestep.demo.checkpoint import build_toy_checkpoint
from sidestep.model.checkpoint import Checkpoint, find_checkpoint
from sidestep.training.adapters import ADAPTERS
from tests.torch.tiny import tiny_config, train, write_songs

GOLDEN = Path(__file__).parent / "losses.json"
RUNS = [f"{recipe} {adapter}" for recipe in RECIPE_PINS for adapter in ADAPTERS]
STEPS = 20


def first_losses(run: str, checkpoint: Checkpoint, folder: Path) -> list[float]:
    """Train `STEPS` steps on the CPU in float32 and give their losses: windows, a batch of two, accumulation."""
    recipe, adapter = run.split()
    songs = write_songs(folder / "songs", checkpoint, (75, 60, 96, 60), rows=(9, 12))
    config = tiny_config(
        adapter_type=adapter,
        rank=8,
        alpha=16.0,
        max_steps=STEPS,
        batch_size=2,
        gradient_accumulation=2,
        chunk_duration=2.0,
        learning_rate=3e-3,
        precision="fp32",
        **RECIPE_PINS[recipe],
    )
    return train(config, checkpoint, songs, folder / run.replace(" ", "_"), recipe=recipe).losses


def record() -> None:
    """Write the losses of every run."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoint = find_checkpoint(build_toy_checkpoint(folder / "toy", variant="base"), "base")
        losses = {run: [round(loss, 7) for loss in first_losses(run, checkpoint, folder)] for run in RUNS}
    lines = ",\n".join(f"  {json.dumps(run)}: {json.dumps(values)}" for run, values in losses.items())
    GOLDEN.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    record()
