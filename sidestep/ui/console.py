"""The screen: rich on a terminal, plain lines everywhere else."""

import errno
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sidestep.ui.wording import printable, tolerate_unprintable

GAP = 2
NARROWEST = 20  # Cells; a narrower terminal wraps by itself.
# A pipe whose other end was closed (`| head`), as POSIX and as Windows name it.
READER_HAS_GONE = (errno.EPIPE, errno.EINVAL)

logger = logging.getLogger(__name__)


class Console:
    """Prints text exactly as it is given: nothing in it is markup, and control characters in it do nothing.

    When `is_plain` no escape code and no box drawing is ever written, lines are not wrapped, and each is flushed.
    """

    def __init__(self, stream: TextIO, *, is_plain: bool) -> None:
        tolerate_unprintable(stream)
        self.is_plain = is_plain
        self._stream = stream
        self.rich = RichConsole(
            file=stream,
            force_terminal=False if is_plain else None,
            color_system=None if is_plain else "auto",
            soft_wrap=is_plain,
            markup=False,
            highlight=False,
            emoji=False,
        )

    def print(self, text: str = "", *, style: str = "", wrap: bool = True) -> None:
        """Print text; `style` is a rich style, `wrap=False` keeps a line that people will copy in one piece."""
        if self.is_plain:
            self._write(printable(text) + "\n")
        else:
            text = "\n".join(self.wrapped(text)) if wrap else printable(text)
            self.rich.print(Text(text, style), soft_wrap=True)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError as error:
            # A run is not given up because nobody can read along any more: the rest goes nowhere.
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
            if error.errno not in READER_HAS_GONE:
                logger.info("The output can no longer be written: %s", error)
                Console(sys.stderr, is_plain=True).warning(f"The output can no longer be written ({error}).")

    def wrapped(self, text: str, *, indent: int = 0) -> list[str]:
        """The lines of a text: as they are when plain, else broken between words so that they fit after an indent.

        A word longer than a line, such as a path, is left to the terminal, which shows it in a form that can be copied.
        """
        lines = printable(text).split("\n")
        if self.is_plain:
            return lines
        width = max(NARROWEST, self.rich.width - indent)
        wrapped = (Text(line, overflow="ignore").wrap(self.rich, width) for line in lines)
        return [part.plain.rstrip() for parts in wrapped for part in parts]

    def way_out(self, hint: str, *, indent: int = 0) -> list[str]:
        """The lines of a hint, wrapped but for those that are indented: commands, which stay in one piece."""
        lines = hint.split("\n") if hint else []
        return [
            part
            for line in lines
            for part in ([printable(line)] if line.startswith(" ") else self.wrapped(line, indent=indent))
        ]

    def heading(self, text: str) -> None:
        """Begin a new part of the output."""
        self.print()
        self.print(text, style="bold")

    def warning(self, text: str) -> None:
        """Say that something is not as one may expect."""
        self.print(f"Warning: {text}", style="magenta")  # Yellow cannot be read on a light terminal.

    def table(self, title: str, rows: Sequence[Sequence[str]], columns: Sequence[str] | None = None) -> None:
        """Print rows of cells in columns as wide as their contents, under a title (may be empty) and column names."""
        if title:
            self.heading(title)
        if self.is_plain:
            for line in _aligned([*([columns] if columns else []), *rows]):
                self.print(line)
        elif rows or columns:
            self.rich.print(Padding(_table(rows, columns), (0, 0, 0, GAP)))


def open_console(*, plain: bool, stream: TextIO | None = None) -> Console:
    """The console on `stream` (stdout if not given): plain on request, and where no terminal could show more."""
    target = stream or sys.stdout
    return Console(target, is_plain=plain or not target.isatty() or os.environ.get("TERM") == "dumb")


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines whose columns begin at the same cell, also where letters are two cells wide."""
    cells = [[printable(cell).replace("\n", " ") for cell in row] for row in rows]
    columns = max(map(len, cells), default=0)
    widths = [max(cell_len(row[column]) for row in cells if column < len(row)) for column in range(columns)]
    padded = (
        (cell + " " * (width - cell_len(cell) + GAP) for cell, width in zip(row, widths, strict=False)) for row in cells
    )
    return ["".join([" " * GAP, *row]).rstrip() for row in padded]


def _table(rows: Sequence[Sequence[str]], columns: Sequence[str] | None) -> Table:
    """A table without lines; what is named in its first column is dim, like the column names."""
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), show_header=columns is not None, header_style="dim")
    for position in range(max(map(len, rows), default=len(columns or ()))):
        name = columns[position] if columns and position < len(columns) else ""
        style = "dim" if position == 0 and columns is None else ""
        table.add_column(Text(printable(name)), style=style, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table
