"""Songs -> batches: lengths, windows, order, and every random draw of a sample, from the seed alone.

A run's whole randomness is a function of (seed, epoch, place in the epoch): a batch can be made again without replaying
what came before it, in any process. Nothing is ever padded along time: the model has no mask for it.
"""

import hashlib
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sidestep.config.processes import ALONE, Processes
from sidestep.errors import ReadingError, SidestepError
from sidestep.preprocess.tensors import FRAMES_PER_SECOND, read_sample
from sidestep.training.objective import Task
from sidestep.training.timesteps import Sampler

CROP_LIMIT = FRAMES_PER_SECOND  # Songs that differ by less than a second may share a batch, cropped to the shortest.
FEW_LENGTHS_LIMIT = 4 * FRAMES_PER_SECOND  # Where every length costs a capture, up to four seconds are left out.
LENGTH_STEP = 16  # Frames; the matrix kernels of large cards are slow at sequence lengths that are no multiple of 8.
GRACE_SECONDS = 30  # How long a reading process outlives SIGTERM: the main one finishes its step and saves.


@dataclass(frozen=True, slots=True)
class Song:
    """A tensor file to train on: its length in latent frames (25 a second), the rows of its prompt, and what it was
    made from."""

    path: Path
    frames: int
    repeat: int = 1
    rows: int = 0
    content: str = ""


@dataclass(frozen=True, slots=True)
class Draw:
    """One sample of an epoch: which song, which frames of it, and the seed of its noise, timestep and dropout."""

    song: int
    start: int
    frames: int
    seed: int


@dataclass(frozen=True, slots=True)
class LengthGroup:
    """Songs that can share a batch, at the length they are trained at."""

    frames: int
    songs: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How songs become batches; `epoch` lays out any epoch."""

    songs: tuple[Song, ...]
    groups: tuple[LengthGroup, ...]
    batch_size: int
    chunk_frames: int
    repeats: int
    seed: int

    def epoch(self, epoch: int) -> list[list[Draw]]:
        """Return the batches of an epoch (from 0) in their order; the same for the same plan, always.

        All draws are shuffled once and fill the batches of their length as they come, so that four batches of one are
        the samples of one batch of four. Batches that stay unfilled end the epoch.
        """
        draws = [(at, draw) for at, group in enumerate(self.groups) for draw in self._group_draws(group, epoch)]
        random.Random(mix(self.seed, epoch, "order")).shuffle(draws)
        batches: list[list[Draw]] = []
        open_batches: dict[int, list[Draw]] = {}
        for group, draw in draws:
            batch = open_batches.setdefault(group, [])
            batch.append(draw)
            if len(batch) == self.batch_size:
                batches.append(open_batches.pop(group))
        return batches + list(open_batches.values())

    @property
    def batches_per_epoch(self) -> int:
        """Return how many batches every epoch has."""
        per_group = (sum(self._draw_count(song, group.frames) for song in group.songs) for group in self.groups)
        return sum(-(-count // self.batch_size) for count in per_group)

    @property
    def mean_frames(self) -> float:
        """Return how long the samples of an epoch are on average, in frames."""
        counts = {group: sum(self._draw_count(song, group.frames) for song in group.songs) for group in self.groups}
        return sum(group.frames * count for group, count in counts.items()) / sum(counts.values())

    def _draw_count(self, song: int, frames: int) -> int:
        windows = -(-self.songs[song].frames // frames) if self._is_window(frames) else 1
        return windows * self.songs[song].repeat * self.repeats

    def _group_draws(self, group: LengthGroup, epoch: int) -> Iterator[Draw]:
        for song in group.songs:
            yield from self._draws(song, group.frames, epoch)

    def _draws(self, song: int, frames: int, epoch: int) -> Iterator[Draw]:
        for repeat in range(self.songs[song].repeat * self.repeats):
            seed = mix(self.seed, epoch, song, repeat)
            for window, start in enumerate(self._starts(song, frames, seed)):
                yield Draw(song, start, frames, mix(seed, window))

    def _is_window(self, frames: int) -> bool:
        # A song shorter than the window is never cut in two, even where it is cropped to share a batch.
        return frames == self.chunk_frames

    def _starts(self, song: int, frames: int, seed: int) -> list[int]:
        if not self._is_window(frames):
            return [random.Random(seed).randint(0, self.songs[song].frames - frames)]
        return window_starts(self.songs[song].frames, frames, random.Random(seed))


def window_starts(length: int, window: int, draw: random.Random) -> list[int]:
    """Return where windows start that together cover a song of `length` frames, as few as do.

    Their surplus (windows x window - length) is the overlap of two neighbours, which ones is drawn. Every frame is seen
    once, and some twice: on average 1 + 1 / (windows - 1) times where windows may overlap. No other law of whole
    windows is more even, since the first and the last frame can only be in the first and the last window.
    """
    count = -(-length // window)
    surplus = count * window - length
    joint = draw.randrange(1, count) if count > 1 else 1
    return [place * window - (surplus if place >= joint else 0) for place in range(count)]


def plan_batches(
    songs: Sequence[Song], *, batch_size: int, chunk_seconds: float, repeats: int, seed: int, few_lengths: bool = False
) -> Plan:
    """Group songs by length: windows of one length, else equal lengths, else lengths within a second of each other.

    Songs shorter than the window are trained whole, with those of their own length. `few_lengths` is for captured
    passes: lengths are multiples of 16 frames, and songs within four seconds of each other share one; which part of a
    song is left out is drawn anew in every epoch.
    """
    chunk_frames = round(chunk_seconds * FRAMES_PER_SECOND)
    if few_lengths and chunk_frames:
        # Down, but to no less than a second.
        whole_steps = chunk_frames - chunk_frames % LENGTH_STEP
        chunk_frames = (
            whole_steps if whole_steps >= FRAMES_PER_SECOND else -(-chunk_frames // LENGTH_STEP) * LENGTH_STEP
        )
    windowed = tuple(at for at, song in enumerate(songs) if chunk_frames and song.frames >= chunk_frames)
    groups = [LengthGroup(chunk_frames, windowed)] if windowed else []
    whole = sorted(set(range(len(songs))) - set(windowed), key=lambda at: (songs[at].frames, at))
    tolerance = CROP_LIMIT if batch_size > 1 else 1
    if few_lengths:
        tolerance = FEW_LENGTHS_LIMIT
    while whole:
        shortest = songs[whole[0]].frames
        members = [at for at in whole if songs[at].frames < shortest + tolerance]
        frames = shortest - shortest % LENGTH_STEP if few_lengths and shortest > LENGTH_STEP else shortest
        groups.append(LengthGroup(frames, tuple(sorted(members))))
        whole = whole[len(members) :]
    return Plan(
        songs=tuple(songs),
        groups=tuple(groups),
        batch_size=batch_size,
        chunk_frames=chunk_frames,
        repeats=repeats,
        seed=seed,
    )


def mix(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True, slots=True)
class Batch:
    """A task and the names of its songs; `timesteps_B` and `is_dropped_B` of the task are what was drawn."""

    task: Task
    names: tuple[str, ...]

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory; called by torch's DataLoader."""
        return Batch(self.task.pin_memory(), self.names)


