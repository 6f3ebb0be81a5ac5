"""The wizard's way to a training run, driven by keys."""

import json
from pathlib import Path

import pytest

from sidestep.config.flags import parse
from sidestep.config.places import remember
from sidestep.config.presets import read_preset, save_preset
from sidestep.config.resolve import resolve_training
from sidestep.config.settings import settings_of
from sidestep.config.train import TrainConfig
from sidestep.errors import RunError
from sidestep.ui.command_line import Plan, words_of
from sidestep.ui.machine import Gpu
from sidestep.ui.session import CARRIED
from sidestep.ui.train_flow import ORDER
from tests.unit.stage import (
    BACK,
    DOWN,
    END,
    ENTER,
    EXIT,
    EXIT_AFTERWARDS,
    LEAVE,
    SPACE,
    Stage,
    down,
    make_models,
    stage,
    typed,
)

__all__ = ["stage"]
LORA, LOKR = ENTER, down(1)
MODEL = [ENTER, ENTER]  # The checkpoint folder and the model that are suggested.
FRESH = ENTER
BASIC, EVERYTHING = ENTER, down(1)
START, CHANGE, SAVE, CANCEL = ENTER, down(1), down(2), down(3)
SETTINGS_ASKED = ["rank", "alpha", "learning_rate", "batch_size", "gradient_accumulation", "epochs", "chunk_duration",
                  "save_every"]  # fmt: skip


def basic(data: Path, *, preset: str = FRESH, settings: int = len(SETTINGS_ASKED)) -> list[str]:
    """The keys of every basic question, all suggestions accepted but the dataset."""
    return [preset, BASIC, *MODEL, typed(data), ENTER, *[ENTER] * settings]


def config_of(plan: Plan) -> TrainConfig:
    values = {name: value for name, value in plan.values.items() if name != "preset"}
    return resolve_training(plan.command, values, preset=plan.values.get("preset")).config


def config_typed(plan: Plan) -> TrainConfig:
    """What the printed command line comes to."""
    typed_words = parse(words_of(plan))
    values = dict(typed_words.values)
    preset = values.pop("preset", None)
    assert typed_words.command == plan.command
    return resolve_training(typed_words.command, values, preset=preset).config


def test_enter_all_the_way_trains_a_lora_with_the_defaults(stage: Stage):
    data = stage.tensors()
    code, screen = stage.play(LORA, *basic(data), START, EXIT_AFTERWARDS)
    (plan,) = stage.started
    assert code == 0
    assert plan.command == "fixed"
    assert plan.values == {
        "checkpoint_dir": stage.folder / "models",
        "dataset_dir": data,
        "output_dir": Path("output/tensors_lora"),
    }
    assert config_typed(plan) == config_of(plan)
    assert "Train a LoRA" in screen


def test_the_questions_are_the_basic_settings_of_the_declaration():
    declared = {s.name for s in settings_of(TrainConfig) if s.ask == "basic"}
    asked_otherwise = {*CARRIED, "adapter_type", "normalize"}
    assert declared - asked_otherwise == set(SETTINGS_ASKED)


def test_answers_become_settings_and_the_command_line_says_the_same(stage: Stage):
    data = stage.tensors()
    keys = [FRESH, BASIC, *MODEL, typed(data), typed("out put/my 'first'"), typed("32"), ENTER, typed("3e-4"),
            ENTER, typed("2"), typed("7"), typed("12.5"), ENTER]  # fmt: skip
    stage.play(LOKR, *keys, START)
    (plan,) = stage.started
    config = config_of(plan)
    assert (config.adapter_type, config.rank, config.alpha) == ("lokr", 32, 64.0)
    assert (config.learning_rate, config.gradient_accumulation, config.epochs) == (3e-4, 2, 7)
    assert (config.chunk_duration, config.output_dir) == (12.5, Path("out put/my 'first'"))
    assert config_typed(plan) == config


