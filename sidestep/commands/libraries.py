"""Loads the large libraries without one that they would load and nothing here uses: seconds of every start."""

import gc
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from threading import Thread

from sidestep.errors import SidestepError

LOGGER = logging.getLogger(__name__)
FIRST = "sidestep.model.warm_up"  # And torch with it.
LIBRARIES = (
    "diffusers.models.transformers.ace_step_transformer",
    "diffusers.pipelines.ace_step.modeling_ace_step",
    "transformers.models.qwen3.modeling_qwen3",
    "peft.helpers",
    "peft.tuners.lora.model",
    "lycoris.modules",
)
# PEFT and LyCORIS load it, and with it all of torch's compiler, for layers of theirs that are not used here: see
# model/quantize.py.
UNUSED = "bitsandbytes"


def load_libraries(meanwhile: Callable[[], None] | None = None) -> None:
    """Import torch, transformers, diffusers, PEFT and LyCORIS, but not bitsandbytes with them.

    Call it before anything else imports them. bitsandbytes can be imported afterwards as ever. Once torch is there
    `meanwhile` is done in a thread, and is over when this returns: it prepares, and how it fails is only logged. It
    should import nothing beyond `FIRST`.
    """
    with _without_collecting():
        import_module(FIRST)
        with _beside(meanwhile), _hidden(UNUSED):
            for name in LIBRARIES:
                import_module(name)
            from peft import import_utils

            # Asked for again when an adapter is made; PEFT remembers the answer.
            import_utils.is_bnb_available()
            import_utils.is_bnb_4bit_available()


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Let nothing look for garbage among what stays: a quarter of the time here, and more later on."""
    is_first, was_enabled = LIBRARIES[-1] not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def _beside(work: Callable[[], None] | None) -> Iterator[None]:
    """Let a thread work while this context is open."""
    if work is None:
        yield
        return
    thread = Thread(target=_logged, args=(work,))
    thread.start()
    try:
        yield
    finally:
        thread.join()  # No process is forked while it works.


def _logged(work: Callable[[], None]) -> None:
    try:
        work()
    except (RuntimeError, SidestepError) as error:
        # It only prepares: what it could not do is done again in the open, where an error is one.
        LOGGER.info("Not prepared: %s", error)


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Let a package that is not loaded yet be missing for a while, as Python knows it: None in place of a module."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules[package]
