"""What `estimate` is told: what it shares with training stays the same, and contradictions are met before torch."""

from pathlib import Path

import pytest

from sidestep.config.resolve import resolve_training
from sidestep.config.settings import build, parse_values, settings_of
from sidestep.config.tasks import EstimateConfig, check_estimate, focus_range, run_of
from sidestep.config.train import TrainConfig
from sidestep.errors import ConfigError

RENAMED = {"target_modules", "rank", "dataset_dir", "output_dir", "log_dir"}


def config(**typed: object) -> EstimateConfig:
    given = parse_values(EstimateConfig, {"dataset_dir": "tensors", **typed})
    made = build(EstimateConfig, given)
    check_estimate(made, given)
    return made


def test_what_is_shared_with_training_has_its_default_there():
    training = {setting.name: setting for setting in settings_of(TrainConfig)}
    for setting in settings_of(EstimateConfig):
        if setting.name in training and setting.name not in RENAMED:
            theirs = training[setting.name]
            assert (setting.default, setting.kind, setting.choices, setting.within, setting.flags) == (
                theirs.default, theirs.kind, theirs.choices, theirs.within, theirs.flags
            ), setting.name  # fmt: skip


def test_the_run_has_the_uniform_adapter_whose_size_is_the_budget():
    run = run_of(config(rank=16, uniform_modules="q_proj v_proj", cfg_ratio=0.3))
    assert (run.rank, run.target_modules, run.cfg_ratio) == (16, ("q_proj", "v_proj"), 0.3)
    assert run.dataset_dir == Path("tensors")


def test_vanilla_brings_its_pins():
    run = run_of(config(recipe="vanilla"))
    assert (run.timestep_mode, run.cfg_ratio) == ("discrete", 0.0)


@pytest.mark.parametrize(
    ("text", "range_"), [("balanced", (0, 1)), ("texture", (0, 0.4)), ("structure", (0.6, 1)), ("0.2,0.5", (0.2, 0.5))]
)
def test_the_focus_is_a_name_or_two_timesteps(text: str, range_: tuple[float, float]):
    assert focus_range(text) == range_


@pytest.mark.parametrize("text", ["", "middle", "0.5", "0.5,0.2", "0.1,1.2", "nan,1", "-1,1", "0,0.5,1"])
def test_any_other_focus_is_refused(text: str):
    with pytest.raises(ConfigError, match="--timestep-focus takes"):
        focus_range(text)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ({"rank_min": 32, "rank_max": 16}, "--rank-min 32 is larger than --rank-max 16"),
        ({"verify": True}, "--verify needs --val-split"),
        ({"method": "grad-norm", "save_directions": True}, "a norm has no direction"),
        ({"target_modules": "q_proj"}, "--uniform-modules has k_proj"),
        ({"recipe": "vanilla", "cfg_ratio": 0.2}, "--cfg-ratio is no choice with --recipe vanilla"),
        ({"chunk_duration": 0.5}, "--chunk-duration takes 0"),
        ({"output": "maps/mine.png"}, r"does not end in .json.* Name it maps.rank_map.json"),
        ({"output": "mine.safetensors"}, "does not end in .json"),
        ({"output": "mine"}, "does not end in .json"),
        ({"output": "."}, "is a folder: name the file in it, for example rank_map.json"),
    ],
)
def test_contradictions_are_named(typed: dict[str, object], said: str):
    with pytest.raises(ConfigError, match=said):
        config(**typed)


def test_training_with_a_map_leaves_the_choice_of_modules_to_it():
    typed = {"dataset_dir": "tensors", "output_dir": "out", "rank_map": "rank_map.json"}
    assert resolve_training("fixed", typed).config.rank_map == Path("rank_map.json")
    for name, value in (("target_modules", "q_proj"), ("attention_type", "self")):
        with pytest.raises(ConfigError, match="the map names the modules"):
            resolve_training("fixed", {**typed, name: value})
    with pytest.raises(ConfigError, match="--rank-map-start needs --rank-map"):
        resolve_training("fixed", {"dataset_dir": "tensors", "output_dir": "out", "rank_map_start": True})
    with pytest.raises(ConfigError, match="--rank-map counts only with --adapter-type"):
        resolve_training("fixed", {**typed, "adapter_type": "lokr"})


def test_a_rank_beside_a_map_has_no_effect_and_is_said():
    typed = {"dataset_dir": "tensors", "output_dir": "out", "rank": 8}
    said = "--rank has no effect with --rank-map: the map gives each module its own rank."
    assert said in resolve_training("fixed", {**typed, "rank_map": "rank_map.json"}).notices
    assert said not in resolve_training("fixed", typed).notices


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a<b", "refuse '<'"),
        ("v1.5", "refuse '.'"),
        ("a/b", "refuse '/'"),
        ("a\tb", r"refuse '\\t'"),
        (" ", "is empty"),
    ],
)
def test_a_name_that_no_folder_can_have_is_refused_with_its_reason(name: str, why: str):
    with pytest.raises(ConfigError, match=why):
        resolve_training("fixed", {"dataset_dir": "tensors", "output_dir": "out", "run_name": name})