@dataclass(frozen=True, slots=True)
class _Item:
    latents_TC: Tensor
    context_TC: Tensor
    condition_LD: Tensor
    noise_TC: Tensor
    timestep_1: Tensor
    is_dropped_1: Tensor
    name: str


@dataclass(frozen=True, slots=True)
class Draws(Dataset["_Item | SidestepError"]):
    """Makes the sample of a `Draw`; runs in the loader's worker processes."""

    songs: tuple[Song, ...]
    sampler: Sampler
    cfg_ratio: float

    def __getitem__(self, draw: Draw) -> "_Item | SidestepError":
        """Read the song and make its draws, in the original's order: dropout, noise, timestep.

        A file that went bad is returned as its error: raised in a worker it would arrive as a traceback.
        """
        try:
            return self._item(draw)
        except SidestepError as error:
            return error

    def _item(self, draw: Draw) -> _Item:
        song = self.songs[draw.song]
        sample = read_sample(song.path)
        generator = torch.Generator().manual_seed(draw.seed)
        window = slice(draw.start, draw.start + draw.frames)
        latents_TC = sample.target_latents[window].float()
        is_dropped_1 = torch.rand(1, generator=generator) < self.cfg_ratio
        noise_TC = torch.randn(latents_TC.shape, generator=generator)
        timestep_1 = self.sampler.draw(1, generator)
        # Generation always starts its silent context at frame 0, so a window does too.
        context_TC = sample.context_latents[: draw.frames]
        condition_LD = sample.encoder_hidden_states
        return _Item(latents_TC, context_TC, condition_LD, noise_TC, timestep_1, is_dropped_1, song.path.stem)


@dataclass(frozen=True, slots=True)
class Collate:
    """Stacks samples of equal length; prompts of unequal length are padded behind a mask that cross-attention heeds.

    `rows`: pad every prompt to so many rows at least, so that one captured pass serves all; 0 pads to the longest.
    """

    rows: int = 0

    def __call__(self, results: Sequence[_Item | SidestepError]) -> Batch | SidestepError:
        """Return the batch, or the first error among its samples."""
        items = []
        for result in results:
            if isinstance(result, SidestepError):
                return result
            items.append(result)
        condition_BLD, rows_BL = self._pad([item.condition_LD for item in items])
        task = Task(
            latents_BTC=torch.stack([item.latents_TC for item in items]),
            context_BTC=torch.stack([item.context_TC for item in items]),
            condition_BLD=condition_BLD,
            rows_BL=rows_BL,
            noise_BTC=torch.stack([item.noise_TC for item in items]),
            timesteps_B=torch.cat([item.timestep_1 for item in items]),
            is_dropped_B=torch.cat([item.is_dropped_1 for item in items]),
        )
        return Batch(task, tuple(item.name for item in items))

    def _pad(self, conditions: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        lengths = [condition.shape[0] for condition in conditions]
        longest = max(self.rows, *lengths)
        if min(lengths) == longest:
            return torch.stack(list(conditions)), None
        padded = [torch.nn.functional.pad(c, (0, 0, 0, longest - c.shape[0])) for c in conditions]
        return torch.stack(padded), torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]


