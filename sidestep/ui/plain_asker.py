"""Questions as plain lines: no escape codes, no keys but Enter. For `--plain`, screen readers and simple terminals."""

from collections.abc import Callable, Sequence
from typing import Any

from sidestep.ui.asker import GoBack, Prompt, forget_keys
from sidestep.ui.console import Console
from sidestep.ui.questions import Choice
from sidestep.ui.wording import one_line

BACK = "<"
EMPTY = "-"


class PlainAsker:
    """Asks with `read`, which prints a prompt and returns a line. "<" goes back, "-" empties, Enter keeps."""

    keys = f"Enter takes what is in brackets, {BACK} goes back one question, {EMPTY} empties a line, Ctrl-C leaves."

    def __init__(self, console: Console, *, read: Callable[[str], str] = input) -> None:
        self._console = console
        self._read = read

    def text(self, prompt: Prompt, default: str, *, draft: str | None = None, path: str = "") -> str:
        """Ask for a line; Enter alone takes the one in brackets."""
        if draft is None:
            self._title(prompt)
        typed = self._line(f"  [{one_line(default)}] > " if default else "  > ")
        if typed == EMPTY:
            return ""
        return typed or default

    def choose(self, prompt: Prompt, choices: Sequence[Choice], default: Any, *, back: str = "Back") -> Any:
        """Ask for a number of a list, or the word beside it."""
        self._title(prompt)
        self._list(choices, back)
        values = [choice.value for choice in choices]
        suggested = f"[{values.index(default) + 1}] " if default in values else ""
        while True:
            typed = self._line(f"  Number {suggested}> ", can_go_back=bool(back))
            if not typed and default in values:
                return default
            index = _index(typed, choices)
            if index is not None:
                return values[index]
            self.refused(f"Type a number from 1 to {len(choices)}.")

    def mark(self, prompt: Prompt, choices: Sequence[Choice], default: Sequence[Any]) -> tuple[Any, ...]:
        """Ask for numbers of a list, with spaces between them."""
        self._title(prompt)
        self._list(choices)
        numbers = " ".join(str(index + 1) for index, choice in enumerate(choices) if choice.value in default)
        while True:
            typed = self._line(f"  Numbers [{numbers or EMPTY}] > ") or numbers
            if typed in ("", EMPTY):
                return ()
            indexes = [_index(word, choices) for word in typed.replace(",", " ").split()]
            if None not in indexes:
                return tuple(choice.value for index, choice in enumerate(choices) if index in indexes)
            self.refused(f"Type numbers from 1 to {len(choices)} with spaces between them, or {EMPTY} for none.")

    def answered(self, prompt: Prompt, shown: str, remarks: Sequence[str] = ()) -> None:
        """Print the remarks; the answer stands in the line that was typed."""
        for remark in remarks:
            self._console.print(f"  {remark}")

    def refused(self, reason: str) -> None:
        """Print the reason."""
        self._console.print(f"  {reason}")

    def forget_keys(self) -> None:
        """Drop what the terminal holds of lines typed during an action."""
        forget_keys()

    def _title(self, prompt: Prompt) -> None:
        self._console.print()
        self._console.print(prompt.title)
        if prompt.help:
            self._console.print(f"  {prompt.help}")

    def _list(self, choices: Sequence[Choice], back: str = "") -> None:
        rows = [(str(index), choice.title, choice.note) for index, choice in enumerate(choices, start=1)]
        self._console.table("", [*rows, *([(BACK, back, "")] if back else [])])

    def _line(self, question: str, *, can_go_back: bool = True) -> str:
        try:
            typed = self._read(question).strip()
        except EOFError:
            raise KeyboardInterrupt from None
        if typed == BACK and can_go_back:
            raise GoBack
        return typed


def _index(typed: str, choices: Sequence[Choice]) -> int | None:
    if typed.isascii() and typed.isdigit():
        return int(typed) - 1 if 1 <= int(typed) <= len(choices) else None
    titles = [choice.title.lower() for choice in choices]
    return titles.index(typed.lower()) if typed.lower() in titles else None
