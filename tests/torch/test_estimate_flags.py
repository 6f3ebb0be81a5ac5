"""The flags of `estimate`, typed: each does what it says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sidestep.config.rank_map import RankMap, read_rank_map
from sidestep.demo.checkpoint import build_toy_checkpoint
from sidestep.estimate import question, verify
from sidestep.main import main
from sidestep.model.checkpoint import Checkpoint, find_checkpoint
from sidestep.training.assemble import Run
from tests.torch.estimating import songs
from tests.torch.tiny import write_songs

__all__ = ["songs"]

SMALL = {"--device": "cpu", "--rank": "4", "--rank-min": "1", "--rank-max": "8", "--estimate-batches": "8"}


def estimate(checkpoint: Checkpoint, songs: Path, output: Path, *words: object) -> int:
    """Type an estimate; what is said in `words` wins over a small one's settings."""
    typed = [str(word) for word in words]
    rest = [word for flag, value in SMALL.items() if flag not in typed for word in (flag, value)]
    model = [] if "-M" in typed else ["-M", checkpoint.variant]
    paths = ["-c", str(checkpoint.root), "-d", str(songs), "--output", str(output)]
    return main(["estimate", *paths, *model, *rest, "--plain", *typed])


def map_of(checkpoint: Checkpoint, songs: Path, output: Path, *words: object) -> RankMap:
    assert estimate(checkpoint, songs, output, *words) == 0
    return read_rank_map(output)


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory, base: Checkpoint, songs: Path) -> RankMap:
    """The map of the small settings."""
    return map_of(base, songs, tmp_path_factory.mktemp("usual") / "map.json")


def scores(rank_map: RankMap) -> list[float]:
    return [module.score for module in rank_map.modules]


@pytest.mark.parametrize(
    ("words", "holds"),
    [
        (["--method", "grad-norm"], lambda found: found.origin.method == "grad-norm"),
        (["--estimate-batches", 4], lambda found: found.origin.draws == 4),
        (["--batch-size", 2], lambda found: found.origin.draws == 16),
        (["--seed", 7], lambda found: found.origin.seed == 7),
        (["--quantize", "nf4"], lambda found: True),
        (["--precision", "bf16"], lambda found: True),
        (["--chunk-duration", 1], lambda found: True),
        (["--val-split", 0.5], lambda found: found.origin.songs == 4),
        (["--cfg-ratio", 1], lambda found: "100% condition dropout" in found.origin.objective),
        (["--loss-weighting", "min_snr"], lambda found: "gamma 5" in found.origin.objective),
        (["--timestep-mode", "discrete"], lambda found: "eight timesteps of shift 3" in found.origin.objective),
        (["--recipe", "vanilla"], lambda found: found.origin.objective.startswith("vanilla: the eight timesteps")),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else "",
)
def test_what_is_measured_follows_what_was_typed(
    tmp_path: Path, base: Checkpoint, songs: Path, usual: RankMap, words: list[Any], holds: Callable[[RankMap], bool]
):
    found = map_of(base, songs, tmp_path / "map.json", *words)
    assert holds(found)
    assert scores(found) != scores(usual)


@pytest.mark.parametrize(
    ("condition", "words"),
    [(["--loss-weighting", "min_snr"], ["--snr-gamma", 0.1]), (["--timestep-mode", "discrete"], ["--shift", 1])],
    ids=lambda words: words[0],
)
def test_so_does_what_counts_only_beside_another_setting(
    tmp_path: Path, base: Checkpoint, songs: Path, condition: list[Any], words: list[Any]
):
    before = map_of(base, songs, tmp_path / "before.json", *condition)
    after = map_of(base, songs, tmp_path / "after.json", *condition, *words)
    assert f"{words[0][2:].split('-')[-1]} {words[1]:g}" in after.origin.objective
    assert scores(before) != scores(after)


def test_the_ranks_keep_their_bounds_and_the_uniform_adapter_is_the_budget(
    tmp_path: Path, base: Checkpoint, songs: Path, usual: RankMap
):
    ranks = set(usual.ranks.values())
    assert min(ranks) < 3 and max(ranks) > 5
    found = map_of(base, songs, tmp_path / "map.json", "--rank-min", 3, "--rank-max", 5)
    assert set(found.ranks.values()) <= {3, 4, 5}
    costs = {module.name: module.cost for module in usual.modules}
    words = ["--rank", 6, "--uniform-modules", "v_proj"]
    budget = map_of(base, songs, tmp_path / "budget.json", *words).budget.parameters
    assert budget == 6 * sum(cost for name, cost in costs.items() if name.endswith("v_proj"))


def test_the_model_and_the_device_are_the_ones_that_were_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = build_toy_checkpoint(tmp_path / "ck", variant="base")
    base = find_checkpoint(root, "base")
    songs = write_songs(tmp_path / "songs", base, (40, 44))
    base.folder.rename(root / "mine")
    config = root / "mine" / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"model_version"', '"x"'), encoding="utf-8")
    words = ["-M", "mine", "--base-model", "turbo"]
    found = map_of(base, songs, tmp_path / "map.json", *words)
    assert found.origin.model_variant == "mine"
    assert "the eight timesteps" in found.origin.objective
    capsys.readouterr()
    assert estimate(base, songs, tmp_path / "no.json", *words, "--device", "cuda:99") == 2
    assert "cuda:99" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [True, False])
def test_activations_are_recomputed_where_that_was_typed(
    tmp_path: Path, base: Checkpoint, songs: Path, usual: RankMap, monkeypatch: pytest.MonkeyPatch, asked: bool
):
    seen: list[bool] = []
    genuine = question.Model

    def spied(**parts: Any) -> Any:
        seen.extend(parts["recompute"])
        return genuine(**parts)

    monkeypatch.setattr(question, "Model", spied)
    flag = "--gradient-checkpointing" if asked else "--no-gradient-checkpointing"
    found = map_of(base, songs, tmp_path / "map.json", flag)
    assert seen == [asked] * 4
    assert scores(found) == pytest.approx(scores(usual), rel=1e-3)


def test_the_proof_trains_as_it_was_typed(
    tmp_path: Path, base: Checkpoint, songs: Path, monkeypatch: pytest.MonkeyPatch
):
    runs: list[Run] = []
    genuine = verify.assemble

    def spied(*arguments: Any, **named: Any) -> Run:
        runs.append(genuine(*arguments, **named))
        return runs[-1]

    monkeypatch.setattr(verify, "assemble", spied)
    words = ["--method", "eva", "--verify", "--val-split", 0.5, "--verify-steps", 3, "--verify-runs", 2]
    words += ["--learning-rate", 0.01, "--alpha", 6, "--gradient-accumulation", 2]
    assert estimate(base, songs, tmp_path / "map.json", *words) == 0
    # The uniform adapter and EVA's, twice each.
    assert [run.config.rank_map is None for run in runs] == [True, True, False, False]
    for run in runs:
        assert run.state.step == 3
        assert (run.pace.lr, run.pace.passes, run.config.alpha) == (0.01, 2, 6.0)
        assert len(run.held_out) == 2