def test_going_back_from_every_question_keeps_the_answers(stage: Stage):
    data = stage.tensors()
    forward = [FRESH, BASIC, *MODEL, typed(data), typed("there"), typed("8"), ENTER, typed("0.001"), ENTER, ENTER,
               typed("3"), ENTER, ENTER]  # fmt: skip
    stage.play(LORA, *forward, START)
    (expected,) = stage.started
    stage.started.clear()
    # Back from each question (and from the review), Enter on the one before, which shows its answer, and on.
    back_and_forth = [key for answer in forward for key in (answer, BACK, ENTER)]
    stage.play(LORA, *back_and_forth, START)
    assert stage.started == [expected]


def test_going_back_all_the_way_and_accepting_everything_again_changes_nothing(stage: Stage):
    data = stage.tensors()
    forward = [FRESH, BASIC, *MODEL, typed(data), typed("there"), typed("8"), *[ENTER] * 7]
    stage.play(LORA, *forward, START)
    (expected,) = stage.started
    stage.started.clear()
    stage.play(LORA, *forward, *[BACK] * len(forward), *[ENTER] * len(forward), START)
    assert stage.started == [expected]


def test_back_from_the_first_question_leads_to_the_menu(stage: Stage):
    code, _ = stage.play(LORA, BACK, EXIT)
    assert (code, stage.started) == (0, [])


def test_leaving_at_every_question_starts_nothing(stage: Stage):
    data = stage.tensors()
    forward = [LORA, *basic(data)]
    for place in range(len(forward) + 1):
        code, _ = stage.play(*forward[:place], LEAVE)
        assert (code, stage.started) == (130, [])
    assert not (stage.folder / "output").exists()


def test_cancel_in_the_review_leads_to_the_menu(stage: Stage):
    code, _ = stage.play(LORA, *basic(stage.tensors()), CANCEL, EXIT)
    assert (code, stage.started) == (0, [])


def test_the_preset_for_this_gpu_comes_first_and_says_so(stage: Stage):
    stage.gpus = (Gpu("Card", 12),)
    data = stage.tensors()
    stage.play(LORA, *basic(data, preset=down(1)), START)
    assert stage.started[0].values["preset"] == "vram_12gb"


@pytest.mark.parametrize(
    ("place", "wrong", "reason"),
    [
        (4, "nowhere", "There is no folder nowhere."),
        (4, "models", "models holds neither tensors (.pt files) nor songs."),
        (4, "", "A dataset is needed to train."),
        (5, "", "A folder is needed to train."),
        (6, "0", "--rank takes a whole number from 1 to 4096, not 0."),
        (6, "many", "--rank takes a whole number from 1 to 4096, not many."),
        (8, "nan", "--learning-rate takes a number above 0, not nan."),
        (11, "1.5", "--epochs takes a whole number"),
    ],
)
def test_a_wrong_value_is_explained_and_the_question_stays(stage: Stage, place: int, wrong: str, reason: str):
    forward = basic(stage.tensors())
    right = typed("7") if place in (6, 8, 11) else forward[place]
    right = typed("output/here") if place == 5 else right
    _, screen = stage.play(LORA, *forward[:place], typed(wrong), right, *forward[place + 1 :], START)
    assert reason in " ".join(screen.split())
    assert len(stage.started) == 1


def test_what_was_typed_wrongly_can_be_mended_instead_of_typed_again(stage: Stage):
    forward = basic(stage.tensors())
    # 99999 is refused; taking the last two digits away makes 999 of it. Then what lacks its end gets it by typing on.
    stage.play(LORA, *forward[:6], typed("99999"), "\x7f\x7f" + ENTER, *forward[7:], START)
    stage.play(LORA, *forward[:4], typed("tens"), "ors" + ENTER, *forward[5:], START)
    assert stage.started[0].values["rank"] == 999
    assert stage.started[1].values["dataset_dir"] == Path("tensors")


def test_typing_or_pasting_replaces_a_suggestion_that_was_not_touched(stage: Stage):
    data, dragged = stage.tensors(), stage.tensors("夜 の 歌", songs=2)
    forward = basic(data)
    stage.play(LORA, *forward, START)
    # The dataset of the first time is suggested, and a folder is dragged in; then 32 is typed where 64 stands.
    pasted = f"\x1b[200~'{dragged}' \x1b[201~" + ENTER
    stage.play(LORA, *forward[:4], pasted, ENTER, "32" + ENTER, *forward[7:], START)
    assert stage.started[1].values["dataset_dir"] == dragged
    assert stage.started[1].values["rank"] == 32


