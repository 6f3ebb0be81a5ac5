"""Whether the installed torch is one for this machine's GPU, and how to get the one that is."""

import os

from sidestep.errors import RunError
from sidestep.ui.console import Console
from sidestep.ui.machine import find_gpus

INSTALLER = "install_windows.bat" if os.name == "nt" else "./install.sh"


def torch_is_missing() -> RunError:
    """Return the error for a Python without torch, as `uv run` makes it on Windows before the installer ran."""
    return RunError(
        "torch is not installed here.",
        hint=f"Run {INSTALLER} in Side-Step's folder: it installs the torch that fits this machine's GPU.",
    )


def warn_of_idle_gpu(device: str, console: Console) -> None:
    """Say so when `--device auto` comes to the CPU although there is an NVIDIA GPU; loads torch."""
    import torch

    if device != "auto" or torch.cuda.is_available():
        return
    gpus = find_gpus()
    if not gpus:
        return
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} has no CUDA"
    else:
        why = f"its driver is too old for torch {torch.__version__}, or CUDA_VISIBLE_DEVICES hides it"
    console.warning(
        f"The GPU ({gpus[0]}) cannot be used: {why}. This will be very slow. "
        f"{INSTALLER} in Side-Step's folder installs the torch that fits."
    )
