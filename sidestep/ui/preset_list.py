"""Presets as the wizard offers them: in which order, with which remark, and what each one sets."""

from collections.abc import Callable, Sequence

from sidestep.config.presets import SHIPPED, is_own_preset, preset_description, preset_names, read_preset
from sidestep.config.settings import settings_of
from sidestep.config.train import TrainConfig
from sidestep.errors import ConfigError
from sidestep.ui.command_line import word_of
from sidestep.ui.machine import Gpu
from sidestep.ui.questions import Choice, Form, Question, title_of

FRESH = ""
RECOMMENDED = "recommended"


def preset_choices(gpus: Sequence[Gpu] = ()) -> list[Choice]:
    """Every preset and what it says of itself: the one for this GPU, the user's own, the recommended one, the rest."""
    fitting = gpus[0].preset if gpus else ""

    def place(name: str) -> tuple[bool, bool, bool, str]:
        return name != fitting, not is_own_preset(name), name != RECOMMENDED, name

    return [
        Choice(value=name, title=name, note=_remark(name, is_fitting=name == fitting))
        for name in sorted(preset_names(), key=place)
    ]


def preset_question(
    preset: str, gpus: Sequence[Gpu], *, remarks: Callable[[str], Sequence[str]] = lambda name: ()
) -> Question:
    """The question which preset to start from, with `preset` suggested; `remarks` says more of the chosen one."""
    return Question(
        name="preset",
        title="Start from",
        kind="choice",
        suggest=lambda form: preset,
        choices=lambda form: [Choice(value=FRESH, title="Fresh", note="the defaults"), *preset_choices(gpus)],
        check=_what_is_wrong_with_preset,
        tell=lambda form: [describe_preset(form["preset"]), *remarks(form["preset"])] if form["preset"] else [],
    )


def describe_preset(name: str) -> str:
    """What a preset sets, in a line; ConfigError when it cannot be read."""
    settings = {setting.name: setting for setting in settings_of(TrainConfig)}
    sets = ", ".join(f"{title_of(settings[key]).lower()} {word_of(value)}" for key, value in read_preset(name).items())
    return f"Sets {sets}." if sets else "Sets nothing: all defaults."


def _what_is_wrong_with_preset(form: Form, name: str) -> str:
    try:
        read_preset(name) if name else None
    except ConfigError as error:
        return f"{error.message} {error.hint}".strip()
    return ""


def _remark(name: str, *, is_fitting: bool) -> str:
    try:
        text = preset_description(name)
    except ConfigError as error:
        return error.message
    if is_own_preset(name):
        text = text or ("your own, in place of the shipped one" if (SHIPPED / f"{name}.json").is_file() else "your own")
    return f"for this GPU: {text}" if is_fitting else text