def test_a_suggested_path_is_gone_on_with_or_begun_anew(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(stage.folder))
    data = stage.tensors()
    inner = stage.tensors("tensors/inner")
    forward = basic(data)
    stage.play(LORA, *forward, START)
    stage.play(LORA, *forward[:4], END + "/inner" + ENTER, "~/new" + ENTER, *forward[6:], START)
    assert stage.started[1].values["dataset_dir"] == inner
    assert stage.started[1].values["output_dir"] == stage.folder / "new"


def test_alpha_follows_the_rank_until_it_is_given(stage: Stage):
    forward = basic(stage.tensors())
    stage.play(LORA, *forward[:6], typed("16"), *forward[7:], START)
    assert (stage.started[0].values["rank"], stage.started[0].values["alpha"]) == (16, 32.0)


def test_a_preset_sets_what_it_says_and_is_named_in_the_command(stage: Stage):
    data = stage.tensors()
    _, screen = stage.play(LORA, *basic(data, preset=down(2)), START)
    (plan,) = stage.started
    name = plan.values["preset"]
    assert "rank" not in plan.values
    assert config_of(plan).rank == read_preset(name)["rank"]
    assert config_typed(plan) == config_of(plan)
    assert f"Sets rank {read_preset(name)['rank']}" in screen


def test_what_was_accepted_before_never_overrides_a_preset_chosen_later(stage: Stage):
    data = stage.tensors()
    save_preset("mine", resolve_training("fixed", {"dataset_dir": "a", "output_dir": "b", "rank": 5}).config)
    forward = basic(data)
    # Everything is answered with the defaults, then the user goes back to the first question and takes the preset.
    stage.play(LORA, *forward, *[BACK] * len(forward), down(1), *[ENTER] * (len(forward) - 1), START)
    (plan,) = stage.started
    assert plan.values["preset"] == "mine"
    assert config_of(plan).rank == 5


def test_what_an_earlier_start_remembered_cannot_override_a_preset(stage: Stage):
    assert not [s.name for s in settings_of(TrainConfig) if s.name in CARRIED and s.in_presets]
    remember("rank", "3")
    stage.play(LORA, *basic(stage.tensors()), START)
    assert "rank" not in stage.started[0].values


def test_a_broken_preset_of_the_users_own_is_explained(stage: Stage):
    folder = stage.folder / "config" / "sidestep" / "presets"
    folder.mkdir(parents=True)
    (folder / "aaa.json").write_text('{"rnk": 3}')
    _, screen = stage.play(LORA, down(1), LEAVE)
    assert "There is no setting 'rnk' (did you mean rank?)" in " ".join(screen.split())


def test_the_next_action_and_the_next_start_suggest_what_was_used(stage: Stage):
    data = stage.tensors("first/tensors")
    away = stage.folder / "away"
    again = [FRESH, BASIC, *MODEL, *[ENTER] * (2 + len(SETTINGS_ASKED))]
    forward = [FRESH, BASIC, ENTER, down(1), typed(data), typed(away / "one"), *[ENTER] * len(SETTINGS_ASKED)]
    stage.play(LORA, *forward, START, down(1), LORA, *again, START)
    stage.play(LORA, *again, START)
    first, second, third = (config_of(plan) for plan in stage.started)
    assert second.dataset_dir == third.dataset_dir == data == first.dataset_dir
    assert second.model_variant == third.model_variant == first.model_variant
    assert second.output_dir == third.output_dir == away / "tensors_lora"


def test_a_remembered_folder_that_is_gone_is_not_suggested(stage: Stage):
    remember("dataset_dir", str(stage.folder / "gone"))
    forward = basic(stage.tensors())
    _, screen = stage.play(LORA, *forward[:4], ENTER, LEAVE)
    assert "A dataset is needed to train." in screen


