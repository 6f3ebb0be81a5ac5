"""How the learning rate goes over a run: pure functions of the step, so that nothing has to be restored on resume."""

import math
from collections.abc import Callable

WARMUP_START = 0.1  # The warm-up begins at this share of the learning rate.
RESTARTS = 4  # Cycles of `cosine_restarts`.

# A schedule maps progress after the warm-up, 0 <= p < 1, to a share of the learning rate.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
    "cosine_restarts": lambda p: 0.5 * (1 + math.cos(math.pi * ((p * RESTARTS) % 1.0))),
    "linear": lambda p: 1 - p,
    "constant": lambda p: 1.0,
    "constant_with_warmup": lambda p: 1.0,
}


def lr_factor(step: int, *, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """Return the share of the learning rate for optimizer step `step` (from 0) of `total_steps`.

    The warm-up rises linearly from 10 % at step 0 to 100 % at step `warmup_steps`; `constant` has none.
    """
    warmup = 0 if schedule == "constant" else warmup_steps
    if step < warmup:
        return WARMUP_START + (1 - WARMUP_START) * step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return SCHEDULES[schedule](min(progress, 1.0))
