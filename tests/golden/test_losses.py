"""The first losses of every recipe with every adapter are those that were recorded."""

import json
from pathlib import Path

import pytest

from sidestep.model.checkpoint import Checkpoint
from tests.golden.losses import GOLDEN, RUNS, STEPS, first_losses

RECORDED: dict[str, list[float]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
# Other processors round the last bits otherwise, and twenty steps carry that on.
TOLERANCE = 1e-4


@pytest.mark.parametrize("run", RUNS)
def test_the_first_losses_are_as_they_were(run: str, base: Checkpoint, tmp_path: Path):
    losses = first_losses(run, base, tmp_path)
    assert len(losses) == STEPS
    assert losses == pytest.approx(RECORDED[run], rel=TOLERANCE)


def test_every_recipe_and_every_adapter_is_recorded_and_none_is_like_another():
    assert sorted(RECORDED) == sorted(RUNS)
    # From the second step on: before it no adapter changes anything.
    assert len({tuple(losses[2:]) for losses in RECORDED.values()}) == len(RUNS)