@dataclass(slots=True)
class _EpochOrder:
    """What the loader iterates: every `stride`th batch of one epoch from a position on. Lives in the main process."""

    plan: Plan
    stride: int
    epoch: int = 0
    position: int = 0

    def __iter__(self) -> Iterator[list[Draw]]:
        return iter(self.plan.epoch(self.epoch)[self.position :: self.stride])

    def __len__(self) -> int:
        return len(range(self.position, self.plan.batches_per_epoch, self.stride))


def leave_signals_to_the_main_process(worker: int) -> None:
    """Make a reading process outlive Ctrl-C, and SIGTERM for as long as the main one takes to finish its step."""
    # Ctrl-C and a job manager's SIGTERM reach every process of the group; a worker that dies of one, or that runs the
    # handler it was forked with, takes the step down that is to be finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("SIGBREAK", "SIGHUP"):  # Ctrl-Break on Windows, a closed terminal elsewhere.
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # Windows has none, and sends no SIGTERM.
        signal.signal(signal.SIGTERM, _stay_a_little)


def _stay_a_little(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(GRACE_SECONDS)


def _learn_of_dead_readers_from_the_next_batch() -> None:
    # torch's handler of SIGCHLD raises where the main process happens to be, in the middle of an update for one.
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@dataclass(slots=True)
class Batches:
    """The batches of any epoch from any position, read ahead by worker processes.

    Of several `processes` that train together each reads its own: they take turns. After `last_epoch` nothing is read.
    """

    plan: Plan
    draws: Draws
    num_workers: int
    pin_memory: bool
    prefetch_factor: int
    persistent_workers: bool
    rows: int = 0
    processes: Processes = ALONE
    last_epoch: int | None = None
    _order: _EpochOrder = field(init=False)
    _loader: DataLoader[_Item | SidestepError] = field(init=False)
    _reader: Iterator[Batch | SidestepError] | None = field(init=False, default=None)
    _begun: tuple[int, Iterator[Batch | SidestepError]] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._order = _EpochOrder(self.plan, self.processes.count)
        self.close()

    def close(self) -> None:
        """End the processes that read ahead, which an error on its way holds on to: at exit they would stay a while."""
        self._reader = self._begun = None
        self._loader = DataLoader(
            self.draws,
            batch_sampler=self._order,  # type: ignore[arg-type]
            collate_fn=Collate(self.rows),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            prefetch_factor=self.prefetch_factor if self.num_workers else None,
            persistent_workers=self.persistent_workers and self.num_workers > 0,
            worker_init_fn=leave_signals_to_the_main_process,
        )

    def epoch(self, epoch: int, *, position: int = 0) -> Iterator[Batch]:
        """Yield this process's batches of an epoch (from 0), beginning where all of them skipped the first `position`.

        Raises the DataError of a file that went bad, and ReadingError when a reading process was killed.
        """
        if self._begun is None or self._begun[0] != epoch or position:
            self._begun = epoch, self._begin(epoch, position)
        (_, self._reader), self._begun = self._begun, None
        count = len(range(position + self.processes.rank, self.plan.batches_per_epoch, self.processes.count))
        for place in range(count):
            batch = self._next()
            if isinstance(batch, SidestepError):
                raise batch
            if self.num_workers and place == count - 1:
                self._reader = None  # Its processes end, where they do not stay.
                if epoch != self.last_epoch:
                    # The next epoch's first batches are read while the last of this one is trained on.
                    self._begun = epoch + 1, self._begin(epoch + 1, 0)
            yield batch

    def _begin(self, epoch: int, position: int) -> Iterator[Batch | SidestepError]:
        self._order.epoch, self._order.position = epoch, position + self.processes.rank
        batches = iter(self._loader)
        _learn_of_dead_readers_from_the_next_batch()
        return batches

    def _next(self) -> Batch | SidestepError:
        assert self._reader is not None
        try:
            return next(self._reader)
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            # The last three: the process died before it had handed over the memory of a finished batch.
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
                raise
            # Its bus error is how a container with little shared memory (/dev/shm) shows.
            raise ReadingError(
                "A process that reads the songs was killed.",
                hint="Memory or shared memory ran out, most likely: read in the main process with --num-workers 0.",
            ) from error


def collate_draws(batches: Batches, draws: Sequence[Draw]) -> Batch:
    """Make one batch of these draws here and now; DataError when a file went bad."""
    batch = Collate(batches.rows)([batches.draws[draw] for draw in draws])
    if isinstance(batch, SidestepError):
        raise batch
    return batch
