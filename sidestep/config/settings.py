"""How a setting is declared once and read everywhere: flags, help, presets, questions, the README, validation.

A config is a frozen dataclass whose fields are made by `option`. `settings_of` turns it into `Setting`s; `build` makes
an instance from layers of values. Every value passes `Setting.parse`, whatever door it came through, and all problems
are reported together.
"""

import dataclasses
import difflib
import errno
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from sidestep.errors import ConfigError
from sidestep.files import IS_WINDOWS

Values = Mapping[str, Any]
C = TypeVar("C")


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """The numbers a setting takes; checks and explains with the same sentence. NaN and infinity are never inside."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    def contains(self, value: float) -> bool:
        """Say whether a finite `value` lies inside."""
        return (
            math.isfinite(value)
            and (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            return f"from {_plain(self.at_least)} to {_plain(self.at_most)}"
        words = {"above": self.above, "at least": self.at_least, "below": self.below, "at most": self.at_most}
        return " and ".join(f"{word} {_plain(bound)}" for word, bound in words.items() if bound is not None)


def _plain(number: float) -> str:
    """Return a number without an exponent where it is whole: 1000000, not 1e+06."""
    return str(int(number)) if number == int(number) else f"{number:g}"


@dataclass(frozen=True, slots=True)
class When:
    """A setting has an effect only when another one has one of these values.

    Given without effect, it earns a notice; or an error where `is_strict`, because something else must be meant.
    """

    setting: str
    values: tuple[object, ...]
    is_strict: bool = False

    def holds(self, values: Values) -> bool:
        """Say whether the condition is met by these settings."""
        return values[self.setting] in self.values

    def __str__(self) -> str:
        numbers = [value for value in self.values if type(value) is int]
        if len(numbers) == len(self.values) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
            return f"only with {flag_of(self.setting)} from {numbers[0]} to {numbers[-1]}"
        shown = " or ".join(show_value(value) for value in self.values)
        return f"only with {flag_of(self.setting)} {shown}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One field of a config, as every interface needs it."""

    name: str
    kind: type  # bool, int, float, str or Path
    choices: tuple[str, ...]
    many: bool
    optional: bool
    default: Any
    help: str
    group: str
    short: str | None
    other_flag: str | None
    within: Range | None
    when: When | None
    ask: Literal["basic", "advanced", "never"]
    on_resume: Literal["fixed", "free"]
    in_presets: bool
    shown_default: str

    @property
    def flag(self) -> str:
        """The long flag, as users type it."""
        return flag_of(self.name)

    @property
    def flags(self) -> tuple[str, ...]:
        """Every spelling of the flag, the long one first."""
        return tuple(flag for flag in (self.flag, self.other_flag, self.short) if flag)

    @property
    def rule(self) -> str:
        """What values are right, as `--help` and every error message say it."""
        if self.kind is bool:
            return "on or off"
        if self.choices:
            kind = "one or more of" if self.many else "one of"
            return f"{kind} {', '.join(self.choices)}"
        nouns = {int: "a whole number", float: "a number", str: "text", Path: "a path"}
        noun = nouns[self.kind]
        return f"{noun} {self.within}" if self.within else noun

    def parse(self, value: object) -> Any:
        """Turn a value from a flag, a JSON file or an answer into the field's type; ValueError says the rule."""
        if value is None:
            if self.optional:
                return None
            raise ValueError(f"{self.flag} takes {self.rule}.")
        if self.many:
            words = value.split() if isinstance(value, str) else value
            if not isinstance(words, Sequence) or not words:
                raise ValueError(f"{self.flag} takes {self.rule}.")
            return tuple(self._parse_one(word) for word in words)
        return self._parse_one(value)

    def _parse_one(self, value: object) -> Any:
        refused = ValueError(f"{self.flag} takes {self.rule}, not {show_value(value) or 'nothing'}.")
        if self.kind is bool:
            return _parse_switch(value, refused)
        if isinstance(value, bool):
            raise refused
        if self.kind in (int, float):
            return self._parse_number(value, refused)
        if not isinstance(value, str | Path):
            raise refused
        if self.kind is Path:
            return _parse_path(str(value), refused)
        if self.choices and value not in self.choices:
            near = difflib.get_close_matches(str(value), self.choices, n=1)
            raise ValueError(f"{refused.args[0][:-1]}{f' (did you mean {near[0]}?)' if near else ''}.")
        return str(value)

    def _parse_number(self, value: object, refused: ValueError) -> int | float:
        if not isinstance(value, str | int | float):
            raise refused
        try:
            number = float(value)
        except ValueError:
            raise refused from None
        if not math.isfinite(number) or (self.within and not self.within.contains(number)):
            raise refused
        if self.kind is int:
            if number != int(number):
                raise refused
            return int(number)
        return number


