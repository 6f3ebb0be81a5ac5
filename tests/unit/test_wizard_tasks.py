"""The wizard's other entries: building, preprocessing, resuming, presets, settings, and how they chain."""

from pathlib import Path

import pytest

from sidestep.config.flags import parse
from sidestep.config.places import remembered
from sidestep.config.presets import preset_names, read_preset, save_preset
from sidestep.config.resolve import resolve_training
from sidestep.config.settings import build, parse_values, settings_of
from sidestep.config.shell import shell_line, start_words
from sidestep.config.tasks import BuildDatasetConfig
from sidestep.config.train import TrainConfig
from sidestep.errors import ConfigError, DataError
from sidestep.ui import problems
from sidestep.ui.command_line import Plan, command_line, words_of
from sidestep.ui.preset_list import RECOMMENDED, preset_choices
from sidestep.ui.problems import close_log, open_log
from sidestep.ui.session import Session
from tests.unit.stage import BACK, ENTER, EXIT, EXIT_AFTERWARDS, LEAVE, UP, Stage, down, make_models, stage, typed

__all__ = ["stage"]
BUILD, PREPROCESS, _, RESUME, PRESETS, SETTINGS = (down(place) for place in range(2, 8))
START, CHANGE = ENTER, down(1)
BASIC_OF_BUILDING = 2  # The folder and the tag.


def built(plan: Plan) -> BuildDatasetConfig:
    return build(BuildDatasetConfig, parse_values(BuildDatasetConfig, plan.values))


def resolved(plan: Plan) -> TrainConfig:
    return resolve_training(plan.command, plan.values).config


def resolved_from_words(plan: Plan) -> TrainConfig:
    words = parse(words_of(plan))
    assert words.command == plan.command
    return resolve_training(words.command, words.values).config


def test_a_dataset_is_built_with_a_tag(stage: Stage):
    songs = stage.songs("my songs")
    code, screen = stage.play(BUILD, typed(f"'{songs}'"), typed("-dash tag"), START, EXIT_AFTERWARDS)
    (plan,) = stage.started
    assert built(plan) == BuildDatasetConfig(input=songs, tag="-dash tag")
    assert built(Plan(plan.command, parse(words_of(plan)).values)) == built(plan)
    assert "".join(f"Writes {songs}/dataset.json".split()) in "".join(screen.split())
    assert code == 0


def test_building_goes_back_from_every_question_and_cancels_at_every_one(stage: Stage):
    songs = stage.songs()
    forward = [typed(songs), typed("tag")]
    stage.play(BUILD, *(key for answer in forward for key in (answer, BACK, ENTER)), START)
    assert built(stage.started.pop()) == BuildDatasetConfig(input=songs, tag="tag")
    for place in range(len(forward) + 1):
        code, _ = stage.play(BUILD, *forward[:place], LEAVE)
        assert (code, stage.started) == (130, [])
    assert stage.play(BUILD, BACK, down(6))[0] == 0


def test_a_group_of_building_can_be_changed(stage: Stage):
    songs = stage.songs()
    others = [ENTER, typed("out.json"), typed("Mine"), ENTER, down(2), typed("101"), typed("30")]
    _, screen = stage.play(BUILD, typed(songs), ENTER, CHANGE, ENTER, *others, START)
    (plan,) = stage.started
    assert "--genre-ratio takes a whole number from 0 to 100, not 101." in " ".join(screen.split())
    config = built(plan)
    assert (config.output, config.name, config.tag_position, config.genre_ratio) == (
        Path("out.json"), "Mine", "replace", 30,
    )  # fmt: skip
    assert built(Plan(plan.command, parse(words_of(plan)).values)) == config


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [("nowhere", "nowhere does not exist."), ("models", "There is no audio in models"), ("", "A path is needed here.")],
)
def test_a_folder_without_songs_is_explained(stage: Stage, wrong: str, reason: str):
    songs = stage.songs()
    _, screen = stage.play(BUILD, typed(wrong), typed(songs), ENTER, START)
    assert reason in " ".join(screen.split())
    assert len(stage.started) == 1


