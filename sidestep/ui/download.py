"""Fetches the models from Hugging Face: resumable, with the hub's own progress bars, and checked to be whole."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

from sidestep.config.places import MAIN_REPOSITORY, MODEL_REPOSITORY
from sidestep.config.shell import download_line
from sidestep.errors import RunError

LANGUAGE_MODELS = ("acestep-5Hz-lm-*",)  # Plans songs at inference; nothing here reads it.
SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """One repository and where it goes; files that match `without` stay away."""

    repository: str
    folder: Path
    without: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """The command that fetches the same."""
        return download_line(self.repository, self.folder, without=self.without)


class Hub(Protocol):
    """What is needed of Hugging Face."""

    def sizes(self, repository: str) -> Mapping[str, int]:
        """The files of a repository and their sizes in bytes."""
        ...

    def download(self, repository: str, folder: Path, without: Sequence[str]) -> None:
        """Fetch a repository into a folder; what is there already is not fetched again."""
        ...


def fetches_for(root: Path, variants: Iterable[str]) -> list[Fetch]:
    """What to fetch so that these models can be trained: turbo comes with the parts that all share."""
    main = Fetch(repository=MAIN_REPOSITORY, folder=root, without=LANGUAGE_MODELS)
    others = [variant for variant in variants if variant != "turbo"]
    return [main, *(Fetch(repository=MODEL_REPOSITORY + each, folder=root / f"acestep-v15-{each}") for each in others)]


def fetch(each: Fetch, hub: Hub, *, say: Callable[[str], None]) -> None:
    """Fetch a repository and check that every file it lists is there in its full size; RunError otherwise."""
    sizes = {
        name: size
        for name, size in hub.sizes(each.repository).items()
        if not any(fnmatch(name, f"{pattern}/*") for pattern in each.without)
    }
    if missing_files(each.folder, sizes):
        say(f"Fetching {each.repository} ({sum(sizes.values()) / 1e9:.1f} GB) to {each.folder}")
        hub.download(each.repository, each.folder, [f"{pattern}/*" for pattern in each.without])
    missing = missing_files(each.folder, sizes)
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise RunError(
            f"{each.repository} is not whole in {each.folder}: {', '.join(missing[:SHOWN])}{more}.",
            hint=f"Fetch it again; it goes on where it stopped:\n  {each.command}",
        )
    say(f"{each.repository} is whole: {len(sizes)} files, each in its full size.")


def missing_files(folder: Path, sizes: Mapping[str, int]) -> list[str]:
    """The files of a list that are not in a folder in the size listed."""
    return [name for name, size in sizes.items() if not _is_whole(folder / name, size)]


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
