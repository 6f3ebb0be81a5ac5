"""The wizard's way to a training run, driven by keys: its questions."""

from pathlib import Path

import pytest

from sidestep.config.places import remember
from sidestep.config.settings import settings_of
from sidestep.config.train import TrainConfig
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
from tests.unit.training_keys import (
    BASIC,
    EVERYTHING,
    FRESH,
    LOKR,
    LORA,
    MODEL,
    SETTINGS_ASKED,
    START,
    basic,
    config_of,
    config_typed,
)

__all__ = ["stage"]


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
    adapter = [ENTER, ENTER, typed("8"), ENTER, typed("0.25")]  # The second: no rank map.
    keys = [FRESH, EVERYTHING, groups, *MODEL, typed(data), ENTER, *adapter]
    _, screen = stage.play(LORA, *keys, LEAVE)
    assert "Groups: Adapter" in screen
    assert "Adapter type: lora" in screen
    assert "Dropout: 0.25" in screen


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


def test_answers_that_cannot_be_remembered_are_no_reason_to_stop(stage: Stage):
    (stage.folder / "config").write_text("a file where the folder should be")
    code, screen = stage.play(LORA, *basic(stage.tensors()), START, EXIT_AFTERWARDS)
    assert (code, len(stage.started)) == (0, 1)
    assert "Warning: The next start will not know these answers" in " ".join(screen.split())


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
