"""rank_map.json: written whole, read strictly, refused where it does not belong."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from sidestep.config.rank_map import (
    Budget,
    ModuleRank,
    Origin,
    RankMap,
    check_modules,
    open_rank_map,
    read_rank_map,
    recipe_fingerprint,
    write_rank_map,
)
from sidestep.config.recipe import Recipe, resolve_recipe
from sidestep.config.settings import flag_of
from sidestep.config.train import TrainConfig
from sidestep.errors import DataError, ModelError


def a_map() -> RankMap:
    modules = (
        ModuleRank(name="layers.0.self_attn.q_proj", rank=8, cost=96, score=1 / 3, low=0.1, high=0.6, stands_out=True),
        ModuleRank(name="layers.0.self_attn.k_proj", rank=0, cost=80, score=-0.1, low=-0.2, high=0.2, stands_out=False),
        ModuleRank(name="layers.0.mlp.down_proj", rank=16, cost=144, score=2.0, stands_out=True),
    )
    origin = Origin(
        sidestep_version="0.1.0",
        method="cross-fit",
        granularity="module",
        seed=42,
        draws=128,
        songs=4,
        timestep_range=(0.0, 1.0),
        model_variant="base",
        model="sha256:m",
        dataset="d",
        recipe="sha256:r",
        objective="fixed",
    )
    budget = Budget(parameters=4000, spent=8 * 96 + 16 * 144, rank_min=8, rank_max=16, suggested_rank=3)
    return RankMap(origin=origin, budget=budget, modules=modules)


def changed(path: Path, **sections: object) -> Path:
    content = json.loads(path.read_text())
    for name, value in sections.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_rank_map(tmp_path / "rank_map.json", a_map())
    return tmp_path / "rank_map.json"


def test_a_map_comes_back_as_it_was_written(written: Path):
    read = read_rank_map(written)
    assert read.ranks == {"layers.0.self_attn.q_proj": 8, "layers.0.mlp.down_proj": 16}
    assert read.modules[0].score == pytest.approx(1 / 3, rel=1e-7)
    assert replace(read, modules=()) == replace(a_map(), modules=())
    assert read_rank_map(written.parent) == read


def test_the_same_map_gives_the_same_bytes_and_leaves_nothing_else(written: Path, tmp_path: Path):
    write_rank_map(tmp_path / "again.json", a_map())
    assert (tmp_path / "again.json").read_bytes() == written.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.json", "rank_map.json"]


def test_a_map_of_another_model_other_songs_or_another_objective_is_refused(written: Path):
    fits = {"model": "sha256:m", "dataset": "d", "recipe": "sha256:r"}
    rank_map = read_rank_map(written)
    rank_map.check_fits(**fits, source=written)
    with pytest.raises(ModelError, match="made for another model"):
        rank_map.check_fits(**{**fits, "model": "sha256:n"}, source=written)
    with pytest.raises(DataError, match="made for other songs"):
        rank_map.check_fits(**{**fits, "dataset": "e"}, source=written)
    with pytest.raises(DataError, match="made for another objective") as caught:
        rank_map.check_fits(**{**fits, "recipe": "sha256:s"}, source=written)
    numbers = {field.name for field in fields(Recipe)} - {"name"}  # All that an objective is told apart by.
    assert {"--recipe", *map(flag_of, numbers)} <= set(re.findall(r"--[a-z-]+", caught.value.hint))


def test_damaged_maps_are_refused_with_a_way_out(written: Path, tmp_path: Path):
    with pytest.raises(DataError, match="There is no rank map"):
        read_rank_map(tmp_path / "none.json")
    whole = written.read_text()
    for text in (
        "{",
        "[1]",
        "[" * 100_000,
        whole.replace('"rank": 8', '"rank": 7'),
        whole.replace('"cost"', '"coast"'),
    ):
        written.write_text(text)
        with pytest.raises(DataError) as caught:
            read_rank_map(written)
        assert "train.py estimate" in caught.value.hint
    written.write_text(whole)
    with pytest.raises(DataError, match="has format 9"):
        read_rank_map(changed(written, format_version=9))
    written.write_text('{"anything": 1}', encoding="utf-8")
    with pytest.raises(DataError, match="is no rank map"):
        read_rank_map(written)


@pytest.mark.parametrize("rank", [-1, 1.5, True, "8", None, 5000])
def test_a_rank_is_a_whole_number_within_reason(written: Path, rank: object):
    content = json.loads(written.read_text())
    content["modules"][0]["rank"] = rank
    with pytest.raises(DataError):
        read_rank_map(changed(written, modules=content["modules"]))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", ["layers.0.self_attn.q_proj"]),
        ("name", None),
        ("name", "layers.0.mlp.down_proj"),
        ("cost", 0),
        ("cost", -5),
        ("score", "high"),
        ("score", None),
        ("score", True),
        ("score", float("nan")),
        ("low", "0"),
        ("high", [1]),
        ("gradient_norm", float("inf")),
        ("stands_out", "yes"),
    ],
)
def test_a_module_that_was_changed_by_hand_is_refused(written: Path, key: str, value: object):
    content = json.loads(written.read_text())
    module = content["modules"][0]
    module[key] = value
    spent = sum(m["rank"] * m["cost"] for m in content["modules"])
    with pytest.raises(DataError, match="changed by hand or damaged"):
        read_rank_map(changed(written, modules=content["modules"], budget={"spent": spent}))


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("budget", {"parameters": 3000}),
        ("budget", {"parameters": "many"}),
        ("budget", {"rank_min": None}),
        ("budget", {"suggested_rank": 2.5}),
        ("origin", {"model_variant": 3}),
        ("origin", {"objective": None}),
    ],
)
def test_a_budget_or_an_origin_that_was_changed_by_hand_is_refused(written: Path, section: str, change: object):
    with pytest.raises(DataError, match="changed by hand or damaged"):
        read_rank_map(changed(written, **{section: change}))


def test_a_map_spends_its_budget_at_most(written: Path):
    spent = a_map().budget.spent
    assert read_rank_map(changed(written, budget={"parameters": spent})).budget.parameters == spent
    with pytest.raises(DataError, match="changed by hand or damaged"):
        read_rank_map(changed(written, budget={"parameters": spent - 1}))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"name": "layers.99.self_attn.q_proj"}, r"names layers\.99\.self_attn\.q_proj, which is no module"),
        ({"name": "condition_embedder"}, "names condition_embedder, which is no module"),
        ({"name": "layers.99.self_attn.q_proj", "rank": 0}, "which is no module"),
        ({"cost": 95}, "costs 95 parameters, not 96"),
        ({"rank": 49}, "the rank 49; its weight has 48 at most"),
    ],
)
def test_a_map_that_does_not_fit_the_model_is_refused(written: Path, change: dict[str, Any], problem: str):
    shapes = {
        "layers.0.self_attn.q_proj": (48, 48),
        "layers.0.self_attn.k_proj": (32, 48),
        "layers.0.mlp.down_proj": (48, 96),
    }
    check_modules(open_rank_map(written), shapes)
    content = json.loads(written.read_text())
    content["modules"][0].update(change)
    spent = sum(m["rank"] * m["cost"] for m in content["modules"])
    edited = changed(written, modules=content["modules"], budget={"spent": spent, "parameters": 10 * spent})
    with pytest.raises(DataError, match=problem) as caught:
        check_modules(open_rank_map(edited), shapes)
    assert "train.py estimate" in caught.value.hint


def test_a_map_that_leaves_nothing_to_train_is_refused(written: Path):
    content = json.loads(written.read_text())
    modules = [{**module, "rank": 0} for module in content["modules"]]
    with pytest.raises(DataError, match="leaves no module"):
        read_rank_map(changed(written, modules=modules, budget={"spent": 0}))


def test_recipes_that_train_alike_have_one_fingerprint():
    def fingerprint(name: str = "fixed", **changes: object) -> str:
        recipe: Recipe = resolve_recipe(TrainConfig(**changes), name=name, is_turbo=False)  # type: ignore[arg-type]
        return recipe_fingerprint(recipe)

    assert fingerprint() == fingerprint("vanilla") == fingerprint(shift=2.0) == fingerprint(snr_gamma=1.0)
    different = [
        fingerprint(),
        fingerprint(cfg_ratio=0.0),
        fingerprint(timestep_mode="discrete"),
        fingerprint(timestep_mode="discrete", shift=2.0),
        fingerprint(loss_weighting="min_snr"),
        fingerprint(loss_weighting="min_snr", snr_gamma=1.0),
    ]
    assert len(set(different)) == len(different)
