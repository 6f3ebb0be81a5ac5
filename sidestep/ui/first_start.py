"""The first start on a machine: what it has, where the models are, or how to get them."""

from collections.abc import Callable, Sequence
from pathlib import Path

from sidestep.config.settings import settings_of
from sidestep.config.train import TrainConfig
from sidestep.model.checkpoint import VARIANTS, list_models
from sidestep.ui.asker import Asker
from sidestep.ui.console import Console
from sidestep.ui.download import Hub, fetch, fetches_for
from sidestep.ui.machine import Gpu
from sidestep.ui.model_questions import NOTES, what_is_wrong_with_checkpoints
from sidestep.ui.paths import what_is_wrong_with_output
from sidestep.ui.questions import Choice, Form, Question, always, question_of
from sidestep.ui.session import Session
from sidestep.ui.walk import ask, walk

DEFAULT_FOLDER = Path("checkpoints")
SUGGESTED_MODELS = ("base",)
_CHECKPOINT_DIR = next(setting for setting in settings_of(TrainConfig) if setting.name == "checkpoint_dir")


def has_models(session: Session) -> bool:
    """Whether a model is known to be there."""
    folder = session.checkpoint_dir()
    return folder is not None and bool(list_models(folder))


def show_machine(console: Console, gpus: Sequence[Gpu]) -> None:
    """Say which GPU there is and which preset is meant for it; nothing where that is not known."""
    for gpu in gpus:
        fits = f"preset {gpu.preset}" if gpu.preset else "less than the smallest preset is meant for"
        console.print(f"  GPU: {gpu} ({fits})")


def show_how_to_fetch(console: Console) -> None:
    """Print the commands that fetch the models."""
    console.print("  To get the models (about 11 GB; base is the one to train on):")
    for each in fetches_for(DEFAULT_FOLDER, SUGGESTED_MODELS):
        console.print(f"    {each.command}", wrap=False)


def ask_for_folder(asker: Asker, session: Session) -> None:
    """Ask where the models are and remember it."""
    question = question_of(
        _CHECKPOINT_DIR,
        title="Checkpoint folder",
        help=_CHECKPOINT_DIR.help,
        suggest=lambda form: session.checkpoint_dir(),
        check=lambda form, folder: what_is_wrong_with_checkpoints(folder),
        tell=lambda form: [f"Models: {', '.join(list_models(form['checkpoint_dir']))}."],
    )
    form = Form([question])
    ask(question, form, asker)
    session.keep(checkpoint_dir=form["checkpoint_dir"])


def fetch_models(asker: Asker, session: Session, hub: Hub, *, say: Callable[[str], None]) -> None:
    """Ask which models to fetch and where to, fetch them and remember the folder; RunError when that fails."""
    form = Form(_fetch_questions())
    walk(form, asker, lambda form, question: always(form))
    for each in fetches_for(form["folder"], form["models"]):
        fetch(each, hub, say=say)
    session.keep(checkpoint_dir=form["folder"])


def _fetch_questions() -> tuple[Question, Question]:
    return (
        Question(
            name="models",
            title="Models",
            kind="many",
            help="Turbo always comes along: its repository holds the parts that all models share.",
            suggest=lambda form: SUGGESTED_MODELS,
            choices=lambda form: [Choice(value=name, title=name, note=NOTES[name]) for name in VARIANTS],
        ),
        Question(
            name="folder",
            title="Folder for them",
            kind="path",
            suggest=lambda form: DEFAULT_FOLDER,
            parse=question_of(_CHECKPOINT_DIR).parse,
            check=lambda form, folder: what_is_wrong_with_output(folder) if folder else "A folder is needed here.",
        ),
    )