def test_preprocessing_asks_for_model_songs_tensors_and_loudness(stage: Stage):
    songs = stage.songs()
    keys = [ENTER, down(1), typed(songs), ENTER, down(1)]
    stage.play(PREPROCESS, *keys, START)
    (plan,) = stage.started
    config = resolved(plan)
    assert (config.preprocess, config.audio_dir, config.normalize) == (True, songs, "peak")
    assert (config.model_variant, config.output_dir) == ("base", None)
    assert config.tensor_output == stage.folder / "songs_tensors"
    assert resolved_from_words(plan) == config


def test_preprocessing_goes_back_from_every_question_and_cancels_at_every_one(stage: Stage):
    songs = stage.songs()
    forward = [ENTER, down(1), typed(songs), typed("there"), down(2)]
    stage.play(PREPROCESS, *forward, START)
    expected = stage.started.pop()
    # What was carried over from the first time shows the chosen model: accept it.
    again = [ENTER, ENTER, *forward[2:]]
    stage.play(PREPROCESS, *(key for answer in again for key in (answer, BACK, ENTER)), START)
    assert stage.started.pop() == expected
    for place in range(len(forward) + 1):
        code, _ = stage.play(PREPROCESS, *forward[:place], LEAVE)
        assert (code, stage.started) == (130, [])
    assert stage.play(PREPROCESS, BACK, down(5))[0] == 0


def test_a_folder_that_no_tensor_came_into_is_not_suggested_for_training(tmp_path: Path):
    session = Session(warn=lambda text: None)
    tensors = tmp_path / "tensors"
    tensors.mkdir()
    session.keep(dataset_dir=tensors)
    assert session.get("dataset_dir") is None
    (tensors / "song.pt").touch()
    assert session.get("dataset_dir") == tensors


def test_one_step_leads_to_the_next_with_the_paths_filled_in(stage: Stage):
    songs = stage.songs()
    building = [BUILD, typed(songs), ENTER, START]
    preprocessing = [ENTER, *[ENTER] * 5, START]
    into_training = [ENTER, *[ENTER] * 14]
    # The tensors are there once preprocessing is done.
    stage.start_hooks = {1: lambda: stage.tensors("songs_tensors")}
    stage.play(*building, *preprocessing, *into_training, START, EXIT_AFTERWARDS)
    build_plan, preprocess_plan, train_plan = stage.started
    assert build_plan.values["input"] == songs
    assert resolved(preprocess_plan).audio_dir == songs
    assert resolved(train_plan).dataset_dir == resolved(preprocess_plan).tensor_output
    assert resolved(train_plan).adapter_type == "lora"
    assert resolved_from_words(train_plan) == resolved(train_plan)


def test_back_from_the_next_step_leads_to_what_next_and_then_to_the_menu(stage: Stage):
    code, _ = stage.play(BUILD, typed(stage.songs()), ENTER, START, ENTER, BACK, BACK, EXIT)
    assert (code, len(stage.started)) == (0, 1)


def test_a_run_of_the_other_recipe_is_gone_on_with_by_the_command_that_is_shown(stage: Stage):
    run = stage.run("it's a run")
    with pytest.raises(ConfigError) as caught:
        resolve_training("vanilla", {"resume_from": run})
    assert caught.value.hint == f"Resume it with:\n  {shell_line([*start_words(), 'fixed', '--resume-from', run])}"


def test_a_run_goes_on_with_what_may_change(stage: Stage):
    stage.tensors()
    run = stage.run("lora", rank=8, epochs=20)
    _, screen = stage.play(RESUME, ENTER, typed("40"), START)
    (plan,) = stage.started
    assert (plan.command, plan.values) == ("fixed", {"resume_from": run, "epochs": 40})
    assert resolved(plan).rank == 8
    assert resolved_from_words(plan) == resolved(plan)
    words = " ".join(screen.split())
    assert "epoch 10 of 20" in words and "loss 0.7500" in words
    assert "Stays: model variant base, adapter type lora, rank 8" in words
    assert "May change: " in words and "epochs" in words


def test_resuming_goes_back_from_every_question_and_cancels_at_every_one(stage: Stage):
    stage.tensors()
    stage.run("lora", epochs=20)
    forward = [ENTER, typed("40")]
    stage.play(RESUME, *(key for answer in forward for key in (answer, BACK, ENTER)), START)
    assert stage.started.pop().values["epochs"] == 40
    for place in range(len(forward) + 1):
        code, _ = stage.play(RESUME, *forward[:place], LEAVE)
        assert (code, stage.started) == (130, [])
    assert stage.play(RESUME, BACK, down(3))[0] == 0


