"""Hugging Face, as fetching the models needs it; imported only when something is fetched."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from sidestep.errors import RunError


class HuggingFace:
    """The hub. Raises RunError when it cannot be reached, refuses, or the disk does."""

    def __init__(self, *, shows_progress: bool) -> None:
        self._shows_progress = shows_progress

    def sizes(self, repository: str) -> Mapping[str, int]:
        """The files of a repository and their sizes in bytes."""
        from huggingface_hub import HfApi

        with _explained(repository):
            files = HfApi().model_info(repository, files_metadata=True).siblings or []
        return {file.rfilename: file.size or 0 for file in files}

    def download(self, repository: str, folder: Path, without: Sequence[str]) -> None:
        """Fetch a repository into a folder; what is there already is not fetched again."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars
        from tqdm.auto import tqdm

        if not self._shows_progress:
            disable_progress_bars()
        # The hub's own bars stay away for good once libraries were quietened; a bar of another class does not.
        bars = tqdm if self._shows_progress else None
        with _explained(repository):
            snapshot_download(repository, local_dir=folder, ignore_patterns=list(without), tqdm_class=bars)


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    from httpx2 import HTTPError, TransportError

    try:
        yield
    except TransportError as error:
        raise RunError(
            f"Hugging Face cannot be reached, so {repository} was not fetched.",
            hint="Is this machine on the internet? Try again; what has arrived is kept. "
            "Or fetch it on another machine and copy the folder.",
        ) from error
    except (HTTPError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RunError(
            f"{repository} could not be fetched: {reason}",
            hint="Try again; what has arrived is kept. Or fetch it on another machine and copy the folder.",
        ) from error
