"""The settings of the commands that do not train."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sidestep.config.settings import Range, option


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildDatasetConfig:
    """What `build-dataset` needs to know."""

    input: Path = option("Folder with the songs; searched recursively.", group="Dataset", ask="basic")
    output: Path | None = option(
        "The dataset file to write.", group="Dataset", default=None, shown_default="{input}/dataset.json"
    )
    name: str = option("Name of the dataset.", group="Dataset", default="", shown_default="the folder's name")
    tag: str = option(
        "A word that stands for this music in every prompt (a trigger word).",
        group="Dataset",
        default="",
        ask="basic",
        shown_default="none",
    )
    tag_position: Literal["prepend", "append", "replace"] = option(
        "Where the tag stands: before the caption, after it, or in its place.", group="Dataset", default="prepend"
    )
    genre_ratio: int = option(
        "Percentage of the songs that are trained with their genre in place of their caption.",
        group="Dataset",
        default=0,
        within=Range(at_least=0, at_most=100),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """What `demo` needs to know."""

    folder: Path = option(
        "Where the demo puts its toy checkpoint, songs and results.", group="Demo", default=Path("demo")
    )
