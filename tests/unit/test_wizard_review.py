"""The wizard's last look at a training run: what it shows, what can be changed there, and what starts."""

import json

from sidestep.config.presets import save_preset
from sidestep.config.resolve import resolve_training
from sidestep.config.settings import settings_of
from sidestep.config.train import TrainConfig
from sidestep.errors import RunError
from tests.unit.stage import BACK, ENTER, EXIT, EXIT_AFTERWARDS, LEAVE, Stage, down, stage, typed
from tests.unit.training_keys import (
    CANCEL,
    CHANGE,
    LORA,
    SETTINGS_ASKED,
    START,
    basic,
    config_of,
    config_typed,
    pick_group,
)

__all__ = ["stage"]


def test_cancel_in_the_review_leads_to_the_menu(stage: Stage):
    code, _ = stage.play(LORA, *basic(stage.tensors()), CANCEL, EXIT)
    assert (code, stage.started) == (0, [])


def test_the_review_shows_what_differs_what_happens_and_the_command(stage: Stage):
    data = stage.tensors()
    forward = basic(data)
    _, screen = stage.play(LORA, *forward[:6], typed("16"), *forward[7:])
    words = " ".join(screen.split())
    assert "Rank 16 *" in words
    assert "Epochs 100" in words and "Epochs 100 *" not in words
    assert "about 100 (4 songs / (1 x 4), 100 epochs)" in words
    assert "output/tensors_lora" in words
    assert f"--dataset-dir {data}" in screen.replace("\n", "")


def test_the_review_counts_no_steps_for_songs_that_are_held_out(stage: Stage):
    known = {"dataset_dir": "a", "output_dir": "b", "val_split": 0.4}
    save_preset("mine", resolve_training("fixed", known).config)
    _, screen = stage.play(LORA, *basic(stage.tensors(songs=6), preset=down(1)), LEAVE)
    assert "about 100 (4 songs / (1 x 4), 100 epochs)" in " ".join(screen.split())


def test_a_start_from_a_rank_map_is_asked_for_only_where_a_map_or_a_preset_wants_it(stage: Stage):
    data = stage.tensors()
    review = [CHANGE, *pick_group("Adapter"), *[ENTER] * 30, LEAVE]
    _, screen = stage.play(LORA, *basic(data), *review)
    assert "Init from" in screen and "Rank map start" not in screen
    values = {"dataset_dir": "a", "output_dir": "b", "rank_map": "c", "rank_map_start": True}
    save_preset("mine", resolve_training("fixed", values).config)
    _, screen = stage.play(LORA, *basic(data, preset=down(1)), *review)
    assert "Rank map start" in screen


def test_time_and_memory_are_those_of_a_run_like_this_one(stage: Stage):
    data = stage.tensors()
    run = stage.run("old", epoch=10, dataset_dir=data)
    steps = [{"event": "metrics", "step": step, "epoch": step, "steps_per_second": 0.5, "memory_gib": 6.25} for step in
             (9, 10)]  # fmt: skip
    events = [*steps, {"event": "epoch_done", "step": 10, "epoch": 10, "loss": 0.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    forward = basic(data)
    _, screen = stage.play(LORA, *forward[:3], down(1), *forward[4:], LEAVE)
    words = " ".join(screen.split())
    assert "Time about 3 min 20 s, at the pace of old" in words and "Memory 6.2 GiB of the device, as in old" in words
    _, screen = stage.play(LORA, *forward[:3], down(1), *forward[4:6], typed("8"), *forward[7:], LEAVE)
    words = " ".join(screen.split())
    assert "Time not known before the first steps" in words and "on CUDA a step is measured" in words
    _, screen = stage.play(down(5), ENTER, typed("40"), LEAVE)
    assert "Time about 1 min 0 s more, at the pace it had" in " ".join(screen.split())


def test_a_group_can_be_changed_in_the_review(stage: Stage):
    forward = basic(stage.tensors())
    asked = [s for s in settings_of(TrainConfig) if s.group == "Adapter" and (not s.when or "lora" in s.when.values)]
    adapter = [ENTER, ENTER, typed("12"), *[ENTER] * (len(asked) - 4)]  # The second: no rank map, so no start from it.
    stage.play(LORA, *forward, CHANGE, *pick_group("Adapter"), *adapter, START)
    (plan,) = stage.started
    assert plan.values["rank"] == 12


def test_back_out_of_a_group_leads_to_the_groups_and_then_to_the_review(stage: Stage):
    forward = basic(stage.tensors())
    stage.play(LORA, *forward, CHANGE, *pick_group("Adapter"), BACK, BACK, START)
    assert len(stage.started) == 1


def test_three_questions_back_from_the_review_another_rank_can_be_given(stage: Stage):
    forward = basic(stage.tensors())
    back = len(SETTINGS_ASKED)
    stage.play(LORA, *forward, *[BACK] * back, typed("24"), *[ENTER] * (back - 1), START)
    assert stage.started[0].values["rank"] == 24


def test_vanilla_pins_its_settings_and_neither_asks_nor_types_them(stage: Stage):
    data = stage.tensors()
    forward = basic(data)
    # Change a group: Objective, whose first question is the recipe.
    _, screen = stage.play(LORA, *forward, CHANGE, *pick_group("Objective"), down(1), ENTER, START)
    (plan,) = stage.started
    assert plan.command == "vanilla"
    assert config_typed(plan) == config_of(plan)
    assert "the eight timesteps of shift 3" in " ".join(screen.split())


def test_the_review_names_the_dataset_and_a_recipe_that_is_not_the_usual_one(stage: Stage):
    data = stage.tensors()
    _, screen = stage.play(LORA, *basic(data), CHANGE, *pick_group("Objective"), down(1), ENTER, LEAVE)
    review = screen[screen.rindex("Model and paths") :]
    assert f"Dataset{data}" in "".join(review.split())
    assert "Recipe vanilla *" in " ".join(review.split())


def test_a_contradiction_is_said_in_the_review_and_cannot_be_started(stage: Stage):
    forward = basic(stage.tensors())
    forward[-2] = typed("0.5")
    _, screen = stage.play(LORA, *forward, LEAVE)
    assert "--chunk-duration takes 0 (whole songs) or at least 1 second." in " ".join(screen.split())


def test_an_action_that_fails_says_why_and_keeps_every_answer(stage: Stage):
    stage.failures.append(RunError("The GPU is out of memory.", hint="Lower the rank."))
    forward = basic(stage.tensors())
    code, screen = stage.play(LORA, *forward, START, START, EXIT_AFTERWARDS)
    assert "The GPU is out of memory." in screen and "Lower the rank." in screen
    assert stage.started[0] == stage.started[1]
    assert code == 0
