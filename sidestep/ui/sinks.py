"""Which sinks a run reports to, put together."""

import logging
from contextlib import AbstractContextManager

from sidestep.events import Emit, Event, Metrics, RunStarted
from sidestep.ui.console import Console
from sidestep.ui.plain import PlainLines, sentence
from sidestep.ui.progress import LiveScreen

logger = logging.getLogger(__name__)


def combine(*sinks: Emit) -> Emit:
    """One sink that passes each event to all of these, in this order."""

    def emit(event: Event) -> None:
        for sink in sinks:
            sink(event)

    return emit


def open_screen(console: Console) -> AbstractContextManager[Emit]:
    """The sink that shows a run on this console: a live view on a terminal, plain lines elsewhere."""
    return PlainLines(console) if console.is_plain else LiveScreen(console)


def write_log(event: Event) -> None:
    """A sink that keeps in `sidestep.log` what the user was told, next to the warnings of libraries."""
    match event:
        case RunStarted():
            facts = "; ".join(f"{label}: {value}" for label, value in event.facts.items())
            logger.info("%s %s; steps: %d to %d", event.recipe, facts, event.first_step, event.steps)
        case Metrics():
            logger.info("step %d: loss %.6f, grad norm %.6g", event.step, event.loss, event.grad_norm)
        case _:
            text = sentence(event)
            if text:
                logger.info("%s", text)
