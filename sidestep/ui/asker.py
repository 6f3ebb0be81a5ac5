"""How a question reaches the user: the protocol, and its form on a terminal with keys and colour."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import questionary
from prompt_toolkit.application import Application
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.filters import Condition
from prompt_toolkit.input import create_input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent, merge_key_bindings
from prompt_toolkit.key_binding.bindings.completion import display_completions_like_readline
from prompt_toolkit.keys import Keys
from prompt_toolkit.lexers import DynamicLexer, SimpleLexer
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.styles import Style
from rich.cells import cell_len, set_cell_size

from sidestep.ui.console import Console
from sidestep.ui.paths import PathCompleter
from sidestep.ui.questions import Choice
from sidestep.ui.wording import one_line, printable

ESCAPE_SECONDS = 0.05  # How long Escape may turn out to be the start of an arrow key.
SEARCHABLE = 12  # Entries from which on typing filters a list.
MARGIN = 5  # Cells before an entry, and one free at the end.
BACK = "back"

# Only the terminal's own colours and weights: readable on light and on dark, and silent with NO_COLOR.
STYLE = Style(
    [
        ("question", "bold"),
        ("instruction", "nobold dim"),
        ("answer", "nobold"),
        ("suggested", "nobold dim"),
        ("pointer", "fg:ansicyan bold"),
        ("highlighted", "bold"),
        ("selected", "noreverse"),
        ("text", ""),
    ]
)


class GoBack(Exception):  # noqa: N818 - a signal, not an error
    """The user wants to see the question before this one again."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked: a title, and a sentence that explains it."""

    title: str
    help: str = ""


class Asker(Protocol):
    """Asks the user. Raises GoBack, and KeyboardInterrupt when the user leaves."""

    keys: str
    """Which keys go back and leave, in a sentence."""

    def text(self, prompt: Prompt, default: str, *, draft: str | None = None, path: str = "") -> str:
        """Ask for a line; `draft` is what was typed and refused; `path`: "folder" or "any" where Tab completes."""
        ...

    def choose(self, prompt: Prompt, choices: Sequence[Choice], default: Any, *, back: str = "Back") -> Any:
        """Ask for one of a list and return its value; `back` names the way back, empty where there is none."""
        ...

    def mark(self, prompt: Prompt, choices: Sequence[Choice], default: Sequence[Any]) -> tuple[Any, ...]:
        """Ask for any of a list and return their values in the list's order."""
        ...

    def answered(self, prompt: Prompt, shown: str, remarks: Sequence[str] = ()) -> None:
        """Leave a line that says what was answered, and remarks on it."""
        ...

    def refused(self, reason: str) -> None:
        """Say why an answer cannot be taken; the question follows again."""
        ...

    def forget_keys(self) -> None:
        """Drop what was typed while nothing was asked: no question may be answered by impatience."""
        ...


