"""The wizard's way through Preprocessing++: from a preset's rank to a map, and on to the run that trains with it."""

from pathlib import Path

import pytest

from sidestep.config.flags import parse
from sidestep.config.presets import save_preset
from sidestep.config.rank_map import Budget, ModuleRank, Origin, RankMap, write_rank_map
from sidestep.config.resolve import resolve_training
from sidestep.config.settings import build, parse_values, settings_of
from sidestep.config.tasks import EstimateConfig, check_estimate
from sidestep.ui.command_line import Plan, words_of
from sidestep.ui.estimate_flow import ORDER
from tests.unit.stage import BACK, DOWN, ENTER, LEAVE, SPACE, Stage, down, stage, typed
from tests.unit.training_keys import LOKR, LORA, basic
from tests.unit.training_keys import config_of as run_of

__all__ = ["stage"]
ESTIMATE = down(4)
FRESH = BASIC = START = ENTER
CHANGE = down(1)
MODEL = [ENTER, ENTER]
SETTINGS_ASKED = ["estimate_batches", "batch_size", "timestep_focus", "rank", "chunk_duration"]


def forward(data: Path, *, preset: str = FRESH) -> list[str]:
    """The keys of every basic question, all suggestions accepted but the dataset."""
    return [preset, BASIC, *MODEL, typed(data), *[ENTER] * len(SETTINGS_ASKED)]


def config_of(plan: Plan) -> EstimateConfig:
    values = parse_values(EstimateConfig, plan.values)
    config = build(EstimateConfig, values)
    check_estimate(config, values)
    return config


def typed_again(plan: Plan) -> Plan:
    """What the printed command line comes to."""
    words = parse(words_of(plan))
    assert words.command == plan.command
    return Plan(words.command, words.values)


def make_map(path: Path, *, variant: str = "turbo") -> None:
    """Write a rank map, as far as it is looked at without torch."""
    words = {"sidestep_version": "1", "method": "cross-fit", "granularity": "module", "model_variant": variant}
    origin = Origin(**words, seed=1, draws=1, songs=4, timestep_range=(0.0, 1.0), model="m", dataset="d", recipe="r",
                    objective="o")  # fmt: skip
    modules = (ModuleRank(name="layers.0.self_attn.q_proj", rank=8, cost=16, score=1.0),)
    budget = Budget(parameters=128, spent=128, rank_min=8, rank_max=8)
    write_rank_map(path, RankMap(origin=origin, budget=budget, modules=modules))


def test_the_questions_are_the_basic_settings_of_the_declaration():
    asked_otherwise = {"checkpoint_dir", "model_variant", "dataset_dir"}
    only_to_verify = {"learning_rate", "alpha", "gradient_accumulation"}
    declared = {s.name for s in settings_of(EstimateConfig) if s.ask == "basic"}
    assert declared - asked_otherwise - only_to_verify == set(SETTINGS_ASKED)


def test_enter_all_the_way_measures_with_the_defaults(stage: Stage):
    data = stage.tensors()
    _, screen = stage.play(ESTIMATE, *forward(data), START)
    (plan,) = stage.started
    assert plan == Plan("estimate", {"checkpoint_dir": stage.folder / "models", "dataset_dir": data})
    assert config_of(typed_again(plan)) == config_of(plan)
    words = " ".join(screen.split())
    assert "4 songs, in 128 passes" in words
    assert "rank_map.json" in words


def test_every_question_is_gone_back_from_and_left_at(stage: Stage):
    data = stage.tensors()
    keys = [*forward(data)[:5], typed("8"), ENTER, typed("structure"), typed("16"), typed("30")]
    back_and_forth = [key for answer in keys for key in (answer, BACK, ENTER)]
    stage.play(ESTIMATE, *back_and_forth, START)
    config = config_of(stage.started.pop())
    assert (config.estimate_batches, config.timestep_focus, config.rank, config.chunk_duration) == (
        8, "structure", 16, 30.0,
    )  # fmt: skip
    for place in range(len(keys) + 1):
        assert stage.play(ESTIMATE, *keys[:place], LEAVE)[0] == 130
    assert stage.started == []


@pytest.mark.parametrize(
    ("place", "wrong", "right", "reason"),
    [
        (4, "songs", "tensors", "songs holds no tensors (.pt files). It holds songs: preprocess them first"),
        (5, "1", "4", "--estimate-batches takes a whole number from 2 to 1000000, not 1."),
        (7, "loud", "0.2,0.7", "--timestep-focus takes balanced, texture, structure, or two timesteps like 0.2,0.7"),
        (8, "0", "8", "--rank takes a whole number from 1 to 4096, not 0."),
    ],
)
def test_a_wrong_value_is_explained_and_the_question_stays(
    stage: Stage, place: int, wrong: str, right: str, reason: str
):
    stage.songs()
    keys = forward(stage.tensors())
    _, screen = stage.play(ESTIMATE, *keys[:place], typed(wrong), typed(right), *keys[place + 1 :], START)
    assert reason in " ".join(screen.split())
    assert len(stage.started) == 1


def test_the_rank_and_what_else_a_preset_has_are_its_defaults(stage: Stage):
    values = {"dataset_dir": "a", "output_dir": "b", "rank": 5, "target_modules": "q_proj up_proj", "epochs": 3}
    save_preset("mine", resolve_training("fixed", values).config)
    stage.play(ESTIMATE, *forward(stage.tensors(), preset=down(1)), START)
    config = config_of(stage.started[0])
    assert (config.rank, config.uniform_modules) == (5, ("q_proj", "up_proj"))
    assert config.target_modules == build(EstimateConfig, {"dataset_dir": Path()}).target_modules