def test_a_folder_of_songs_is_preprocessed_first(stage: Stage):
    songs = stage.songs()
    keys = [FRESH, BASIC, *MODEL, typed(songs), ENTER, ENTER, ENTER, *[ENTER] * len(SETTINGS_ASKED)]
    _, screen = stage.play(LORA, *keys, START)
    (plan,) = stage.started
    config = config_of(plan)
    assert (config.preprocess, config.audio_dir, config.dataset_dir) == (True, songs, None)
    assert (config.tensor_output, config.output_dir) == (stage.folder / "songs_tensors", Path("output/songs_lora"))
    assert config_typed(plan) == config
    assert "they are preprocessed first" in " ".join(screen.split())


def test_everything_asks_the_marked_groups_in_full(stage: Stage):
    data = stage.tensors()
    # Only the group Adapter stays marked: Training and Objective are unmarked on the way down.
    groups = DOWN * 3 + SPACE + DOWN + SPACE + ENTER
    adapter = [ENTER, typed("8"), ENTER, typed("0.25")]
    keys = [FRESH, EVERYTHING, groups, *MODEL, typed(data), ENTER, *adapter]
    _, screen = stage.play(LORA, *keys, LEAVE)
    assert "Groups: Adapter" in screen
    assert "Adapter type: lora" in screen
    assert "Dropout: 0.25" in screen


def test_vanilla_pins_its_settings_and_neither_asks_nor_types_them(stage: Stage):
    data = stage.tensors()
    forward = basic(data)
    # Change a group: Objective, whose first question is the recipe.
    _, screen = stage.play(LORA, *forward, CHANGE, *pick_group("Objective"), down(1), ENTER, START)
    (plan,) = stage.started
    assert plan.command == "vanilla"
    assert config_typed(plan) == config_of(plan)
    assert "the eight timesteps of shift 3" in " ".join(screen.split())


def pick_group(name: str) -> list[str]:
    """The keys that choose a group in the review of a run on tensors."""
    return [down([group for group in ORDER if group != "Preprocessing"].index(name))]


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
    adapter = [ENTER, typed("12"), *[ENTER] * (len(asked) - 2)]
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


def test_the_settings_can_be_saved_as_a_preset(stage: Stage):
    forward = basic(stage.tensors())
    keys = [
        *forward[:6],
        typed("16"),
        *forward[7:],
        SAVE,
        typed("no/name"),
        typed("recommended"),
        typed("夜の歌"),
        START,
    ]
    _, screen = stage.play(LORA, *keys)
    assert read_preset("夜の歌") == {"rank": 16, "alpha": 32.0}
    assert "'no/name' cannot be the name of a preset" in " ".join(screen.split())
    assert "There is a preset recommended already" in " ".join(screen.split())
    assert len(stage.started) == 1


def test_a_preset_is_not_silently_written_over(stage: Stage):
    save_preset("two words", resolve_training("fixed", {"dataset_dir": "a", "output_dir": "b", "rank": 5}).config)
    forward = basic(stage.tensors())
    _, screen = stage.play(LORA, *forward, SAVE, typed("two words"), typed("Two_Words"), LEAVE)
    words = " ".join(screen.split())
    assert "There is a preset two words already" in words and "There is a preset Two_Words already" in words
    assert read_preset("two_words") == {"rank": 5}


def test_where_a_preset_was_saved_stays_in_sight(stage: Stage):
    _, screen = stage.play(LORA, *basic(stage.tensors()), SAVE, typed("mine"), LEAVE)
    assert "Saved:" in screen[screen.rindex("The same as a command") :]


def test_a_preset_of_another_kind_of_adapter_says_what_it_does_not_decide(stage: Stage):
    values = {"dataset_dir": "a", "output_dir": "b", "adapter_type": "lokr", "rank": 5}
    save_preset("mine", resolve_training("fixed", values).config)
    _, screen = stage.play(LORA, down(1), LEAVE)
    assert "Sets adapter type lokr, rank 5. But for its adapter type: this trains a LoRA." in " ".join(screen.split())


