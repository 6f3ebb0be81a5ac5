"""What this machine can train, as far as that is known without loading torch."""

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

PATIENCE = 5.0  # Seconds; a driver that is only waking up needs one or two.
QUERY = ("--query-gpu=name,memory.total", "--format=csv,noheader,nounits")

# The least memory in GB and the preset meant for it, the largest first.
PRESETS_BY_MEMORY = (
    (24, "vram_24gb_plus"), (16, "vram_16gb"), (12, "vram_12gb"), (10, "vram_10gb"), (8, "vram_8gb"), (6, "vram_6gb"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Gpu:
    """A graphics card: its name and its memory in GB, as it is sold (24 for a card of 24564 MiB)."""

    name: str
    memory_gb: int

    @property
    def preset(self) -> str:
        """The shipped preset that is meant for this much memory; nothing below the smallest."""
        return next((name for least, name in PRESETS_BY_MEMORY if self.memory_gb >= least), "")

    def __str__(self) -> str:
        return f"{self.name}, {self.memory_gb} GB"


def find_gpus(run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run) -> list[Gpu]:
    """The NVIDIA cards that the driver's own tool lists, in its order; none where it is missing or does not answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        result = run([tool, *QUERY], capture_output=True, text=True, timeout=PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):  # No driver behind the tool: nothing is known, and nothing is said.
        return []
    return [gpu for line in result.stdout.splitlines() if (gpu := _read(line))]


def _read(line: str) -> Gpu | None:
    name, _, memory = line.rpartition(",")
    memory = memory.strip()
    return Gpu(name.strip(), round(int(memory) / 1024)) if name and memory.isdigit() else None
