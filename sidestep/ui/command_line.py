"""The command line that does what the wizard was told, to be copied."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sidestep.config.flags import COMMANDS
from sidestep.config.settings import Setting, settings_of, show_value
from sidestep.config.shell import shell_line, start_words


@dataclass(frozen=True, slots=True)
class Plan:
    """What to start: a subcommand and the values to type after it, by the names of their settings."""

    command: str
    values: Mapping[str, Any]


def words_of(plan: Plan) -> list[str]:
    """The words after `train.py`: the subcommand and its flags."""
    (command,) = (command for command in COMMANDS if command.name == plan.command)
    settings = {setting.name: setting for config in command.configs for setting in settings_of(config)}
    flags = [_flag(settings[name], value) for name, value in plan.values.items()]
    return [plan.command, *(word for words in flags for word in words)]


def command_line(plan: Plan, *, is_windows: bool = os.name == "nt") -> str:
    """The command line in one piece, quoted for the system's shell."""
    return shell_line([*start_words(), *words_of(plan)], is_windows=is_windows)


def word_of(value: Any) -> str:
    """A value as one types it; a number keeps every digit it needs."""
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return show_value(value)


def _flag(setting: Setting, value: Any) -> list[str]:
    flag = setting.flag
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if setting.many:
        return [flag, *map(word_of, value)]
    word = word_of(value)
    return [f"{flag}={word}"] if word.startswith("-") else [flag, word]
