"""`doctor`: what is there to train with, and what ails; each line with a way out, from the plainest thing up."""

import importlib
import os
from collections.abc import Iterator
from pathlib import Path

from sidestep.config.tasks import DoctorConfig
from sidestep.doctor.finding import Finding
from sidestep.doctor.folders import models, output
from sidestep.doctor.machine import SYNC, processes, sound, versions
from sidestep.ui.console import Console
from sidestep.ui.machine import find_gpus
from sidestep.ui.problems import log_traceback, quiet_libraries

EXIT_PROBLEM = 1
STYLES = {"ok": "green", "note": "", "problem": "red"}
LEVEL, ABOUT = 9, 11  # Cells of the first two columns.
AMD_DRIVER = Path("/dev/kfd")


def run(config: DoctorConfig, *, console: Console) -> int:
    """Examine and print, line by line as it goes; returns 0 when training can work here, else 1."""
    quiet_libraries()
    problems = 0
    for finding in _examine(config):
        _show(finding, console)
        problems += finding.level == "problem"
    console.print()
    if problems:
        console.print(f"{problems} problem{'s' if problems > 1 else ''} to mend before training can work here.")
        return EXIT_PROBLEM
    console.print("Training can work here.")
    return 0


def _examine(config: DoctorConfig) -> Iterator[Finding]:
    yield from versions()
    yield sound()
    yield processes()
    yield output(config.output_dir)
    yield from models(config.checkpoint_dir, config.model_variant)
    try:
        # By its name: whatever the import of torch and of what builds on it raises belongs into the report.
        compute = importlib.import_module("sidestep.doctor.compute")
    except Exception as error:
        log_traceback(error)
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        yield Finding("torch", f"torch, or what builds on it, cannot be loaded: {reason}", "problem", _how_to_load())
        return
    gpus = [str(gpu) for gpu in find_gpus()]
    yield compute.build(gpus, has_amd_driver=AMD_DRIVER.exists(), wants_cpu=config.device == "cpu")
    yield from compute.devices()
    yield from compute.training(config.device)


def _how_to_load() -> str:
    if os.name == "nt":
        return f"{SYNC} If it stays, install Microsoft's Visual C++ Redistributable."
    return f"{SYNC} If it stays, delete the folder .venv first."


def _show(finding: Finding, console: Console) -> None:
    """Print a finding, its text under itself where it is wrapped, and the way out below."""
    first, *rest = console.wrapped(finding.text, indent=LEVEL + ABOUT)
    way_out = console.way_out(finding.way_out, indent=LEVEL + ABOUT + 3)
    rest += [f"-> {line}" if not at else line for at, line in enumerate(way_out)]
    head = f"{finding.level:{LEVEL}}{finding.about:{ABOUT}}"
    lines = [f"{head}{first}", *(" " * (LEVEL + ABOUT) + line for line in rest)]
    console.print("\n".join(lines), style=STYLES[finding.level], wrap=False)
