"""What is sung in samples: prompts from a file, or from the songs that are trained on. Loads no torch."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sidestep.config.adapter_tasks import SampleConfig
from sidestep.config.settings import settings_of
from sidestep.data.fields import INSTRUMENTAL, UNKNOWN_LANGUAGE, parse_keyscale, parse_language, parse_timesignature
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
    except OSError as error:
        raise DataError(f"The prompts in {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"The prompts in {path} are not UTF-8 text.", hint="Save the file again with the encoding UTF-8."
        ) from error
    if path.suffix.lower() != ".json":
        prompts = [SamplePrompt(caption=line.strip()) for line in text.splitlines() if line.strip()]
    else:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not valid JSON: {error}.") from error
        entries = content if isinstance(content, list) else [content]
        prompts = [_prompt(path, number, entry) for number, entry in enumerate(entries, start=1)]
    if not prompts:
        raise DataError(f"{path} holds no prompts.", hint="A text file has one caption a line.")
    return prompts


def _prompt(path: Path, number: int, entry: object) -> SamplePrompt:
    where = f"Prompt {number} of {path}"
    values = {"caption": entry} if isinstance(entry, str) else entry
    if not isinstance(values, dict):
        raise DataError(f"{where} is neither text nor an object.")
    unknown = sorted(set(values) - set(_READ))
    if unknown:
        raise DataError(f"{where} has no field {unknown[0]!r}.", hint=f"Fields are {', '.join(sorted(_READ))}.")
    if not values.get("caption"):
        raise DataError(f"{where} needs a caption.")
    try:
        return prompt_of_words(values)
    except ValueError as error:
        raise DataError(f"{where}: {error}.") from error


def prompt_of_words(values: Mapping[str, object]) -> SamplePrompt:
    """Return the prompt that somebody wrote, keys and signatures in the model's words; ValueError says the rule."""
    return SamplePrompt(**{name: _READ[name](name, value) for name, value in values.items() if value is not None})


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} cannot be {value!r}, it is text")
    if name == "caption" and not value.strip():
        raise ValueError("a caption cannot be blank")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half a character ({value!r})") from None
    return value


def _music(name: str, value: object) -> str:
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise ValueError(f"{name} cannot be {value!r}, it is text")
    return _MUSIC[name](_text(name, str(value)))


def _number(name: str, value: object) -> int | float:
    setting = _NUMBERS[name]
    assert setting.within is not None
    kinds = (int,) if setting.kind is int else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not setting.within.contains(value):
        raise ValueError(f"{name} cannot be {value!r}, it is {setting.rule}")
    return value


_MUSIC = {"language": parse_language, "keyscale": parse_keyscale, "timesignature": parse_timesignature}
_NUMBERS = {s.name: s for s in settings_of(SampleConfig) if s.name in ("bpm", "duration", "seed")}
_READ: Mapping[str, Callable[[str, object], Any]] = {
    "caption": _text,
    "lyrics": _text,
    **dict.fromkeys(_MUSIC, _music),
    **dict.fromkeys(_NUMBERS, _number),
}


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
