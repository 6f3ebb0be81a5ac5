"""Presets on the wizard's way to a training run: taken, saved, left to the default again."""

from sidestep.config.places import remember
from sidestep.config.presets import read_preset, save_preset
from sidestep.config.resolve import resolve_training
from sidestep.config.settings import settings_of
from sidestep.config.train import TrainConfig
from sidestep.ui.machine import Gpu
from sidestep.ui.session import CARRIED
from tests.unit.stage import BACK, ENTER, LEAVE, Stage, down, stage, typed
from tests.unit.training_keys import LORA, SAVE, START, basic, config_of, config_typed

__all__ = ["stage"]


def test_the_preset_for_this_gpu_comes_first_and_says_so(stage: Stage):
    stage.gpus = (Gpu("Card", 12),)
    data = stage.tensors()
    stage.play(LORA, *basic(data, preset=down(1)), START)
    assert stage.started[0].values["preset"] == "vram_12gb"


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
