"""The keys of the wizard's way to a training run, and what a plan comes to."""

from pathlib import Path

from sidestep.config.flags import parse
from sidestep.config.resolve import resolve_training
from sidestep.config.train import TrainConfig
from sidestep.ui.command_line import Plan, words_of
from sidestep.ui.train_flow import ORDER
from tests.unit.stage import ENTER, down, typed

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


def pick_group(name: str) -> list[str]:
    """The keys that choose a group in the review of a run on tensors."""
    return [down([group for group in ORDER if group != "Preprocessing"].index(name))]
