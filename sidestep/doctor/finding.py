"""What an examination found."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. A problem keeps training from working; a note is worth knowing.

    `way_out` says what to do about it.
    """

    about: str
    text: str
    level: Literal["ok", "note", "problem"] = "ok"
    way_out: str = ""