def test_what_a_run_was_given_cannot_be_emptied_when_it_goes_on(stage: Stage):
    stage.tensors()
    stage.run("lora", epochs=20, log_dir=stage.folder / "logs")
    free = dict.fromkeys(s.group for s in settings_of(TrainConfig) if s.on_resume == "free")
    group = down(list(free).index("Checkpointing and logging"))
    _, screen = stage.play(RESUME, ENTER, ENTER, CHANGE, group, ENTER, typed(""), typed("other"), *[ENTER] * 10, START)
    words = " ".join(screen.split())
    assert "no flag takes that back" in words
    assert "learning rate 0.0001; prodigy: 1" in words


def test_a_finished_run_needs_more_epochs(stage: Stage):
    stage.tensors()
    stage.run("lora", epoch=20, epochs=20)
    _, screen = stage.play(RESUME, ENTER, typed("20"), typed("30"), START)
    assert "The run has done 20 epochs: give more to go on." in " ".join(screen.split())
    assert stage.started[0].values["epochs"] == 30


def test_a_run_whose_tensors_have_moved_asks_for_them(stage: Stage):
    moved = stage.tensors("moved")
    stage.run("lora", epochs=20)
    stage.play(RESUME, ENTER, typed(moved), ENTER, START)
    assert stage.started[0].values["dataset_dir"] == moved


def test_a_run_elsewhere_is_named_by_its_folder(stage: Stage):
    stage.tensors()
    run = stage.run("lora", epochs=20)
    away = stage.folder / "far" / "deep" / "run"
    away.parent.mkdir(parents=True)
    run.rename(away)
    _, screen = stage.play(RESUME, ENTER, typed("far"), typed(away), ENTER, START)
    assert "There is no checkpoint in far" in " ".join(screen.split())
    assert stage.started[0].values["resume_from"] == away


def test_a_run_with_a_damaged_config_says_so(stage: Stage):
    stage.tensors()
    run = stage.run("lora")
    (run / "checkpoints" / "epoch_10" / "config.json").write_text("{")
    _, screen = stage.play(RESUME, ENTER, LEAVE)
    assert "is not valid JSON" in " ".join(screen.split())


def test_presets_show_what_they_set_and_train_with_it(stage: Stage):
    data = stage.tensors()
    place = [choice.value for choice in preset_choices()].index(RECOMMENDED)
    # Train a LoRA with it: the preset is chosen already.
    keys = [PRESETS, down(place), ENTER, *[ENTER] * 4, typed(data), *[ENTER] * 9]
    _, screen = stage.play(*keys, START)
    assert "Sets rank 64" in " ".join(screen.split())
    assert stage.started[0].values["preset"] == RECOMMENDED


def test_only_own_presets_can_be_deleted(stage: Stage):
    save_preset("mine", resolve_training("fixed", {"dataset_dir": "a", "output_dir": "b", "rank": 5}).config)
    names = list(preset_names())
    # The user's own come first; below the two ways to train stands "Delete it", and then it is asked once more.
    stage.play(PRESETS, ENTER, down(2), down(1), LEAVE)
    assert "mine" in preset_names()
    _, screen = stage.play(PRESETS, ENTER, down(2), ENTER, EXIT)
    assert "mine" not in preset_names() and "Deleted: mine" in screen
    _, screen = stage.play(PRESETS, down(0), UP + UP + ENTER, LEAVE)
    assert "Train a LoKr" in screen and len(preset_names()) == len(names) - 1


def test_a_broken_preset_can_still_be_deleted(stage: Stage):
    folder = stage.folder / "config" / "sidestep" / "presets"
    folder.mkdir(parents=True)
    (folder / "mine.json").write_text("{", encoding="utf-8")
    _, screen = stage.play(PRESETS, ENTER, ENTER, ENTER, EXIT)
    assert "is not valid JSON" in " ".join(screen.split())
    assert "mine" not in preset_names()


