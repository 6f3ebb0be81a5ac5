"""What is foretold of a run from one like it."""

from dataclasses import replace
from datetime import datetime
from pathlib import Path

from sidestep.config.settings import values_of
from sidestep.config.train import TrainConfig
from sidestep.ui.outlook import is_like
from sidestep.ui.run_list import FoundRun


def test_a_run_that_kept_a_copy_of_the_same_rank_map_is_like_this_one(tmp_path: Path):
    rank_map, kept = tmp_path / "rank_map.json", tmp_path / "run" / "rank_map.json"
    kept.parent.mkdir()
    for path in (rank_map, kept):
        path.write_text("{}", encoding="utf-8")
    config = TrainConfig(dataset_dir=tmp_path, rank_map=rank_map)
    settings = {**values_of(replace(config, rank_map=kept)), "dataset_dir": tmp_path.resolve()}
    run = FoundRun(folder=kept.parent, recipe="fixed", settings=settings, epoch=1, saved=datetime.now(), loss=None)
    assert is_like(run, config)
    kept.write_text("{ }", encoding="utf-8")
    assert not is_like(run, config)
