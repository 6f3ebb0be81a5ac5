"""Several processes as one: torch's process groups, joined when the command starts and left when it ends.

Everything they do in common begins with `meet`, on the CPU: whoever failed says so there, whatever the others were
about to do, so that nobody waits for it in vain; and no meeting waits for the GPU.
"""

import os
import signal
import socket
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from sidestep.config.processes import Place, Processes, Word
from sidestep.errors import ConfigError, ElsewhereError, LostProcessError, NoRoomElsewhereError, RunError
from sidestep.model.capabilities import capabilities, those_with
from sidestep.model.device import choose_device, choose_own_device

JOINING = timedelta(minutes=10)
# The others wait while the first one preprocesses, saves or renders. A process that dies is noticed at once.
PATIENCE = timedelta(days=7)
FAREWELL = timedelta(minutes=2)  # How long one that failed waits to tell the others: they finish their passes first.
CPU = torch.device("cpu")


@contextmanager
def joined(place: Place) -> Iterator[Processes]:
    """Join the other processes, and leave together with them.

    When some fail, the first of these raises its own error and all others raise ElsewhereError: it is told once.
    """
    try:
        _take_interface(os.environ)
        with _ended_by_signals():
            dist.init_process_group("gloo", timeout=JOINING)
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise RunError(
            f"The {place.count} processes of this run did not find each other: {reason}.",
            hint="Were all machines started, with one and the same --master-addr (the first machine's address in their "
            "network, not its name) and a free port, and can they reach each other?",
        ) from error
    processes = JoinedProcesses(place.rank, place.local_rank, place.count, meetings=new_group("gloo", PATIENCE))
    try:
        yield processes
        processes.meet()
    except ElsewhereError:
        processes.stay_behind()
        raise
    except LostProcessError as error:
        if not processes.is_first:
            raise ElsewhereError from error
        raise
    except BaseException as error:
        if not processes.is_first_to_fail(error):
            processes.stay_behind()
            raise ElsewhereError from error
        raise
    finally:
        # Its threads may otherwise be found running when Python ends.
        dist.destroy_process_group()