def test_enter_leaves_every_setting_of_every_group_at_its_default(stage: Stage):
    data = stage.tensors()
    mark_all = "".join((SPACE if group != "Ranks and budget" else "") + DOWN for group in ORDER) + ENTER
    stage.play(ESTIMATE, FRESH, down(1), mark_all, *MODEL, typed(data), *[ENTER] * 60)
    assert set(stage.started[0].values) == {"checkpoint_dir", "dataset_dir"}


def test_a_contradiction_is_said_in_the_review(stage: Stage):
    keys = forward(stage.tensors())
    _, screen = stage.play(ESTIMATE, *keys[:-1], typed("0.5"), LEAVE)
    assert "--chunk-duration takes 0 (whole songs) or at least 1 second." in " ".join(screen.split())


def test_a_place_that_the_map_cannot_have_is_refused_where_it_is_asked(stage: Stage):
    folder = stage.tensors()
    (stage.folder / "a.json").mkdir()
    paths = [ENTER, ENTER, typed(folder), typed("map.png"), typed("a.json"), typed("map.json")]
    _, screen = stage.play(ESTIMATE, *forward(folder), CHANGE, ENTER, *paths, START)
    assert "does not end in .json" in " ".join(screen.split())
    assert "is a folder" in " ".join(screen.split())
    assert stage.started[0].values["output"] == Path("map.json")


def test_a_map_leads_to_the_run_that_it_was_made_for(stage: Stage):
    data = stage.tensors()
    save_preset("mine", resolve_training("fixed", {"dataset_dir": "a", "output_dir": "b", "epochs": 3}).config)
    stage.start_hooks = {0: lambda: make_map(data / "rank_map.json")}
    keys = forward(data, preset=down(1))
    # Train a LoRA with this map: the preset, the data and the windows are known, and the rank is no question any more.
    training = [ENTER, *[ENTER] * 13, START]
    _, screen = stage.play(ESTIMATE, *keys[:-1], typed("30"), START, *training)
    measured, trained = stage.started
    assert config_of(measured).chunk_duration == 30
    assert trained.values["preset"] == "mine"
    config = resolve_training(trained.command, {k: v for k, v in trained.values.items() if k != "preset"},
                              preset="mine").config  # fmt: skip
    assert (config.rank_map, config.chunk_duration, config.epochs) == (data / "rank_map.json", 30.0, 3)
    assert config.dataset_dir == data
    assert "Rank:" not in screen[screen.index("What happens") :]


def test_another_preset_is_not_overridden_by_what_the_map_was_made_with(stage: Stage):
    data = stage.tensors()
    values = {"dataset_dir": "a", "output_dir": "b", "chunk_duration": 60}
    save_preset("mine", resolve_training("fixed", values).config)
    stage.start_hooks = {0: lambda: make_map(data / "rank_map.json")}
    keys = forward(data)
    stage.play(ESTIMATE, *keys[:-1], typed("30"), START, ENTER, down(1), *[ENTER] * 12, START)
    assert "chunk_duration" not in stage.started[1].values
    assert stage.started[1].values["rank_map"] == data / "rank_map.json"


def test_a_map_beside_the_dataset_is_found_and_may_be_declined(stage: Stage):
    data = stage.tensors()
    make_map(data / "rank_map.json")
    forward = basic(data)
    # The map takes the rank's place; declined, the rank is asked after all.
    stage.play(LORA, *forward, START)
    stage.play(LORA, *forward[:6], typed(""), typed("16"), *forward[7:], START)
    with_map, without = (run_of(plan) for plan in stage.started)
    assert (with_map.dataset_dir, with_map.rank_map) == (data, data / "rank_map.json")
    assert (without.rank_map, without.rank) == (None, 16)


@pytest.mark.parametrize("reason", ["damaged", "a folder", "another model"])
def test_a_map_that_cannot_be_trained_with_is_not_suggested(stage: Stage, reason: str):
    data = stage.tensors()
    path = data / "rank_map.json"
    make_map(path, variant="base") if reason == "another model" else None
    path.write_text("{") if reason == "damaged" else None
    path.mkdir() if reason == "a folder" else None
    stage.play(LORA, *basic(data), START)
    assert "rank_map" not in stage.started[0].values
    assert set(stage.started[0].values) == {"checkpoint_dir", "dataset_dir", "output_dir"}


def test_an_adapter_without_ranks_of_its_own_is_offered_no_map(stage: Stage):
    data = stage.tensors()
    make_map(data / "rank_map.json")
    stage.play(LOKR, *basic(data), START)
    assert "rank_map" not in stage.started[0].values


def test_preprocessing_leads_to_it(stage: Stage):
    songs = stage.songs()
    stage.start_hooks = {0: lambda: stage.tensors("songs_tensors")}
    preprocessing = [down(3), *MODEL, typed(songs), ENTER, ENTER, START]
    stage.play(*preprocessing, down(2), *[ENTER] * 10, START)
    assert [plan.command for plan in stage.started] == ["fixed", "estimate"]
    assert config_of(stage.started[1]).dataset_dir == stage.folder / "songs_tensors"
