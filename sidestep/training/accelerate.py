"""How fast a run may go here: whether passes are captured as CUDA graphs, and whether blocks are compiled.

Neither changes what is computed. What cannot be had is said in one line, and training goes on the plain way.
"""

import importlib.util
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.amp.grad_scaler import GradScaler
from torch.nn import Parameter

from sidestep.config.train import TrainConfig
from sidestep.errors import ConfigError
from sidestep.events import Emit, Notice
from sidestep.model.attention import blocks_of
from sidestep.model.capabilities import capabilities, check_training, those_with
from sidestep.model.device import choose_dtype, generation
from sidestep.training.passes import CapturedPasses, EagerPasses, Model, Passes

# Compiling takes about so many seconds, and then saves so many milliseconds a pass for each second of music (twice as
# many where blocks are recomputed) on an H100 (benchmarks/step.py: 26 at 60 s, 73 at 240 s); more on smaller cards.
COMPILE_SECONDS, SAVED_MS = 40, 0.35
USUAL_KINDS = 2  # Blocks with a window and blocks without; where ranks differ, there are more.
# Times the kinds of block, in case lengths or modes add some; torch goes back to eager beyond the limit.
COMPILATIONS = 8


def can_capture(device: torch.device) -> bool:
    """Say whether passes can be graphs: on CUDA and ROCm."""
    return capabilities(device).captures


def why_not_compile(device: torch.device) -> str:
    """Return what keeps blocks from being compiled on this machine; nothing when they can be."""
    able = capabilities(device)
    if able.compiles == "never":
        names = those_with(lambda each: each.compiles != "never")
        return f"compiled blocks need {names}, and this runs on {able.name}"
    if able.compiles == "itself" and generation(device) < (7, 0):
        return "this GPU is too old for Triton"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if sys.platform != "win32" and not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        return "Triton needs a C compiler (gcc)"
    if sys.platform != "win32" and not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "Triton needs Python's headers (python3-dev)"
    return ""


def check_device(config: TrainConfig, device: torch.device) -> None:
    """Raise ConfigError for what the device cannot do of these settings, before anything is loaded."""
    choose_dtype(config.precision, device)
    check_training(optimizer_type=config.optimizer_type, quantize=config.quantize, device=device)
    if config.compile:
        _check_compile(device)


def wants_compile(
    asked: bool | None, device: torch.device, *, music_seconds: float, recomputed: float, kinds: int, emit: Emit
) -> bool:
    """Decide on compiling: as asked, else where it can be had and the run is long enough to get its time back.

    `music_seconds` are those of all passes that are left together, `recomputed` the share of blocks that are, `kinds`
    how many different blocks are to be compiled.

    ConfigError when it was asked for and cannot be had.
    """
    if asked:
        _check_compile(device)
    if asked is None and capabilities(device).compiles == "itself":
        reason = why_not_compile(device)
        if reason:
            emit(Notice(text=f"Blocks are not compiled ({reason}): training is the same, and slower."))
        cost = COMPILE_SECONDS * kinds / USUAL_KINDS
        return not reason and music_seconds * SAVED_MS / 1000 * (1 + recomputed) >= cost
    return bool(asked)


def _check_compile(device: torch.device) -> None:
    reason = why_not_compile(device)
    if reason:
        raise ConfigError(f"--compile cannot be had here: {reason}.", hint="Leave it out; the numbers are the same.")


def make_passes(model: Model, parameters: Sequence[Parameter], scaler: GradScaler) -> Passes:
    """Return captured passes where there can be any, else eager ones."""
    if can_capture(model.device) and model.sharded is None:
        return CapturedPasses(model=model, parameters=parameters, scaler=scaler)
    return EagerPasses(model=model, scaler=scaler)


def compile_blocks(model: Model, *, any_length: bool) -> None:
    """Have the decoder's blocks compiled at their first use; `any_length` when a run has several lengths."""
    torch._dynamo.config.recompile_limit = COMPILATIONS * model.kinds
    if model.sharded is None:
        model.compiled_blocks = [torch.compile(block) for block in model.blocks]
    else:
        # What gathers a block's weights and lets them go stands before and after its forward, and is not compiled.
        blocks = blocks_of(model.decoder)
        for block in blocks:
            block.forward = torch.compile(block.forward)
        model.compiled_blocks = blocks
    model.any_length = any_length
