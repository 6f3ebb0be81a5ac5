"""How names, numbers and times are written for people, on every screen alike."""

import io
import math
import unicodedata
from collections.abc import Sequence
from itertools import chain
from typing import TextIO

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-~=+*#"

# Control characters could move the cursor or colour the screen, bidirectional overrides could reorder a whole line, and
# other line separators would end it: none of them is text. A newline is.
_CONTROLS = chain(range(0x20), range(0x7F, 0xA0), range(0x2028, 0x202F))
_SAFE = {code: "\ufffd" for code in _CONTROLS} | {ord("\n"): "\n", ord("\t"): " ", ord("\r"): None}
_ISOLATES = dict.fromkeys(range(0x2066, 0x206A)) | {ord("\n"): "\ufffd"}


def printable(text: str) -> str:
    """The text without characters that would steer a terminal; newlines stay."""
    return text.translate(_SAFE)


def tolerate_unprintable(stream: TextIO) -> None:
    """Let a stream write "?" for a character its encoding lacks (cp1252, ASCII) instead of failing."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")


def one_line(name: str) -> str:
    """A name that keeps its place: no newline, and right-to-left letters do not reorder what follows."""
    name = printable(name).translate(_ISOLATES)
    is_right_to_left = any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in name)
    return f"\u2068{name}\u2069" if is_right_to_left else name


def count(number: int, noun: str) -> str:
    """A number and its noun: "1 song", "3 songs"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """A length of time as people say it, no finer than they care: "45 s", "3 min 12 s", "1 h 5 min", "2 d 3 h"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(whole / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(whole / 3600)
    return f"{hours // 24} d {hours % 24} h"


def speed(steps_per_second: float) -> str:
    """Steps a second, or seconds a step where that is the larger number; nothing while it is unknown."""
    if not (math.isfinite(steps_per_second) and steps_per_second > 0):
        return ""
    return f"{steps_per_second:.2f} it/s" if steps_per_second >= 1 else f"{1 / steps_per_second:.2f} s/it"


def sparkline(values: Sequence[float], *, ascii_only: bool = False) -> str:
    """One character a value, from the lowest to the highest of them; blank where a value is not finite."""
    blocks = ASCII_BLOCKS if ascii_only else BLOCKS
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return " " * len(values)
    low, span = min(finite), max(finite) - min(finite)
    top = len(blocks) - 1

    def block(value: float) -> str:
        if not math.isfinite(value):
            return " "
        return blocks[round((value - low) / span * top)] if span > 0 else blocks[top // 2]

    return "".join(map(block, values))
