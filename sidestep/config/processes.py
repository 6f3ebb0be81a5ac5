"""The processes that train together, and what a launcher (torchrun, accelerate launch) says of them; without torch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from sidestep.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # In the order of `Place`.
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
_HIGHEST_PORT = 65535
_HINT = "torchrun and accelerate launch set them; to train in one process, unset them."


class Word(IntEnum):
    """What a process says when it meets the others."""

    FINE = 0
    YES = 1
    NO_ROOM = 2
    FAILED = 3


@dataclass(slots=True, eq=False)
class Processes:
    """The processes that train together, seen from one of them. This class is for one that is alone.

    `rank` counts all of them, `local_rank` those of this machine; the first one (rank 0) alone writes and speaks.
    """

    rank: int = 0
    local_rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Say whether this is the one that writes and speaks."""
        return self.rank == 0

    def meet(self, word: Word = Word.FINE) -> list[Word]:
        """Wait until all are here, and return what each says, by rank.

        ElsewhereError when another one failed, NoRoomElsewhereError when another one's device is too small.
        """
        return [word]

    def anyone(self, flag: bool) -> bool:
        """Say whether the flag is up in any process; the same answer in all."""
        return Word.YES in self.meet(Word.YES if flag else Word.FINE)

    def text_of_first(self, text: str) -> str:
        """Return the first process's text."""
        return text

    def must_agree(self, what: str, value: str) -> None:
        """Raise ConfigError unless `value`, which is `what`, is the same in all."""

    @contextmanager
    def needing_all(self) -> Iterator[None]:
        """Meet, and do inside what no process can do without the others; what goes wrong there with one of them is
        raised as `meet` raises it."""
        yield

    def use(self, device: "torch.device") -> None:
        """Get ready to exchange numbers that lie on this device."""

    def add_up(self, numbers: "Tensor") -> None:
        """Replace the tensor by its sum over all processes, the same bits in each."""

    def copy_first(self, numbers: "Tensor") -> None:
        """Replace the tensor by the first process's."""

    def gather(self, numbers: "Tensor") -> "list[Tensor]":
        """Return every process's tensor on the CPU, by rank; all have one shape."""
        return [numbers]


ALONE = Processes()


@dataclass(frozen=True, slots=True)
class Place:
    """Which of the processes this one is, by the launcher's environment."""

    rank: int
    local_rank: int
    count: int


def launched_place(environment: Mapping[str, str]) -> Place | None:
    """Return this process's place among those that a launcher started; None where it trains alone.

    ConfigError when the launcher's variables make no sense.
    """
    # A variable that is set to nothing says nothing.
    missing = [name for name in (*_NAMES, *_ADDRESS) if not environment.get(name)]
    if missing and (environment.get("WORLD_SIZE") or "1") != "1" and environment.get("RANK"):
        raise ConfigError(
            f"The environment says RANK and WORLD_SIZE {environment['WORLD_SIZE']}, but not {', '.join(missing)}.",
            hint=_HINT,
        )
    if missing:
        return None
    try:
        place = Place(*(int(environment[name]) for name in _NAMES))
    except ValueError as error:
        raise ConfigError(f"{', '.join(_NAMES)} in the environment must be whole numbers.", hint=_HINT) from error
    if not 0 <= place.rank < place.count or place.local_rank < 0:
        raise ConfigError(f"RANK {place.rank} of WORLD_SIZE {place.count} does not exist.", hint=_HINT)
    if place.count == 1:
        return None
    port = environment["MASTER_PORT"]
    if not (port.isdecimal() and 0 < int(port) <= _HIGHEST_PORT):
        raise ConfigError(f"MASTER_PORT {port} in the environment is no port: 1 to {_HIGHEST_PORT}.", hint=_HINT)
    return place