def _take_interface(environment: MutableMapping[str, str]) -> None:
    """Have Gloo use the network interface that leads to the launcher's address, unless the user named one.

    Gloo would take what the machine's own name stands for: on Debian and Ubuntu that is 127.0.1.1, where no other
    machine finds it.
    """
    if sys.platform == "win32" or "GLOO_SOCKET_IFNAME" in environment:
        return  # On Windows Gloo knows no interfaces.
    place = (environment["MASTER_ADDR"], environment["MASTER_PORT"])
    family, kind, protocol, _, address = socket.getaddrinfo(*place, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # Sends nothing.
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if own in (each.address.partition("%")[0] for each in addresses):
            environment["GLOO_SOCKET_IFNAME"] = name
            return


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Have Ctrl-C and SIGTERM end the process at once: Python's handlers wait for torch, which waits for the others."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(slots=True, eq=False, kw_only=True)
class JoinedProcesses(Processes):
    """One of several processes. `use` comes before anything is done with numbers of a device."""

    meetings: dist.ProcessGroup
    _numbers: dist.ProcessGroup | None = field(default=None, init=False)

    def meet(self, word: Word = Word.FINE) -> list[Word]:
        """Wait until all are here, and return what each says, by rank.

        ElsewhereError when another one failed, NoRoomElsewhereError when another one's device is too small,
        LostProcessError when another one is gone.
        """
        try:
            words = self._exchange(word)
        except RuntimeError as error:
            raise _lost() from error
        if Word.FAILED in words:
            raise ElsewhereError
        if Word.NO_ROOM in words and word != Word.NO_ROOM:
            raise NoRoomElsewhereError("The device of another process is too small.")
        return words

    @contextmanager
    def needing_all(self) -> Iterator[None]:
        """Meet, and do inside what no process can do without the others.

        What breaks off because one of them failed or is gone is raised as `meet` raises it.
        """
        self.meet()
        try:
            yield
        except RuntimeError as error:
            if not _is_of_exchange(error):
                raise
            self.meet()  # One that failed says so here.
            raise _lost() from error

    def is_first_to_fail(self, error: BaseException) -> bool:
        """Tell the others that this process failed with an error, and say whether it is the first of those that did."""
        word = Word.FINE if isinstance(error, NoRoomElsewhereError) else Word.FAILED
        try:
            return self._exchange(word, timeout=FAREWELL).index(Word.FAILED) == self.rank
        except RuntimeError:
            return True  # Nobody is left to tell it.

    def stay_behind(self) -> None:
        """Wait until the process that tells why is gone: when the first one ends, a launcher kills the others."""
        with suppress(RuntimeError):
            self._exchange(Word.FINE, timeout=FAREWELL)

    def _exchange(self, word: Word, *, timeout: timedelta = PATIENCE) -> list[Word]:
        words = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        work = dist.all_gather(words, torch.tensor([word]), group=self.meetings, async_op=True)
        assert work is not None
        work.wait(timeout)
        return [Word(int(each)) for each in words]

    def text_of_first(self, text: str) -> str:
        """Return the first process's text."""
        return self._texts(text)[0]

    def must_agree(self, what: str, value: str) -> None:
        """Raise ConfigError unless `value`, which is `what`, is the same in all."""
        if len(set(self._texts(value))) > 1:
            raise ConfigError(
                f"The processes do not see the same {what}.",
                hint="Start all with the same arguments, and let every machine see the same folders.",
            )

    def _texts(self, text: str) -> list[str]:
        content = torch.tensor(list(text.encode()), dtype=torch.uint8)
        sizes = self.gather(torch.tensor([len(content)]))
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: len(content)] = content
        texts = self.gather(padded)
        return [bytes(each[:size].tolist()).decode() for each, size in zip(texts, map(int, sizes), strict=True)]

    def use(self, device: torch.device) -> None:
        """Get ready to exchange numbers that lie on this device; a second time changes nothing."""
        backend = capabilities(device).exchanges
        if backend == "never":
            others = those_with(lambda kind: kind.exchanges != "never")
            raise ConfigError(f"Several processes train on {others}, not on {capabilities(device).name}.")
        if self._numbers is None:
            self.meet()
            # Windows has no NCCL.
            self._numbers = new_group(backend if dist.is_backend_available(backend) else "gloo")

    @property
    def numbers(self) -> dist.ProcessGroup:
        """The group in which numbers of the device are exchanged."""
        assert self._numbers is not None
        return self._numbers

    def add_up(self, numbers: Tensor) -> None:
        """Replace the tensor by its sum over all processes, the same bits in each."""
        with self.needing_all():
            dist.all_reduce(numbers, group=self.numbers)

    def copy_first(self, numbers: Tensor) -> None:
        """Replace the tensor by the first process's."""
        with self.needing_all():
            dist.broadcast(numbers, src=0, group=self.numbers)

    def gather(self, numbers: Tensor) -> list[Tensor]:
        """Return every process's tensor on the CPU, by rank; all have one shape."""
        with self.needing_all():
            own = numbers.cpu()
            gathered = [torch.empty_like(own) for _ in range(self.count)]
            dist.all_gather(gathered, own, group=self.meetings)
        return gathered


def _lost() -> LostProcessError:
    return LostProcessError(
        "Another process of this run has ended without a word.",
        hint="What the launcher prints may say why; one that was killed ran out of main memory, most likely.",
    )


def _is_of_exchange(error: RuntimeError) -> bool:
    """Say whether it was an exchange that failed; Gloo's errors have no type of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def new_group(backend: str, timeout: timedelta | None = None) -> dist.ProcessGroup:
    """Make a group of all processes for one purpose; they call this together."""
    group = dist.new_group(backend=backend, timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group


def own_device(name: str, processes: Processes) -> torch.device:
    """Give this process's device: the one called `name`, or its own where `name` leaves open which of its kind."""
    if processes.count == 1:
        return choose_device(name)
    device = choose_own_device(name, local_rank=processes.local_rank)
    processes.use(device)
    return device