def test_a_value_of_a_preset_can_be_left_to_the_default_again(stage: Stage):
    data = stage.tensors()
    save_preset("mine", resolve_training("fixed", {"dataset_dir": "a", "output_dir": "b", "rank": 5, "learning_rate":
                                                   0.5, "compile": True}).config)  # fmt: skip
    forward = basic(data, preset=down(1))
    _, screen = stage.play(LORA, *forward[:8], typed(""), *forward[9:], START)
    (plan,) = stage.started
    assert (config_of(plan).learning_rate, config_of(plan).rank, config_of(plan).compile) == (None, 5, True)
    assert config_typed(plan) == config_of(plan)
    assert "Learning rate: 0.0001; prodigy: 1" in screen


def test_enter_leaves_every_setting_of_every_group_at_its_default(stage: Stage):
    data = stage.tensors()
    groups = [group for group in ORDER if group != "Preprocessing"]
    marks = {"Adapter", "Training", "Objective"}
    mark_all = "".join((SPACE if group not in marks else "") + DOWN for group in ORDER) + ENTER
    keys = [FRESH, EVERYTHING, mark_all, *MODEL, typed(data)]
    _, screen = stage.play(LORA, *keys, *[ENTER] * 100)
    (plan, *_) = stage.started
    assert set(plan.values) == {"checkpoint_dir", "dataset_dir", "output_dir"}
    assert "Groups: Model and paths" in screen and "Compile: auto" in screen
    assert all(group in " ".join(screen.split()) for group in groups)


def test_the_review_names_the_dataset_and_a_recipe_that_is_not_the_usual_one(stage: Stage):
    data = stage.tensors()
    _, screen = stage.play(LORA, *basic(data), CHANGE, *pick_group("Objective"), down(1), ENTER, LEAVE)
    review = screen[screen.rindex("Model and paths") :]
    assert f"Dataset{data}" in "".join(review.split())
    assert "Recipe vanilla *" in " ".join(review.split())


def test_answers_that_cannot_be_remembered_are_no_reason_to_stop(stage: Stage):
    (stage.folder / "config").write_text("a file where the folder should be")
    code, screen = stage.play(LORA, *basic(stage.tensors()), START, EXIT_AFTERWARDS)
    assert (code, len(stage.started)) == (0, 1)
    assert "Warning: The next start will not know these answers" in " ".join(screen.split())


def test_an_action_that_fails_says_why_and_keeps_every_answer(stage: Stage):
    stage.failures.append(RunError("The GPU is out of memory.", hint="Lower the rank."))
    forward = basic(stage.tensors())
    code, screen = stage.play(LORA, *forward, START, START, EXIT_AFTERWARDS)
    assert "The GPU is out of memory." in screen and "Lower the rank." in screen
    assert stage.started[0] == stage.started[1]
    assert code == 0


def test_a_contradiction_is_said_in_the_review_and_cannot_be_started(stage: Stage):
    forward = basic(stage.tensors())
    forward[-2] = typed("0.5")
    _, screen = stage.play(LORA, *forward, LEAVE)
    assert "--chunk-duration takes 0 (whole songs) or at least 1 second." in " ".join(screen.split())


def test_an_output_folder_with_a_run_is_refused_with_two_ways_out(stage: Stage):
    data = stage.tensors()
    run = stage.run("old")
    forward = basic(data)
    _, screen = stage.play(LORA, *forward[:5], typed(run), LEAVE)
    assert "choose another folder, or resume that run" in " ".join(screen.split())


def test_the_model_is_chosen_from_what_is_there_and_a_fine_tune_says_what_it_is(stage: Stage):
    make_models(stage.folder / "models", "夜想曲")
    data = stage.tensors()
    # The list: turbo, base, then the folder of the fine-tune, which does not say what it descends from.
    keys = [FRESH, BASIC, ENTER, down(2), ENTER, typed(data), *[ENTER] * 9]
    stage.play(LORA, *keys, START)
    config = config_of(stage.started[0])
    assert (config.model_variant, config.base_model) == ("夜想曲", "turbo")
    assert config_typed(stage.started[0]) == config
