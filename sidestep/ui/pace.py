"""How long a run still takes, measured by what it did since it began here."""

import time
from collections.abc import Callable

Clock = Callable[[], float]


class Pace:
    """Counts finished pieces of work since `begin` and says how long the rest takes at that pace, in seconds."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self.begin()

    def begin(self) -> None:
        """Measure from now on."""
        self.finished = 0
        self._began = self._latest = self._clock()

    def count(self) -> None:
        """One more piece is finished."""
        self.finished += 1
        self._latest = self._clock()

    def time_left(self, remaining: int) -> float | None:
        """Seconds until `remaining` more pieces are finished; None before the first one was."""
        if not self.finished:
            return None
        each = (self._latest - self._began) / self.finished
        return max(0.0, each * remaining - (self._clock() - self._latest))