class KeyAsker:
    """Asks with keys: arrows and Enter in lists, Tab in paths, Escape (or Ctrl-B) to go back, Ctrl-C to leave.

    A question disappears once it is answered; one line with the answer stays.
    """

    keys = "Esc goes back one question, Ctrl-C leaves."

    def __init__(self, console: Console) -> None:
        self._console = console

    def text(self, prompt: Prompt, default: str, *, draft: str | None = None, path: str = "") -> str:
        """Ask for a line, with the earlier answer (or the refused one) there to be changed."""
        completer = PathCompleter(only_folders=path == "folder") if path else None
        lines = self._help(prompt)
        suggestion = _Suggestion(default if draft is None else draft, is_own=draft is not None)

        def is_untouched() -> bool:
            return suggestion.is_untouched(asked.application.current_buffer)

        def is_foreign() -> bool:
            return is_untouched() and not suggestion.is_own

        asked = questionary.text(
            one_line(prompt.title),
            default=suggestion.text,
            qmark="",
            instruction="\n".join(["", *lines, ""]) + "  ›",
            style=STYLE,
            lexer=DynamicLexer(lambda: SimpleLexer("class:suggested" if is_foreign() else "class:answer")),
            completer=completer,
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
        )
        return self._ask(asked.application, _suggestion_keys(Condition(is_untouched), suggestion))

    def choose(self, prompt: Prompt, choices: Sequence[Choice], default: Any, *, back: str = "Back") -> Any:
        """Ask for one of a list; typing filters a long one."""
        values = [choice.value for choice in choices]
        entries = self._entries(choices, default if default in values else None)
        if back:
            entries.append(questionary.Choice(back, value=BACK))
        is_long = len(entries) > SEARCHABLE
        asked = questionary.select(
            one_line(prompt.title),
            choices=entries,
            default=str(values.index(default)) if default in values else None,
            qmark="",
            pointer="›",
            instruction=_below(self._help(prompt, "Type to filter." if is_long else "")),
            style=STYLE,
            use_search_filter=is_long,
            use_jk_keys=False,
        )
        answer = self._ask(asked.application, can_go_back=bool(back))
        if answer == BACK:
            raise GoBack
        return values[int(answer)]

    def mark(self, prompt: Prompt, choices: Sequence[Choice], default: Sequence[Any]) -> tuple[Any, ...]:
        """Ask for any of a list: Space marks, Enter goes on."""
        entries = self._entries(choices, None, marked=default)
        asked = questionary.checkbox(
            one_line(prompt.title),
            choices=entries,
            qmark="",
            pointer="›",
            instruction=_below(self._help(prompt, "Space marks, Enter goes on.")),
            style=STYLE,
            use_jk_keys=False,
        )
        answer = self._ask(asked.application)
        return tuple(choices[int(index)].value for index in answer)

    def answered(self, prompt: Prompt, shown: str, remarks: Sequence[str] = ()) -> None:
        """Print the answer behind its title, and the remarks below."""
        self._console.print(f"  {one_line(prompt.title)}: {shown}" if shown else f"  {one_line(prompt.title)}: -")
        for remark in remarks:
            for line in self._console.wrapped(remark, indent=4):
                self._console.print(f"    {line}", style="dim", wrap=False)

    def refused(self, reason: str) -> None:
        """Print the reason above the question, which stays."""
        for line in self._console.wrapped(reason, indent=2):
            self._console.print(f"  {line}", style="red", wrap=False)

    def forget_keys(self) -> None:
        """Drop what the terminal holds of keys pressed during an action."""
        forget_keys()

    def _help(self, prompt: Prompt, keys: str = "") -> list[str]:
        text = " ".join(part for part in (prompt.help, keys) if part)
        return [f"   {line}" for line in self._console.wrapped(text, indent=4)] if text else []

    def _entries(self, choices: Sequence[Choice], default: Any, marked: Sequence[Any] = ()) -> list[questionary.Choice]:
        rows = [(one_line(choice.title), one_line(choice.note)) for choice in choices]
        column = max((cell_len(title) for title, note in rows if note), default=0) + 2
        room = max(10, self._console.rich.width - MARGIN)
        return [
            questionary.Choice(_row(row, column, room), value=str(index), checked=choices[index].value in marked)
            for index, row in enumerate(rows)
        ]

    def _ask(self, application: Application[Any], keys: KeyBindings | None = None, *, can_go_back: bool = True) -> Any:
        sets = [application.key_bindings, keys, _BACK_KEYS if can_go_back else None]
        application.key_bindings = merge_key_bindings([each for each in sets if each])
        application.ttimeoutlen = ESCAPE_SECONDS
        application.erase_when_done = True
        try:
            return application.run()
        except EOFError:  # Ctrl-D on an empty line.
            raise KeyboardInterrupt from None


def forget_keys() -> None:
    """Empty the terminal's own store of keys; nothing where stdin is no terminal."""
    if sys.stdin.isatty():
        terminal = create_input(sys.stdin)
        with terminal.raw_mode():  # Else the last, unfinished line would stay.
            while terminal.read_keys():
                continue
        terminal.close()


def _back_keys() -> KeyBindings:
    def go_back(event: KeyPressEvent) -> None:
        event.app.exit(exception=GoBack())

    keys = KeyBindings()
    keys.add("escape", eager=True)(go_back)
    keys.add("c-b", eager=True)(go_back)
    return keys


_BACK_KEYS = _back_keys()


@dataclass(slots=True)
class _Suggestion:
    """What stands in a line before anything is typed, until it is gone on with or replaced.

    `is_own`: the user typed it and it was refused. It is mended by typing; only what is pasted takes its place.
    """

    text: str
    is_own: bool = False
    is_taken: bool = False

    def is_untouched(self, buffer: Buffer) -> bool:
        return not self.is_taken and buffer.text == self.text and buffer.cursor_position == len(self.text)


def _suggestion_keys(is_untouched: Condition, suggestion: _Suggestion) -> KeyBindings:
    """What is typed or pasted takes the place of an untouched suggestion; Right, End and Tab go on with it instead."""

    def replace(event: KeyPressEvent) -> None:
        event.current_buffer.text = ""
        event.current_buffer.insert_text(printable(event.data).replace("\n", " ").strip("\ufffd"))

    def take(event: KeyPressEvent) -> None:
        suggestion.is_taken = True

    def complete(event: KeyPressEvent) -> None:
        take(event)
        if event.current_buffer.completer:
            display_completions_like_readline(event)

    keys = KeyBindings()
    if not suggestion.is_own:
        keys.add(Keys.Any, filter=is_untouched)(replace)
    keys.add(Keys.BracketedPaste, filter=is_untouched)(replace)
    for key in ("right", "end", "c-e"):
        keys.add(key, filter=is_untouched)(take)
    keys.add("tab", filter=is_untouched)(complete)
    return keys


def _below(lines: Sequence[str]) -> str:
    """An instruction below the title; never empty, for which questionary would put its own."""
    return "\n".join(["", *lines]) or " "


def _row(row: tuple[str, str], column: int, room: int) -> str:
    """An entry and its remark in two columns, cut where the line would end."""
    title, note = row
    whole = title + " " * max(0, column - cell_len(title)) + note if note else title
    return whole if cell_len(whole) <= room else set_cell_size(whole, room - 1) + "…"
