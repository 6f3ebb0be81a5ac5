"""Which model a command works on, when that need not be typed."""

from pathlib import Path

from sidestep.config.places import default_checkpoint_dir
from sidestep.exports.find import origin_of
from sidestep.model.checkpoint import Checkpoint, find_checkpoint

_DEFAULT_VARIANT = "turbo"


def chosen_checkpoint(
    root: Path | None, variant: str | None, base_model: str | None, *, adapter: Path | None
) -> Checkpoint:
    """Return the model that was asked for, else the one an adapter's file says it was trained on, else turbo."""
    stated = origin_of(adapter).get("model_variant") if adapter else None
    chosen = variant or (stated if isinstance(stated, str) else _DEFAULT_VARIANT)
    return find_checkpoint(root or default_checkpoint_dir(), chosen, base_model=base_model)
