"""Read what lies beside an audio file: caption, lyrics and metadata, in the two conventions people use.

Official ACE-Step: `song.caption.txt`, `song.lyrics.txt`, `song.json`, any `*.csv` in the dataset's folder with a `file`
column; a bare `song.txt` is lyrics. Side-Step: `song.txt` holds `key: value` lines. Which of the two a `song.txt` is,
its first line decides: a field's name and a colon, or not.

For each field the later source wins, and a remark says so when two disagree: `song.txt`, then `song.caption.txt` and
`song.lyrics.txt`, then `song.json`, then the CSV.
"""

import codecs
import csv
import io
import json
import re
import unicodedata
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidestep.data.fields import canonical, field_named, has_words
from sidestep.errors import DataError

ENDINGS = (".caption.txt", ".lyrics.txt", ".json", ".txt")
REPAIR = "Correct it in a text editor, or make it again."
FILE_COLUMNS = ("file", "filename", "file_name")
# Fields that may go over several lines of a `song.txt`.
LONG_FIELDS = ("caption", "genre", "lyrics")
_KEY_LINE = re.compile(r"\s*([A-Za-z][A-Za-z\s_-]*):(.*)")
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))

Fields = dict[str, object]
Companions = Mapping[tuple[str, str], Path]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a CSV: the song it speaks of as written there, and its fields."""

    source: str
    file: str
    fields: Mapping[str, object]


def normalized(name: str) -> str:
    """Return a name in Unicode's composed form: macOS writes an é as two characters, other systems as one."""
    return unicodedata.normalize("NFC", name)


def read_text(path: Path) -> str:
    """Read a text file as UTF-8, with or without BOM (UTF-16 with its BOM as well), line ends as `\\n`, stripped.

    Raises DataError naming the file when it is in another encoding: guessing one would train on garbled words.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path.name} cannot be read: {error.strerror}.") from error
    encoding = next((name for mark, name in _BOMS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, f"the byte 0x{data[error.start]:02x} at position {error.start}") from error
    if "\0" in text:
        raise _not_utf8(path, "a zero byte")
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def read_json(path: Path) -> Any:
    """Read a JSON file, an empty one as `{}`. Raises DataError naming the file when it is no JSON, or no text in it."""
    try:
        content = json.loads(read_text(path) or "{}")
        json.dumps(content, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise DataError(f"{path.name} is not valid JSON: {error.msg} in line {error.lineno}.", hint=REPAIR) from error
    except RecursionError as error:
        raise DataError(f"{path.name} is not usable: it is nested too deeply.", hint=REPAIR) from error
    except ValueError as error:  # Half of a surrogate pair, or a number of thousands of digits.
        raise DataError(f"{path.name} is not usable: {error}.", hint=REPAIR) from error
    return content


def companions(files: Iterable[Path]) -> Companions:
    """Index the sidecars among the files of one folder by the song's name (as written, and composed) and ending."""
    found: dict[tuple[str, str], Path] = {}
    parts = [(path, *_stem_and_ending(path.name)) for path in files]
    for normalize in (str, normalized):
        for path, stem, ending in parts:
            if ending:
                found.setdefault((normalize(stem), ending), path)
    return found


def is_sidecar(name: str, stems: Container[str]) -> bool:
    """Say whether a file of this name belongs to one of the songs, given by their names without suffix."""
    stem, ending = _stem_and_ending(name)
    return bool(ending) and stem in stems


def read_sidecars(audio: Path, beside: Companions, rows: Sequence[Row]) -> tuple[Fields, list[str]]:
    """Merge the sidecars of `audio` into raw fields; the second value says in sentences what is odd about them.

    Raises DataError naming the sidecar that cannot be read.
    """
    paths = {ending: _companion(audio.stem, ending, beside) for ending in ENDINGS}
    remarks: list[str] = []
    sources: list[tuple[str, Mapping[str, object]]] = []
    if path := paths[".txt"]:
        fields, odd = read_fields_or_lyrics(read_text(path))
        if _looks_like_caption(fields, paths):
            remarks.append(f"{path.name} is read as lyrics; if it is a caption, name it {audio.stem}.caption.txt")
        remarks += [f"{path.name}: {sentence}" for sentence in odd]
        sources.append((path.name, fields))
    for field in ("caption", "lyrics"):
        if path := paths[f".{field}.txt"]:
            sources.append((path.name, {field: read_text(path)}))
    if path := paths[".json"]:
        sources.append((path.name, _read_fields(path)))
    sources += [(row.source, row.fields) for row in rows]
    return _merge(sources, remarks), remarks


def is_field_file(text: str) -> bool:
    """Say whether a `song.txt` holds `key: value` lines: its first line that is neither blank nor a comment decides."""
    first = next((line for line in text.split("\n") if line.strip() and not line.lstrip().startswith("#")), "")
    match = _KEY_LINE.match(first)
    return match is not None and field_named(match[1]) is not None


