"""The questions about the model: its folder, which of those that are really there, and what it descends from."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sidestep.config.settings import settings_of
from sidestep.config.train import TrainConfig
from sidestep.errors import SidestepError
from sidestep.model.checkpoint import VARIANTS, Checkpoint, find_checkpoint, list_models
from sidestep.ui.questions import Choice, Form, Question, question_of
from sidestep.ui.session import Session

NOTES = {
    "turbo": "8 steps; train it to use it as it is",
    "base": "the one to train on: its adapters work on the others too",
    "sft": "tuned for songs; 50 steps with guidance",
    "xl-turbo": "4 B; 8 steps",
    "xl-base": "4 B; the large one to train on",
    "xl-sft": "4 B; 50 steps with guidance",
}


def model_questions(session: Session, *, overrides: Callable[[str], Any] = lambda name: None) -> list[Question]:
    """The questions `checkpoint_dir`, `model_variant` and `base_model`; `overrides` gives suggestions by name."""
    settings = {setting.name: setting for setting in settings_of(TrainConfig)}
    return [
        question_of(
            settings["checkpoint_dir"],
            title="Checkpoint folder",
            help=settings["checkpoint_dir"].help,
            suggest=lambda form: overrides("checkpoint_dir") or session.checkpoint_dir(),
            check=lambda form, folder: what_is_wrong_with_checkpoints(folder),
        ),
        question_of(
            settings["model_variant"],
            title="Model",
            kind="choice",
            help="",
            suggest=lambda form: _suggested(form, overrides("model_variant") or session.get("model_variant")),
            choices=lambda form: _models(form["checkpoint_dir"]),
            check=_what_is_wrong_with_model,
        ),
        question_of(
            settings["base_model"],
            ask="basic",
            applies=lambda form: needs_base_model(form["checkpoint_dir"], form["model_variant"]),
            suggest=lambda form: overrides("base_model"),
            choices=lambda form: [Choice(value=name, title=name) for name in VARIANTS],
            check=_what_is_wrong_with_base,
        ),
    ]


def checkpoint_of(form: Form) -> Checkpoint | None:
    """The checkpoint that the form names; None while there is none."""
    if form["checkpoint_dir"] is None:
        return None
    try:
        return find_checkpoint(form["checkpoint_dir"], form["model_variant"], base_model=_base(form))
    except SidestepError:  # The question it is about said why.
        return None


def what_is_wrong_with_checkpoints(folder: Path | None) -> str:
    """Why no model can be taken from this folder; nothing when one can."""
    if folder is None:
        return "The folder with the checkpoints is needed."
    if not folder.is_dir():
        return f"There is no folder {folder}."
    if list_models(folder):
        return ""
    if list_models(folder.absolute().parent):
        return f"{folder} has no model in it; the folder above it has: {folder.absolute().parent}"
    return f"{folder} has no ACE-Step model in it (acestep-v15-turbo or another one)."


def needs_base_model(root: Path | None, variant: str) -> bool:
    """Whether only the user can say which model this one descends from."""
    return root is not None and bool(_reason(root, variant, None)) and not _reason(root, variant, "turbo")


def _base(form: Form) -> str | None:
    return form["base_model"] if needs_base_model(form["checkpoint_dir"], form["model_variant"]) else None


def _models(root: Path | None) -> Sequence[Choice]:
    names = list_models(root) if root else []
    return [Choice(value=name, title=name, note=NOTES.get(name, "")) for name in names]


def _suggested(form: Form, carried: str | None) -> str:
    """The model used last if it is there, else the first; `turbo`, the command line's default, without any."""
    names = list_models(form["checkpoint_dir"]) if form["checkpoint_dir"] else []
    if carried in names:
        return str(carried)
    return next(iter(names), "turbo")


def _what_is_wrong_with_model(form: Form, variant: str) -> str:
    root = form["checkpoint_dir"]
    return "" if needs_base_model(root, variant) else _reason(root, variant, None)


def _what_is_wrong_with_base(form: Form, base: str | None) -> str:
    if base is None:
        return "Choose the model it descends from."
    return _reason(form["checkpoint_dir"], form["model_variant"], base)


def _reason(root: Path, variant: str, base: str | None) -> str:
    try:
        find_checkpoint(root, variant, base_model=base)
    except SidestepError as error:
        return f"{error.message} {error.hint}".strip()
    return ""
