"""Questions as data: what is asked, what is suggested, what is accepted; and the form that holds the answers."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sidestep.config.flags import describe
from sidestep.config.settings import Setting
from sidestep.ui.command_line import word_of
from sidestep.ui.paths import read_path

Kind = Literal["text", "path", "choice", "many"]
Ask = Literal["basic", "advanced", "never"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One entry of a list: the value it stands for, its words, and a remark beside them."""

    value: Any
    title: str
    note: str = ""


class Form(Mapping[str, Any]):
    """What was answered so far, and a suggestion for everything that was not.

    Only answers that differ from their suggestion are kept. So whatever was merely accepted follows when an earlier
    answer changes, another preset for example, and nothing carried over can override that.
    """

    def __init__(self, questions: Sequence["Question"], given: Mapping[str, Any] | None = None) -> None:
        self.questions = tuple(questions)
        self._by_name = {question.name: question for question in questions}
        self.given = dict(given or {})

    def __getitem__(self, name: str) -> Any:
        return self.given[name] if name in self.given else self._by_name[name].suggest(self)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def give(self, name: str, value: Any) -> None:
        """Keep an answer."""
        if value == self._by_name[name].suggest(self):
            self.given.pop(name, None)
        else:
            self.given[name] = value


Predicate = Callable[[Form], bool]


def always(form: Form) -> bool:
    """The condition that always holds."""
    return True


def never(form: Form) -> bool:
    """The condition that never holds."""
    return False


def nothing_to_say(form: Form) -> Sequence[str]:
    """No remark after an answer."""
    return ()


def anything(form: Form, value: Any) -> str:
    """The check that finds nothing wrong."""
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question. `parse` and `check` give the reason why an answer is refused: a ValueError, a sentence."""

    name: str
    title: str
    kind: Kind
    suggest: Callable[[Form], Any]
    help: str = ""
    group: str = ""
    ask: Ask = "basic"
    setting: Setting | None = None
    applies: Predicate = always
    """Whether the answer counts at all, asked or not."""
    is_needed: Predicate = never
    """Whether it is asked even among the basic questions, whatever `ask` says."""
    parse: Callable[[str], Any] = str.strip
    choices: Callable[[Form], Sequence[Choice]] = lambda form: ()
    check: Callable[[Form, Any], str] = anything
    tell: Callable[[Form], Sequence[str]] = nothing_to_say
    """What to say once it is answered."""
    only_folders: bool = True
    """Whether Tab completes to folders alone, where the answer is a path."""

    def say(self, form: Form, value: Any) -> str:
        """An answer in words, also where it was left to the default."""
        if value is None and self.setting:
            return self.setting.shown_default
        return self.show(form, value)

    def show(self, form: Form, value: Any) -> str:
        """An answer as it stands in its line: of a list the entry's title, else as one would type it."""
        if self.kind == "choice":
            titles = {choice.value: choice.title for choice in self.choices(form)}
            return titles.get(value, "" if value is None else word_of(value))
        if value is None:
            return ""
        return ", ".join(map(str, value)) if self.kind == "many" else word_of(value)


def title_of(setting: Setting) -> str:
    """The name of a setting as a title: the flag's own words."""
    return setting.name.replace("_", " ").capitalize()


def question_of(setting: Setting, **changes: Any) -> Question:
    """The question for a setting, made of its declaration; `changes` replace single fields of it."""
    kind: Kind = "path" if setting.kind is Path else "text"
    if setting.choices or setting.kind is bool:
        kind = "many" if setting.many else "choice"
    fields: dict[str, Any] = {
        "name": setting.name,
        "title": title_of(setting),
        "kind": kind,
        "suggest": lambda form: setting.default,
        "help": _help(setting),
        "group": setting.group,
        "ask": setting.ask,
        "setting": setting,
        "applies": lambda form: setting.when is None or setting.when.holds(form),
        "parse": lambda text: _parse(setting, text),
        "choices": lambda form: _choices(setting),
        "only_folders": setting.name.endswith("_dir") or setting.name in ("input", "tensor_output", "init_from"),
    }
    return Question(**fields | changes)


def typed_values(form: Form, base: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were decided otherwise than `base` (by name) or else their defaults say: what to type."""
    values = {}
    for question in form.questions:
        setting = question.setting
        if setting and question.applies(form):
            value = form[question.name]
            if value != base.get(setting.name, setting.default):
                values[setting.name] = value
    return values


def wanted(groups: Collection[str]) -> Callable[[Form, Question], bool]:
    """The selection of the basic questions, and of every question of these groups, as far as they apply."""

    def is_wanted(form: Form, question: Question) -> bool:
        if not question.applies(form):
            return False
        return (
            question.ask == "basic"
            or (question.ask == "advanced" and question.group in groups)
            or question.is_needed(form)
        )

    return is_wanted


def whole_group(group: str) -> Callable[[Form, Question], bool]:
    """The selection of every question of one group that applies."""
    return lambda form, question: question.group == group and question.ask != "never" and question.applies(form)


def _help(setting: Setting) -> str:
    """The declaration's words; where the choices stand below they need not be listed."""
    if setting.choices or setting.kind is bool:
        return setting.help
    empty = f" Empty: {setting.shown_default}." if setting.optional else ""
    return describe(setting, default=False, condition=False) + empty


def _parse(setting: Setting, text: str) -> Any:
    if setting.optional and not text.strip():
        return None
    if setting.kind is str and not text.strip():
        return ""
    if setting.kind is Path:
        return setting.parse(str(read_path(text)))
    return setting.parse(text.strip())


def _choices(setting: Setting) -> Sequence[Choice]:
    values = (True, False) if setting.kind is bool else setting.choices
    named = tuple(Choice(value=value, title=word_of(value)) for value in values)
    return (Choice(value=None, title=setting.shown_default), *named) if setting.optional else named
