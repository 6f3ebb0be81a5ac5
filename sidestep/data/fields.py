"""The metadata fields of a track: their names as people write them, and their values as the model was trained on them.

Vocabularies: the language codes, keys, time signatures and tempo range of ACE-Step 1.5.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

INSTRUMENTAL = "[Instrumental]"
UNKNOWN_LANGUAGE = "unknown"
BPM_RANGE = (30, 300)
TIME_SIGNATURES = ("2", "3", "4", "6")
NOTHING = frozenset({"", "n/a", "none", "null", "nan", "-"})

LANGUAGES: Mapping[str, str] = {
    "ar": "arabic", "az": "azerbaijani", "bg": "bulgarian", "bn": "bengali", "ca": "catalan", "cs": "czech",
    "da": "danish", "de": "german", "el": "greek", "en": "english", "es": "spanish", "fa": "persian", "fi": "finnish",
    "fr": "french", "he": "hebrew", "hi": "hindi", "hr": "croatian", "ht": "haitian creole", "hu": "hungarian",
    "id": "indonesian", "is": "icelandic", "it": "italian", "ja": "japanese", "ko": "korean", "la": "latin",
    "lt": "lithuanian", "ms": "malay", "ne": "nepali", "nl": "dutch", "no": "norwegian", "pa": "punjabi",
    "pl": "polish", "pt": "portuguese", "ro": "romanian", "ru": "russian", "sa": "sanskrit", "sk": "slovak",
    "sr": "serbian", "sv": "swedish", "sw": "swahili", "ta": "tamil", "te": "telugu", "th": "thai", "tl": "tagalog",
    "tr": "turkish", "uk": "ukrainian", "ur": "urdu", "vi": "vietnamese", "yue": "cantonese", "zh": "chinese",
}  # fmt: skip
_CODES = {name: code for code, name in LANGUAGES.items()}

_ALIASES: Mapping[str, str] = {
    "caption": "caption", "genre": "genre", "tags": "genre", "lyrics": "lyrics",
    "bpm": "bpm", "tempo": "bpm", "key": "keyscale", "keyscale": "keyscale", "scale": "keyscale",
    "signature": "timesignature", "timesignature": "timesignature", "sig": "timesignature",
    "language": "language", "lang": "language", "is_instrumental": "is_instrumental",
    "custom_tag": "custom_tag", "trigger": "custom_tag", "prompt_override": "prompt_override",
    "repeat": "repeat", "repeats": "repeat", "duration": "duration",
}  # fmt: skip

_FIELDS = {alias.replace("_", ""): field for alias, field in _ALIASES.items()}
_KEY = re.compile(r"([A-Ga-g])\s*(#|b|♯|♭|sharp|flat)?\s*[-_ ]?\s*(major|minor|maj|min|m|M)?", re.ASCII)
_DECIMAL_COMMA = re.compile(r"^([0-9]+),([0-9]{1,2})$")
_SIGNATURE = re.compile(r"(\d+)\s*(?:/\s*\d+)?")


def field_named(name: str) -> str | None:
    """Return the field that a name stands for ("Tags", "Time Signature", "key-scale"), None where there is none."""
    return _FIELDS.get(re.sub(r"[\s_-]", "", name).lower())


def parse_text(value: object) -> str:
    """Return text, or a list of texts joined with commas; empty for None."""
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(parse_text(item) for item in value)
    if isinstance(value, str | int | float):
        return str(value).strip()
    raise ValueError(f"{value!r} is not text")


def parse_bpm(value: object) -> int | None:
    """Return beats a minute as a whole number, None when none is given; ValueError for what is no number."""
    text = parse_text(value)
    if text.lower() in NOTHING:
        return None
    try:
        bpm = float(_DECIMAL_COMMA.sub(r"\1.\2", text.lower().removesuffix("bpm").strip()))
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
    if not math.isfinite(bpm) or bpm < 0:
        raise ValueError(f"{text!r} is not a tempo")
    return round(bpm) or None


def parse_keyscale(value: object) -> str:
    """Return a key as the model knows it ("Am", "a min" become "A minor", "F#" "F# major"); others stay as written."""
    text = parse_text(value)
    if text.lower() in NOTHING:
        return ""
    match = _KEY.fullmatch(text) or _KEY.fullmatch(text.lower())
    if match is None:
        return text
    note, accidental, mode = match.groups()
    accidental = {"sharp": "#", "flat": "b", None: ""}.get(accidental, accidental)
    is_minor = mode is not None and mode != "M" and not mode.startswith("maj")
    return f"{note.upper()}{accidental} {'minor' if is_minor else 'major'}"


def is_known_keyscale(text: str) -> bool:
    """Say whether the model was trained on this key."""
    return re.fullmatch(r"[A-G][#b♯♭]? (major|minor)", text) is not None


def parse_timesignature(value: object) -> str:
    """Return the beats of a bar, as the model knows them ("4/4" becomes "4", "6/8" "6"); others stay as written."""
    text = parse_text(value)
    if text.lower() in NOTHING:
        return ""
    match = _SIGNATURE.fullmatch(text)
    return match[1] if match and match[1] in TIME_SIGNATURES else text


def parse_language(value: object) -> str:
    """Return a language code ("English", "EN" and "en-US" become "en"); unknown ones stay as written, in lower case."""
    text = parse_text(value).lower()
    if text in NOTHING or text in (UNKNOWN_LANGUAGE, "instrumental"):
        return UNKNOWN_LANGUAGE
    base = re.split(r"[-_]", text)[0]
    return _CODES.get(text) or (base if base in LANGUAGES else text)


def parse_flag(value: object) -> bool:
    """Return yes or no; ValueError for anything else."""
    text = parse_text(value).lower()
    if text in ("true", "yes", "1", "on"):
        return True
    if text in ("false", "no", "0", "off"):
        return False
    raise ValueError(f"{text!r} is neither true nor false")


def parse_override(value: object) -> str | None:
    """Return "caption" or "genre", None when nothing is given; ValueError for anything else."""
    text = parse_text(value).lower()
    if text in NOTHING:
        return None
    if text not in ("caption", "genre"):
        raise ValueError(f"{text!r} is neither caption nor genre")
    return text


def parse_repeat(value: object) -> int:
    """Return how often a track is seen in an epoch, at least 1; ValueError for anything else."""
    text = parse_text(value)
    if not re.fullmatch(r"[0-9]+(\.0+)?", text) or float(text) < 1:
        raise ValueError(f"{text!r} is not a whole number from 1 on")
    return int(float(text))


def parse_duration(value: object) -> int:
    """Return whole seconds, rounded down; 0 when nothing is given, ValueError for what is no number."""
    text = parse_text(value)
    if text.lower() in NOTHING:
        return 0
    try:
        seconds = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"{text!r} is not a length in seconds")
    return int(seconds)


PARSERS: Mapping[str, Callable[[object], Any]] = {
    "caption": parse_text, "genre": parse_text, "lyrics": parse_text, "bpm": parse_bpm, "keyscale": parse_keyscale,
    "timesignature": parse_timesignature, "language": parse_language, "is_instrumental": parse_flag,
    "custom_tag": parse_text, "prompt_override": parse_override, "repeat": parse_repeat, "duration": parse_duration,
}  # fmt: skip


def canonical(raw: Mapping[str, object]) -> dict[str, object]:
    """Keep what is a field and not empty, under the field's own name; a field's own name beats an alias of it."""
    found: dict[str, object] = {}
    for name, value in raw.items():
        field = field_named(name)
        is_empty = value is None or (isinstance(value, str) and not value.strip())
        if field is not None and not is_empty and (field not in found or name == field):
            found[field] = value
    return found


def parse_fields(raw: Mapping[str, object]) -> tuple[dict[str, Any], list[str]]:
    """Turn raw values into the fields of a track, and say in sentences what could not be understood (and is left out).

    `raw` has the fields' own names. Lyrics and the instrumental flag complete each other: without lyrics the text is
    `[Instrumental]`; without a flag a track is instrumental when its language says so or it has no lyrics.
    """
    fields: dict[str, Any] = {}
    remarks: list[str] = []
    for name, value in raw.items():
        if value is None or value == "":
            continue
        try:
            fields[name] = PARSERS[name](value)
        except ValueError as error:
            remarks.append(f"{name}: {error}")
    fields["lyrics"] = fields.get("lyrics") or INSTRUMENTAL
    if "is_instrumental" not in fields:
        says_so = str(raw.get("language")).strip().lower() == "instrumental"
        fields["is_instrumental"] = says_so or not has_words(fields["lyrics"])
    return fields, remarks


def has_words(lyrics: str) -> bool:
    """Say whether there is something to sing."""
    return lyrics.strip().casefold() not in ("", INSTRUMENTAL.casefold())
