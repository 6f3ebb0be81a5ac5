"""Tables of settings for people to check before a run."""

from collections.abc import Mapping, Sequence

from sidestep.ui.console import Console

CHANGED = "*"


def review(
    console: Console, groups: Mapping[str, Sequence[tuple[str, str, bool]]], *, base: str = "the default"
) -> None:
    """Print settings by group; each is a name, its value, and whether it differs from `base` (marked "*")."""
    for title, settings in groups.items():
        if settings:
            console.table(title, [(name, value, CHANGED if differs else "") for name, value, differs in settings])
    if any(differs for settings in groups.values() for _, _, differs in settings):
        console.print()
        console.print(f"{CHANGED} differs from {base}", style="dim")