def read_fields_or_lyrics(text: str) -> tuple[Fields, list[str]]:
    """Read a `song.txt`: its `key: value` lines, or all of it as lyrics. The second value names lines that fit nowhere.

    Lines that begin no field continue the caption or genre above them; from `lyrics:` on everything is lyrics; lines
    that begin with `#` are comments until then.
    """
    if not is_field_file(text):
        return ({"lyrics": text} if text else {}), []
    values: dict[str, list[str]] = {}
    remarks: list[str] = []
    current = ""
    lines = iter(text.split("\n"))
    for line in lines:
        match = _KEY_LINE.match(line)
        if match and (field := field_named(match[1])):
            current = field
            if current == "lyrics":
                values[current] = [match[2].strip(), *lines]
            elif match[2].strip() or current not in values:
                values[current] = [match[2].strip()]
        elif line.lstrip().startswith("#"):
            continue
        elif current in LONG_FIELDS:
            values[current].append(line.rstrip())
        elif line.strip():
            remarks.append(f"the line {line.strip()!r} belongs to no field and is left out")
    return {name: "\n".join(parts).strip() for name, parts in values.items()}, remarks


def read_rows(folder: Path) -> tuple[list[Row], list[str]]:
    """Read the rows of every CSV directly in `folder` that has a `file` column; delimiters: comma, semicolon, tab.

    The second value names those that have fields of songs but no such column. Raises DataError naming a CSV that is not
    UTF-8.
    """
    rows: list[Row] = []
    remarks: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() != ".csv" or path.name.startswith(".") or not path.is_file():
            continue
        text = read_text(path)
        delimiter = max(",;\t", key=text.split("\n", 1)[0].count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        header = [name.strip().lower() for name in next(reader, [])]
        column = next((name for name in FILE_COLUMNS if name in header), None)
        if column is None:
            fields = [name for name in header if field_named(name)]
            if fields:
                remarks.append(f"{path.name} is left out: it has {', '.join(fields)}, but no column named file")
            continue
        for values in reader:
            cells = dict(zip(header, (value.strip() for value in values), strict=False))
            if file := cells.get(column, ""):
                rows.append(Row(path.name, file.replace("\\", "/"), canonical(cells)))
    return rows, remarks


def assign_rows(rows: Sequence[Row], names: Sequence[str]) -> tuple[dict[str, list[Row]], list[str]]:
    """Give each CSV row to the song it names, by path relative to the folder, else by file name alone.

    A song may have rows in several files. `names` are relative posix paths. The second value says which rows fit no
    song or several of one name.
    """
    by_path = {normalized(name): name for name in names}
    by_file: dict[str, list[str]] = {}
    for name in names:
        by_file.setdefault(normalized(name).rsplit("/", 1)[-1], []).append(name)
    given: dict[str, list[Row]] = {}
    remarks: list[str] = []
    for row in rows:
        file = normalized(row.file).removeprefix("./")
        found = [by_path[file]] if file in by_path else by_file.get(file.rsplit("/", 1)[-1], [])
        if len(found) == 1:
            given.setdefault(found[0], []).append(row)
        elif found:
            remarks.append(f"{row.source}: {row.file} may be any of {', '.join(found)}; write the path with its folder")
        else:
            remarks.append(f"{row.source}: there is no song {row.file}")
    return given, remarks


def _stem_and_ending(name: str) -> tuple[str, str]:
    """Split a sidecar's name into the song's name and its ending; the ending of other files is empty."""
    ending = next((ending for ending in ENDINGS if name.lower().endswith(ending)), "")
    return name[: len(name) - len(ending)], ending


def _not_utf8(path: Path, what: str) -> DataError:
    return DataError(f"{path.name} is not UTF-8 text ({what}).", hint="Save it again with the encoding UTF-8.")


def _companion(stem: str, ending: str, beside: Companions) -> Path | None:
    return beside.get((stem, ending)) or beside.get((normalized(stem), ending))


def _looks_like_caption(fields: Fields, paths: Mapping[str, Path | None]) -> bool:
    """One line and nothing else: other trainers keep captions in such a file."""
    is_alone = not (paths[".caption.txt"] or paths[".lyrics.txt"])
    return (
        set(fields) == {"lyrics"}
        and is_alone
        and "\n" not in str(fields["lyrics"])
        and has_words(str(fields["lyrics"]))
    )


def _read_fields(path: Path) -> Fields:
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f'{path.name} must hold an object like {{"caption": "...", "bpm": 120}}.', hint=REPAIR)
    if "samples" in content:  # a dataset.json that happens to lie beside a dataset.wav
        return {}
    return canonical(content)


def _merge(sources: Sequence[tuple[str, Mapping[str, object]]], remarks: list[str]) -> Fields:
    merged: Fields = {}
    origin: dict[str, str] = {}
    for source, fields in sources:
        for name, value in fields.items():
            if value is None or value == "":
                continue
            if name in merged and str(merged[name]).strip() != str(value).strip():
                remarks.append(f"{origin[name]} and {source} differ in {name}; {source} is used")
            merged[name], origin[name] = value, source
    return merged
