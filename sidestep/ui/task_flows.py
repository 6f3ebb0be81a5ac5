"""Build dataset and preprocess: their questions and what they come to."""

from pathlib import Path
from typing import Any

from sidestep.config.resolve import resolve_training
from sidestep.config.settings import settings_of
from sidestep.config.tasks import BuildDatasetConfig
from sidestep.config.train import TrainConfig
from sidestep.data.audio import find_audio
from sidestep.data.dataset_file import DATASET_FILE
from sidestep.errors import ConfigError, SidestepError
from sidestep.ui.command_line import Plan
from sidestep.ui.flow import Facts, Flow
from sidestep.ui.model_questions import model_questions
from sidestep.ui.paths import beside, what_is_wrong_with_output, what_is_wrong_with_songs
from sidestep.ui.questions import Form, Question, question_of, typed_values
from sidestep.ui.session import Session
from sidestep.ui.wording import count

SETTINGS = {setting.name: setting for setting in settings_of(TrainConfig)}
PREPROCESSING, DEVICE = (SETTINGS[name].group for name in ("preprocess", "device"))
OWN = ("preprocess", "audio_dir", "tensor_output", "dataset_json")


def build_dataset_flow(session: Session) -> Flow:
    """The flow that writes dataset.json for a folder of songs."""
    session = session.as_it_is()
    changes: dict[str, dict[str, Any]] = {
        "input": {
            "title": "Songs",
            "suggest": lambda form: session.get("audio_dir"),
            "check": _what_is_wrong_with_songs,
            "tell": lambda form: [f"{count(len(find_audio(form['input'])), 'song')}."],
        }
    }
    settings = settings_of(BuildDatasetConfig)

    def facts(form: Form) -> Facts:
        return [("Writes", str(form["output"] or form["input"] / DATASET_FILE))]

    return Flow(
        title="Build dataset",
        questions=tuple(question_of(setting, **changes.get(setting.name, {})) for setting in settings),
        plan=lambda form: Plan("build-dataset", typed_values(form, {})),
        facts=facts,
    )


def preprocess_flow(session: Session, *, audio: Path | None = None, dataset_json: Path | None = None) -> Flow:
    """The flow that turns songs into tensors."""
    session = session.as_it_is()
    return Flow(
        title="Preprocess audio",
        questions=(*model_questions(session), *_preprocess_questions(session, audio, dataset_json)),
        plan=_preprocess_plan,
        facts=_preprocess_facts,
        problem=_problem,
    )


def _preprocess_questions(session: Session, audio: Path | None, dataset_json: Path | None) -> list[Question]:
    others = [setting for setting in SETTINGS.values() if setting.group == PREPROCESSING and setting.name not in OWN]
    others += [setting for setting in SETTINGS.values() if setting.group == DEVICE]

    def tensors(form: Form) -> Path | None:
        return beside(form["audio_dir"], "tensors") if form["audio_dir"] else None

    return [
        question_of(SETTINGS["preprocess"], ask="never", suggest=lambda form: True),
        question_of(
            SETTINGS["audio_dir"],
            title="Songs",
            help=SETTINGS["audio_dir"].help,
            suggest=lambda form: audio or session.get("audio_dir"),
            check=_what_is_wrong_with_songs,
            tell=lambda form: [f"{count(len(find_audio(form['audio_dir'])), 'song')}."],
        ),
        question_of(SETTINGS["dataset_json"], suggest=lambda form: dataset_json, check=_what_is_wrong_with_file),
        question_of(
            SETTINGS["tensor_output"],
            help=f"{SETTINGS['tensor_output'].help} Songs that are there already and unchanged are not done again.",
            suggest=tensors,
            check=lambda form, folder: what_is_wrong_with_output(folder) if folder else "A folder is needed here.",
        ),
        *(question_of(setting) for setting in [*others, SETTINGS["offload_encoder"]]),
    ]


def _preprocess_plan(form: Form) -> Plan:
    return Plan("fixed", typed_values(form, {}))


def _preprocess_facts(form: Form) -> Facts:
    songs = len(find_audio(form["audio_dir"]))
    return [
        ("Songs", str(songs)),
        ("Writes", f"a tensor file for each song, and manifest.json, to {form['tensor_output']}"),
    ]


def _problem(form: Form) -> SidestepError | None:
    try:
        resolve_training("fixed", _preprocess_plan(form).values)
    except ConfigError as error:
        return error
    return None


def _what_is_wrong_with_songs(form: Form, folder: Path | None) -> str:
    return what_is_wrong_with_songs(folder) if folder else "A folder of songs is needed."


def _what_is_wrong_with_file(form: Form, path: Path | None) -> str:
    return f"There is no file {path}." if path is not None and not path.is_file() else ""
