"""What a user can act on.

```
SidestepError            a message, a hint with the way out, and an exit code
├── ConfigError   exit 2  a flag, a preset or a combination of settings is wrong
├── DataError     exit 1  audio, a sidecar, dataset.json or a tensor file is wrong
├── ModelError    exit 1  a checkpoint or an adapter is missing, damaged or of another model
└── RunError      exit 1  memory or disk ran out
    ├── NoRoomError       the device's memory is too small; NoRoomElsewhereError: another process's is
    ├── NonFiniteError    the loss or its gradient is no longer a finite number
    ├── ReadingError      a process that reads the songs was killed
    ├── LostProcessError  another process of the run ended without a word
    └── ElsewhereError    another process of the run failed, and says why itself
```
Anything else that reaches `main`, or ends an action of the wizard, is a bug of ours: exit 70.
"""

EXIT_BUG = 70


class SidestepError(Exception):
    """A problem that is not a bug: `message` says what is wrong, `hint` what to do next.

    A line of the hint that begins with two spaces is a command to be copied.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(SidestepError):
    """A setting is wrong; nothing was started."""

    exit_code = 2


class DataError(SidestepError):
    """A file of the user's data cannot be used."""


class ModelError(SidestepError):
    """A checkpoint or an adapter cannot be used."""


class RunError(SidestepError):
    """The machine could not carry on: memory, disk, or non-finite numbers."""


class NoRoomError(RunError):
    """The device's memory is too small for what was asked."""


class NoRoomElsewhereError(NoRoomError):
    """The device of another process of the run is too small."""


class NonFiniteError(RunError):
    """The loss or its gradient is no longer a finite number; the weights were not touched."""


class ReadingError(RunError):
    """A process that reads the songs was killed; found between two steps."""


class LostProcessError(RunError):
    """Another process of the run ended without a word; found where they meet."""


class ElsewhereError(RunError):
    """Another process of the run failed and tells its user why; this one ends in silence."""

    def __init__(self) -> None:
        super().__init__("Another process of this run failed.")
