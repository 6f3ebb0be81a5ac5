"""The command line, made from the declared settings.

The parser holds no defaults and parses no values: its result is what was typed, as typed. `Setting.parse` reads it.
"""

import argparse
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sidestep.config.adapter_tasks import ExportConfig, SampleConfig
from sidestep.config.recipe import RECIPE_PINS
from sidestep.config.settings import Setting, flag_of, option, settings_of, show_value
from sidestep.config.shell import shell_line, start_words
from sidestep.config.tasks import BuildDatasetConfig, DemoConfig, DoctorConfig, EstimateConfig
from sidestep.config.train import TrainConfig
from sidestep.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalConfig:
    """Flags that stand before or after the subcommand."""

    plain: bool = option("Plain lines, no live display; automatic when piped.", group="Global", default=False)
    yes: bool = option("Ask for no confirmation (no command asks today).", group="Global", default=False, short="-y")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersConfig:
    """Where the settings come from that were not typed."""

    preset: str | None = option(
        "Start from these settings: a shipped preset or your own.", group="Presets", default=None
    )
    save_preset: str | None = option("Save these settings under a name of your own.", group="Presets", default=None)
    config: Path | None = option("Start from the config.json of an earlier run.", group="Presets", default=None)


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: what it does in a sentence, and the configs whose flags it takes."""

    name: str
    summary: str
    configs: tuple[type, ...]


COMMANDS = (
    Command("fixed", "Train as the model was made; preprocess with --preprocess.", (TrainConfig, LayersConfig)),
    Command("vanilla", "Train as the official trainer does, to reproduce old results.", (TrainConfig, LayersConfig)),
    Command("build-dataset", "Write dataset.json from a folder of songs and their sidecars.", (BuildDatasetConfig,)),
    Command("sample", "Music from a prompt, with an adapter at one or several strengths.", (SampleConfig,)),
    Command("export", "Write an adapter for another program, and prove that it means the same.", (ExportConfig,)),
    Command("estimate", "Measure which modules to train, and how much of each (Preprocessing++).", (EstimateConfig,)),
    Command("doctor", "What is here to train with, and what ails; each with a way out.", (DoctorConfig,)),
    Command("demo", "The whole way on a toy model and made-up songs; nothing to download.", (DemoConfig,)),
)


@dataclass(frozen=True, slots=True)
class Typed:
    """What was typed: the subcommand (None without one) and the raw values of its flags."""

    command: str | None
    version: bool
    values: Mapping[str, Any]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[:1].upper()}{message[1:]}.", hint=_see_help(*self.prog.split()[1:]))


def parser(name: str = "train.py") -> argparse.ArgumentParser:
    """Return the whole command line's parser."""
    root = _Parser(
        prog=name,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Side-Step trains adapters for ACE-Step 1.5 on your own music.",
    )
    _add_globals(root)
    commands = root.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(
            command.name,
            usage=f"{name} {command.name} [options]",
            help=command.summary,
            description=command.summary,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        for config in command.configs:
            _add_flags(sub, (s for s in settings_of(config) if s.name not in RECIPE_PINS.get(command.name, {})))
        _add_globals(sub)
    return root


def parse(arguments: Sequence[str]) -> Typed:
    """Return what was typed; ConfigError for unknown flags, with what was probably meant."""
    values, unknown = parser().parse_known_args(arguments)
    typed = vars(values)
    command = typed.pop("command", None)
    if unknown:
        message = "\n".join(_explain(word, command) for word in _flags_among(unknown))
        raise ConfigError(message, hint=_see_help(*([command] if command else [])))
    return Typed(command, typed.pop("version", False), typed)


def _see_help(*command: str) -> str:
    return f"See:\n  {shell_line([*start_words(), *command, '--help'])}"


def _add_globals(target: argparse.ArgumentParser) -> None:
    target.add_argument("--version", action="store_true", help="Show the versions of Side-Step and what it builds on.")
    _add_flags(target, settings_of(GlobalConfig))


def _add_flags(target: argparse.ArgumentParser, settings: Iterable[Setting]) -> None:
    groups: dict[str, argparse._ArgumentGroup] = {}
    for setting in settings:
        if setting.group not in groups:
            groups[setting.group] = target.add_argument_group(setting.group)
        groups[setting.group].add_argument(*setting.flags, dest=setting.name, help=describe(setting), **_shape(setting))


def _shape(setting: Setting) -> dict[str, Any]:
    if setting.kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    metavar = {int: "N", float: "X", str: "NAME", Path: "PATH"}[setting.kind]
    return {"metavar": metavar, "nargs": "+"} if setting.many else {"metavar": metavar}


def describe(setting: Setting, *, default: bool = True, condition: bool = True) -> str:
    """Return the help of a setting: what it is, what it takes, when it counts, its default."""
    sentences = [setting.help]
    if setting.choices or setting.within:
        sentences.append(f"{setting.rule[:1].upper()}{setting.rule[1:]}.")
    if condition and setting.when and len(setting.when.values) < 5:
        sentences.append(f"{str(setting.when)[:1].upper()}{str(setting.when)[1:]}.")
    if default:
        sentences.append(f"Default: {setting.shown_default}.")
    return " ".join(sentences).replace("%", "%%") if default else " ".join(sentences)


def _flags_among(words: Sequence[str]) -> list[str]:
    flags = [word for word in words if word.startswith("-")]
    return flags or list(words)


def _explain(word: str, command: str | None) -> str:
    flag = word.split("=")[0]
    pins = {flag_of(name): value for name, value in RECIPE_PINS.get(command or "", {}).items()}
    if flag in pins:
        return f"{flag} is no choice here: {command} trains with {show_value(pins[flag])}. Use 'fixed' to set it."
    known = [flag for c in COMMANDS if c.name == command for config in c.configs for flag in _spellings(config)]
    near = difflib.get_close_matches(flag, [*known, *_spellings(GlobalConfig)], n=1)
    where = f"{command} has no" if command else "There is no"
    return f"{where} flag {flag}{f' (did you mean {near[0]}?)' if near else ''}."


def _spellings(config: type) -> list[str]:
    return [flag for setting in settings_of(config) for flag in setting.flags]