def option(
    help: str,
    *,
    group: str,
    default: Any = dataclasses.MISSING,
    short: str | None = None,
    other_flag: str | None = None,
    within: Range | None = None,
    when: When | None = None,
    choices: Sequence[str] = (),
    ask: Literal["basic", "advanced", "never"] = "advanced",
    on_resume: Literal["fixed", "free"] = "fixed",
    in_presets: bool = True,
    shown_default: str = "",
) -> Any:
    """Declare a setting as a dataclass field.

    `choices` are for fields whose type cannot say them (several words of a list); a `Literal` type says its own.
    `on_resume`: whether a run may go on with another value. `in_presets`: False for paths and devices.
    `shown_default` replaces the default in help texts where it depends on something.
    """
    metadata = {
        "help": help,
        "group": group,
        "short": short,
        "other_flag": other_flag,
        "within": within,
        "when": when,
        "choices": tuple(choices),
        "ask": ask,
        "on_resume": on_resume,
        "in_presets": in_presets,
        "shown_default": shown_default,
    }
    return dataclasses.field(default=default, metadata=metadata)


def same_as(config: type, name: str, **changes: Any) -> Any:
    """Declare a setting as another config has it, but for these changes to what `option` takes."""
    (field,) = (field for field in dataclasses.fields(config) if field.name == name)
    default = changes.pop("default", field.default)
    return dataclasses.field(default=default, metadata={**field.metadata, **changes})


def flag_of(name: str) -> str:
    """Return the long flag of a field name."""
    return "--" + name.replace("_", "-")


def show_value(value: object) -> str:
    """Return a value as a user would type it."""
    match value:
        case None:
            return "none"
        case True:
            return "on"
        case False:
            return "off"
        case float():
            return f"{value:g}"
        case tuple() | list():
            return " ".join(show_value(item) for item in value)
        case _:
            return str(value)


@cache
def settings_of(config: type) -> tuple[Setting, ...]:
    """Return the settings of a config class, in the order of their declaration."""
    hints = typing.get_type_hints(config)
    return tuple(_setting(field, hints[field.name]) for field in dataclasses.fields(config) if "help" in field.metadata)


def _setting(field: dataclasses.Field[Any], hint: Any) -> Setting:
    optional = many = False
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        optional = True
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        many = True
        hint = typing.get_args(hint)[0]
    choices = field.metadata["choices"]
    if typing.get_origin(hint) is Literal:
        choices, hint = typing.get_args(hint), str
    metadata = dict(field.metadata)
    metadata["choices"] = choices
    default = field.default
    metadata["shown_default"] = metadata["shown_default"] or (
        "required" if default is dataclasses.MISSING else show_value(default)
    )
    return Setting(name=field.name, kind=hint, many=many, optional=optional, default=default, **metadata)


def parse_values(config: type, values: Values, *, source: str = "") -> dict[str, Any]:
    """Return `values` parsed, or raise ConfigError naming all problems; unknown names come with a near match."""
    settings = {setting.name: setting for setting in settings_of(config)}
    parsed, problems = {}, []
    for name, value in values.items():
        if name not in settings:
            near = difflib.get_close_matches(name, settings, n=1)
            problems.append(f"There is no setting '{name}'{f' (did you mean {near[0]}?)' if near else ''}.")
            continue
        try:
            parsed[name] = settings[name].parse(value)
        except ValueError as problem:
            problems.append(str(problem))
    if problems:
        where = f"{source}: " if source else ""
        raise ConfigError("\n".join(where + problem for problem in problems))
    return parsed


def build(config: type[C], *layers: Values) -> C:
    """Make a config from layers of parsed values, later ones winning over earlier ones and over the defaults."""
    values = {name: value for layer in layers for name, value in layer.items()}
    missing = [
        f"{setting.flag} is required: {setting.help}"
        for setting in settings_of(config)
        if setting.default is dataclasses.MISSING and setting.name not in values
    ]
    if missing:
        raise ConfigError("\n".join(missing))
    return config(**values)


def values_of(config: Any) -> dict[str, Any]:
    """Return the settings of an instance by name."""
    return {setting.name: getattr(config, setting.name) for setting in settings_of(type(config))}


def idle_settings(config: Any, given: Values) -> list[str]:
    """Return a sentence for each setting that was given but has no effect beside the others."""
    values = values_of(config)
    return [
        f"{setting.flag} has no effect here: it counts {setting.when}."
        for setting in settings_of(type(config))
        if setting.name in given and setting.when and not setting.when.holds(values)
    ]


def _parse_switch(value: object, refused: ValueError) -> bool:
    words = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise refused


def _parse_path(text: str, refused: ValueError) -> Path:
    """Take a path as people paste it: with quotes, with `~`, with spaces around it."""
    bare = text.strip()
    if len(bare) >= 2 and bare[0] == bare[-1] and bare[0] in "'\"":
        bare = bare[1:-1]
    if not bare or "\0" in bare:
        raise refused
    if IS_WINDOWS and '"' in bare:
        # "C:\my songs\" is no end of a word there: the quote is taken for one of the name, and what follows with it.
        raise ValueError(f"{refused.args[0][:-1]}: leave out the backslash before the closing quote.")
    try:
        path = Path(bare).expanduser()
    except RuntimeError:  # The home of a user whom this machine does not know.
        raise refused from None
    try:
        path.lstat()
    except OSError as error:
        # That there is no such file is for others to say; no file can ever be there if its name is too long.
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"{refused.args[0][:-1]}: that name is too long for this system.") from None
    return path
