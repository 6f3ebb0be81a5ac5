"""A small estimate, for the tests of what it finds."""

from pathlib import Path
from typing import Any

import pytest

from sidestep.config.rank_map import RankMap
from sidestep.config.tasks import EstimateConfig
from sidestep.estimate.run import estimate
from sidestep.events import Event
from sidestep.model.checkpoint import Checkpoint
from tests.torch.tiny import write_songs

FRAMES = (40, 52, 40, 48, 40, 44)


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory, base: Checkpoint) -> Path:
    """Four songs of nearly one length. Read only."""
    return write_songs(tmp_path_factory.mktemp("songs"), base, (40, 44, 48, 40))


def config(songs: Path, **changes: Any) -> EstimateConfig:
    """Give the settings of a small estimate on the CPU."""
    settings: dict[str, Any] = {
        "dataset_dir": songs,
        "device": "cpu",
        "rank": 4,
        "rank_min": 1,
        "rank_max": 12,
        "estimate_batches": 12,
    }
    return EstimateConfig(**{**settings, **changes})


def run(settings: EstimateConfig, checkpoint: Checkpoint) -> tuple[RankMap, list[Event]]:
    """Estimate; give the map and what was told."""
    events: list[Event] = []
    return estimate(settings, checkpoint=checkpoint, version="0", emit=events.append).rank_map, events
