"""Where a run keeps what, so that it can be found again without torch."""

import json
import re
from itertools import count
from pathlib import Path, PurePath

from sidestep.errors import ConfigError, ModelError
from sidestep.files import move

CHECKPOINTS = "checkpoints"
RUN_CONFIG = "config.json"
STATE_FILE = "training_state.pt"
LORA_FILE = "adapter_model.safetensors"
LORA_CONFIG = "adapter_config.json"
LOKR_FILE = "lokr_weights.safetensors"
LOHA_FILE = "loha_weights.safetensors"
COPY_AGAIN = "The file is damaged, or was cut off on its way: copy or download it again."
# Folders of a run that an adapter cannot be called, in any case: some file systems do not tell them apart.
RESERVED_NAMES = frozenset({CHECKPOINTS, "runs", "samples"})
LONGEST_NAME = 200  # bytes; a file system takes 255, and a folder is written under a longer, temporary name
_EPOCH = re.compile(r"epoch_(\d+)(?:_step_(\d+))?")


def checkpoint_name(*, epoch: int, step: int, is_epoch_end: bool) -> str:
    """Return the folder name of a checkpoint: after `epoch` whole epochs, or at `step` within the next one."""
    return f"epoch_{epoch}" if is_epoch_end else f"epoch_{epoch}_step_{step}"


def checkpoints_in(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, the newest first."""
    return [folder for _, folder in _placed_in(run)]


def _placed_in(run: Path) -> list[tuple[tuple[int, int], Path]]:
    """Return the checkpoint folders of a run and their places in it, as they are called; the newest first."""
    found = []
    for folder in (run / CHECKPOINTS).glob("epoch_*"):
        match = _EPOCH.fullmatch(folder.name)
        if match and (folder / STATE_FILE).is_file():
            found.append(((int(match[1]), int(match[2] or 0)), folder))
    return sorted(found, reverse=True)


def resume_candidates(path: Path) -> list[Path]:
    """Return the checkpoints that `--resume-from PATH` may mean, best first; ModelError when there is none."""
    path = named_folder(path)
    found = checkpoints_in(path)
    if (path / STATE_FILE).is_file():
        # A checkpoint that was copied out of its run becomes the folder of a run when that goes on from it.
        return [*found, path] if run_of(path) == path else [path]
    if found:
        return found
    if not path.exists():
        raise ModelError(f"There is no folder {path} to resume from.")
    raise ModelError(
        f"There is no checkpoint in {path}.",
        hint="Point --resume-from at a run's output folder or at one of its checkpoints/epoch_* folders.",
    )


def set_aside_newer(run: Path, checkpoint: Path, *, place: tuple[int, int]) -> list[Path]:
    """Rename a run's checkpoints that are newer than `checkpoint`, where it now goes on from; returns the new ones.

    `place`: the checkpoint's whole epochs, and its step within the next one or 0; its folder may be called anything by
    now. Another one of the same place counts as newer. They stay readable, but the next resume of the run does not take
    them for its newest.
    """
    aside = []
    for its_place, newer in _placed_in(run):
        if its_place < place or newer.samefile(checkpoint):
            continue
        numbers = (f"superseded_{newer.name}" + (f"_{n}" if n else "") for n in count())
        target = next(newer.with_name(name) for name in numbers if not newer.with_name(name).exists())
        move(newer, target)
        aside.append(target)
    return aside


def named_folder(path: Path) -> Path:
    """Return the folder that `--resume-from PATH` names: itself, or the one of a checkpoint's state file."""
    return path.parent if path.name == STATE_FILE and path.is_file() else path


def run_of(checkpoint: Path) -> Path:
    """Return the output folder of the run that a checkpoint folder belongs to; itself where it was copied out of it."""
    # As it was typed, else as it is: `epoch_10` or `.` say nothing of the folder above them.
    for known in (checkpoint, checkpoint.resolve()):
        # Other folders are called `checkpoints`, too: what lies above them is no run.
        if known.parent.name == CHECKPOINTS and (known.parent.parent / RUN_CONFIG).is_file():
            return known.parent.parent
    return checkpoint


def resumed_run(path: Path) -> Path:
    """Return the output folder of the run that `--resume-from PATH` goes on with."""
    folder = named_folder(path)
    return run_of(folder) if (folder / STATE_FILE).is_file() else folder


def is_of_run(path: Path, run: Path) -> bool:
    """Say whether `--resume-from PATH` goes on with the run in this folder."""
    return run.exists() and resumed_run(path).samefile(run)


def holds_adapter(folder: Path) -> bool:
    """Say whether an adapter was written into this folder."""
    return any((folder / file).is_file() for file in (LORA_CONFIG, LOKR_FILE, LOHA_FILE))


def final_of_run(path: Path) -> list[Path]:
    """Return the folder of the final adapter where `path` is the output folder of a run."""
    try:
        settings = json.loads((path / RUN_CONFIG).read_text(encoding="utf-8"))["settings"]
        return [path / PurePath(settings["run_name"]).name]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # No run of ours.


def check_adapter_folders(run: Path, name: str, *, goes_on: bool) -> None:
    """Raise ConfigError where an adapter called `name` would replace what is in the run's folder already.

    A run that `goes_on` may replace its adapter, and nothing else.
    """
    for folder in (run / f"{name}{ending}" for ending in ("", "_best", "_ema")):
        is_adapter = holds_adapter(folder)
        is_taken = any(folder.iterdir()) if folder.is_dir() else folder.exists() or folder.is_symlink()
        if is_taken and not (goes_on and is_adapter):
            what = "an adapter is there already" if is_adapter else "something else is there"
            raise ConfigError(
                f"{folder} cannot become the adapter's folder: {what}.",
                hint="Choose another --run-name or --output-dir.",
            )
