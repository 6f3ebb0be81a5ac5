"""What is carried over, from action to action and from start to start: folders and the model, nothing of a preset."""

from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

from sidestep.config.places import default_checkpoint_dir, forget, remember, remembered
from sidestep.config.settings import parse_values
from sidestep.config.train import TrainConfig
from sidestep.errors import ConfigError, RunError
from sidestep.ui.paths import what_is_wrong_with_data
from sidestep.ui.questions import Form

CARRIED = ("checkpoint_dir", "model_variant", "dataset_dir", "output_dir", "audio_dir", "tensor_output")
FOLDERS_THAT_EXIST = ("checkpoint_dir", "dataset_dir", "audio_dir")


class Session:
    """The answers that later questions suggest; kept in the user's settings file.

    Where that cannot be written `warn` is told so, and they are kept for this start alone.
    """

    def __init__(self, *, warn: Callable[[str], None]) -> None:
        self._warn = warn
        saved = {name: value for name, value in remembered().items() if name in CARRIED}
        saved.pop("checkpoint_dir", None)  # The environment may name another: `checkpoint_dir` looks where it must.
        self._values: dict[str, Any] = parse_values(TrainConfig, saved, source="settings.json")

    def get(self, name: str) -> Any:
        """The last answer to this question; None without one, or when its folder is gone or holds nothing to train on.

        A folder for tensors is empty where preprocessing was stopped before the first song was done.
        """
        value = self._values.get(name)
        if name in FOLDERS_THAT_EXIST and value is not None and not Path(value).is_dir():
            return None
        if name == "dataset_dir" and value is not None and what_is_wrong_with_data(Path(value)):
            return None
        return value

    def as_it_is(self) -> "Session":
        """A copy that stays as it is now, so that what a form suggests does not change under the user."""
        copied = copy(self)
        copied._values = {**self._values, "checkpoint_dir": self.checkpoint_dir()}
        return copied

    def keep_answers(self, form: Form) -> None:
        """Remember what an action is started with; the folder that songs are preprocessed to is what is trained on."""
        answers = {name: form[name] for name in CARRIED if name in form}
        if form.get("preprocess"):
            answers["dataset_dir"] = form["tensor_output"]
        else:
            answers.pop("tensor_output", None)
        if "input" in form:
            answers["audio_dir"] = form["input"]
        self.keep(**answers)

    def keep(self, **answers: Any) -> None:
        """Remember answers from now on, whole paths of folders."""
        known = {name: value for name, value in answers.items() if name in CARRIED and value is not None}
        whole = {name: value.absolute() if isinstance(value, Path) else value for name, value in known.items()}
        self._values |= whole
        try:
            for name, value in whole.items():
                remember(name, str(value))
        except RunError as error:  # No reason not to do what was asked for.
            self._warn(f"The next start will not know these answers: {error.message}")

    def forget(self) -> None:
        """Suggest nothing of earlier answers any more, now and at the next start; the checkpoint folder stays."""
        for name in CARRIED:
            if name != "checkpoint_dir":
                self._values.pop(name, None)
        try:
            forget(name for name in CARRIED if name != "checkpoint_dir")
        except RunError as error:
            self._warn(f"The next start will suggest them again: {error.message}")

    def checkpoint_dir(self) -> Path | None:
        """Where the checkpoints are: as answered since the start, else where the command line would find them."""
        if self.get("checkpoint_dir"):
            return self.get("checkpoint_dir")
        try:
            found = default_checkpoint_dir()
        except ConfigError:
            return None
        return found if found.is_dir() else None
