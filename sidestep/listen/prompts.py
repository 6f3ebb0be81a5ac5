"""What is sung in samples: prompts from a file, or from the songs that are trained on. Loads no torch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sidestep.data.fields import INSTRUMENTAL, UNKNOWN_LANGUAGE
from sidestep.errors import DataError

_CAPTION_MARK, _AFTER_CAPTION = "# Caption\n", "\n\n# Metas\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePrompt:
    """One prompt: what the model is told, the seed of its noise and the length in seconds (None: as set elsewhere)."""

    caption: str
    lyrics: str = INSTRUMENTAL
    language: str = UNKNOWN_LANGUAGE
    bpm: int | None = None
    keyscale: str = ""
    timesignature: str = ""
    duration: float | None = None
    seed: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON knows them."""
        return asdict(self)


def read_prompts(path: Path) -> list[SamplePrompt]:
    """Read a prompt file: JSON, a list of objects with the fields of `SamplePrompt`; or text, a caption a line.

    DataError when it cannot be read, is empty, or holds what no prompt has.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The prompts in {path} cannot be read: {error}.") from error
    if path.suffix.lower() != ".json":
        prompts = [SamplePrompt(caption=line.strip()) for line in text.splitlines() if line.strip()]
    else:
        try:
            content = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path} is not valid JSON: {error}.") from error
        entries = content if isinstance(content, list) else [content]
        prompts = [_prompt(path, number, entry) for number, entry in enumerate(entries, start=1)]
    if not prompts:
        raise DataError(f"{path} holds no prompts.", hint="A text file has one caption a line.")
    return prompts


def _prompt(path: Path, number: int, entry: object) -> SamplePrompt:
    where = f"Prompt {number} of {path}"
    if isinstance(entry, str):
        return SamplePrompt(caption=entry)
    if not isinstance(entry, dict):
        raise DataError(f"{where} is neither text nor an object.")
    names = {field.name for field in fields(SamplePrompt)}
    unknown = sorted(set(entry) - names)
    if unknown:
        raise DataError(f"{where} has no field {unknown[0]!r}.", hint=f"Fields are {', '.join(sorted(names))}.")
    values = {name: value for name, value in entry.items() if value is not None}
    for name, value in values.items():
        wanted = {"bpm": int, "seed": int, "duration": (int, float)}.get(name, str)
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise DataError(f"{where}: {name} cannot be {value!r}.")
    if values.get("duration", 1) <= 0 or values.get("seed", 0) < 0 or "caption" not in values:
        raise DataError(f"{where} needs a caption; a duration is above 0 and a seed not below.")
    return SamplePrompt(**values)


def prompt_of_song(metadata: Mapping[str, Any]) -> SamplePrompt:
    """Return the prompt of a song as it is trained, from what its tensor file says of it (its length left out)."""
    text = str(metadata.get("prompt", ""))
    if _CAPTION_MARK in text and _AFTER_CAPTION in text:
        caption = text.split(_CAPTION_MARK, 1)[1].rsplit(_AFTER_CAPTION, 1)[0]
    else:
        caption = str(metadata.get("caption", ""))
    bpm = metadata.get("bpm")
    return SamplePrompt(
        caption=caption,
        lyrics=str(metadata.get("lyrics") or INSTRUMENTAL),
        language=str(metadata.get("language") or UNKNOWN_LANGUAGE),
        bpm=bpm if isinstance(bpm, int) else None,
        keyscale=str(metadata.get("keyscale") or ""),
        timesignature=str(metadata.get("timesignature") or ""),
    )


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` places among `count`, spread evenly, the first one always."""
    return [count * place // wanted for place in range(wanted)] if count > wanted else list(range(count))