def test_own_presets_say_so_and_whether_they_stand_for_a_shipped_one(stage: Stage):
    config = resolve_training("fixed", {"dataset_dir": "a", "output_dir": "b", "rank": 5}).config
    for name in ("mine", RECOMMENDED):
        save_preset(name, config)
    notes = {choice.value: choice.note for choice in preset_choices()}
    assert notes["mine"] == "your own"
    assert notes[RECOMMENDED] == "your own, in place of the shipped one"


def test_settings_change_the_checkpoint_folder(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    others = make_models(stage.folder / "others", "acestep-v15-sft")
    _, screen = stage.play(SETTINGS, ENTER, typed("models/vae"), typed(others), SETTINGS, LEAVE)
    assert "Models base, turbo" in " ".join(screen.split()) or "Models turbo, base" in " ".join(screen.split())
    assert "Models sft" in " ".join(screen.split())
    monkeypatch.delenv("SIDESTEP_CHECKPOINT_DIR")
    assert remembered()["checkpoint_dir"] == str(others)


def test_settings_forget_the_last_answers(stage: Stage):
    songs = stage.songs()
    stage.play(BUILD, typed(songs), ENTER, START)
    assert remembered()["audio_dir"] == str(songs)
    stage.play(SETTINGS, down(2), LEAVE)
    assert "audio_dir" not in remembered()


def test_settings_examine_the_machine_with_the_models_that_are_known(stage: Stage):
    code, _ = stage.play(SETTINGS, down(3), EXIT)
    assert stage.started == [Plan("doctor", {"checkpoint_dir": stage.folder / "models"})]
    assert code == 0


def test_an_error_of_an_action_becomes_the_exit_code_when_nothing_follows(stage: Stage):
    stage.failures.append(DataError("The song is broken.", hint="Mend it."))
    code, screen = stage.play(BUILD, typed(stage.songs()), ENTER, START, down(2), EXIT)
    assert code == 1
    assert "The song is broken." in screen and "Mend it." in screen


def test_a_bug_in_an_action_is_reported_and_leads_back_to_the_menu(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    log = stage.folder / "sidestep.log"
    monkeypatch.setattr(problems, "_log_path", lambda: open_log(log) or log)
    stage.failures.append(ZeroDivisionError("float division by zero"))
    code, screen = stage.play(BUILD, typed(stage.songs()), ENTER, START, SETTINGS, down(3), EXIT)
    close_log()
    assert "This is a bug in Side-Step: ZeroDivisionError: float division by zero" in screen
    assert str(log) in "".join(screen.split())
    assert "Traceback" in log.read_text(encoding="utf-8")
    assert [plan.command for plan in stage.started] == ["build-dataset", "doctor"]
    assert code == 0
    stage.failures.append(ZeroDivisionError("again"))
    assert stage.play(SETTINGS, down(3), EXIT)[0] == 70
    close_log()


def test_the_command_line_is_quoted_for_each_shell():
    plan = Plan("build-dataset", {"input": Path("my songs"), "tag": "it's"})
    assert command_line(plan, is_windows=False) == (
        """uv run train.py build-dataset --input 'my songs' --tag 'it'"'"'s'"""
    )
    assert command_line(plan, is_windows=True) == 'uv run train.py build-dataset --input "my songs" --tag "it\'s"'


def test_every_setting_survives_the_way_through_the_command_line():
    values = {
        "learning_rate": 1.2345678901e-5, "use_rslora": True, "gradient_checkpointing": False, "lokr_factor": -1,
        "target_modules": ("q_proj", "down_proj"), "target_db": -1e-5, "normalize": "peak", "run_name": "-x",
        "dataset_dir": Path("-odd folder"), "output_dir": Path("夜 の 歌"),
    }  # fmt: skip
    assert parse_values(TrainConfig, parse(words_of(Plan("fixed", values))).values) == values


def test_every_basic_setting_of_building_is_asked():
    assert sum(s.ask == "basic" for s in settings_of(BuildDatasetConfig)) == BASIC_OF_BUILDING


def test_presets_of_the_user_are_read_where_they_are_saved(stage: Stage):
    save_preset("two words", resolve_training("fixed", {"dataset_dir": "a", "output_dir": "b", "epochs": 5}).config)
    assert read_preset("two_words") == {"epochs": 5}
