"""A stand-in for a terminal, for tests of what is written to one."""

import io


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True
