"""report.html in a run's folder: one file to hear and see the run, offline, on any device. Loads no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import soundfile

from sidestep.config.rank_map import RankMap
from sidestep.config.settings import show_value
from sidestep.data.fields import INSTRUMENTAL, UNKNOWN_LANGUAGE
from sidestep.data.spectrogram import colours
from sidestep.events import AdapterSaved, CheckpointSaved, Emit, Event, Notice, RunDone, SampleRendered
from sidestep.files import write_whole
from sidestep.listen.charts import Curve, chart
from sidestep.listen.pictures import sound_and_picture
from sidestep.listen.prompts import evenly_spaced
from sidestep.listen.story import SAMPLES, Story, changed_settings, is_whole, read_story

REPORT = "report.html"
_TEMPLATE = Path(__file__).with_name("template")
_MOST_EPOCHS = 8
"""Versions of a prompt in the page besides the model alone; more would make it too large to open on a phone."""
_MOST_BYTES = 40_000_000
"""Of sounds and pictures in the page, whatever the number of prompts; what is beyond it is linked."""
_MOST_SONGS = 30
_Heard = tuple[str, str, float]
_Entry = Mapping[str, Any]


class ReportPage:
    """A sink that writes the page anew when something was saved, or all prompts of an epoch were rendered.

    `emit` hears, once, of what in the run's files cannot be read.
    """

    def __init__(self, folder: Path, *, emit: Emit) -> None:
        self._folder = folder
        self._emit = emit
        self._sounds: dict[tuple[Path, int], _Heard] = {}
        self._has_warned = False

    def __call__(self, event: Event) -> None:
        """Write the page, if the event says that there is something new to keep."""
        is_new = isinstance(event, CheckpointSaved | AdapterSaved | RunDone)
        if is_new or (isinstance(event, SampleRendered) and is_whole(self._folder, event.epoch)):
            self.write()

    def write(self) -> Path:
        """Write the page of what the folder holds now; RunError when it cannot be written."""
        story = read_story(self._folder)
        versions = _versions(story)
        heard = self._heard(story, versions)
        sections = [_listening(story, versions, heard), _curves(story), _map(story.rank_map), _facts(story)]
        left_out = _left_out(story)
        words = {
            "title": escape(story.name),
            "status": escape(_status(story)),
            "recipe": escape(story.recipe),
            "left_out": escape(left_out),
            "sections": "\n".join(section for section in sections if section),
            "version": escape(story.version),
            "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "style": (_TEMPLATE / "report.css").read_text(encoding="utf-8"),
            "script": (_TEMPLATE / "report.js").read_text(encoding="utf-8"),
        }
        path = self._folder / REPORT
        write_whole(path, filled((_TEMPLATE / "report.html").read_text(encoding="utf-8"), words))
        if left_out and not self._has_warned:
            self._has_warned = True
            self._emit(Notice(text=f"{path}: {left_out[0].lower()}{left_out[1:]}", level="warning"))
        return path

    def _heard(self, story: Story, versions: Sequence["_Versions"]) -> dict[Path, _Heard]:
        """Return what the page holds of each file, the newest of each prompt and the model alone before the rest.

        No more is looked at once there is enough for a page. A damaged file is counted in the story's `unread`.
        """
        shown = [
            (e["epoch"] is not None and e is not own.shown[-1], own.file(e)) for own in versions for e in own.shown
        ]
        before, self._sounds, size = self._sounds, {}, 0
        heard: dict[Path, _Heard] = {}
        for _, path in sorted(shown, key=lambda each: each[0]):
            try:
                key = path, path.stat().st_mtime_ns
                content = before.get(key) or sound_and_picture(path)
            except (soundfile.LibsndfileError, FileNotFoundError):
                story.unread[_short(path)] += 1
                continue
            size += len(content[0]) + len(content[1])
            if size > _MOST_BYTES:
                break
            heard[path] = self._sounds[key] = content
        return heard


@dataclass(frozen=True, slots=True, kw_only=True)
class _Versions:
    """What there is of a prompt: `shown` are the model alone and some epochs, `left` how many others."""

    folder: Path
    shown: Sequence[_Entry]
    left: int

    def file(self, entry: _Entry) -> Path:
        return self.folder / SAMPLES.parent / entry["file"]


def _versions(story: Story) -> list[_Versions]:
    """Return the versions of each prompt that are still there."""
    own: list[list[_Entry]] = [[] for _ in story.prompts]
    for entry in story.renderings:
        if 0 < entry["prompt"] <= len(own) and (story.folder / SAMPLES.parent / entry["file"]).is_file():
            own[entry["prompt"] - 1].append(entry)
    shown = [
        [e for e in each if e["epoch"] is None] + _chosen([e for e in each if e["epoch"] is not None]) for each in own
    ]
    return [
        _Versions(folder=story.folder, shown=some, left=len(each) - len(some))
        for each, some in zip(own, shown, strict=True)
    ]


def filled(template: str, words: Mapping[str, str]) -> str:
    """Return a template with each `{{name}}` replaced, once: what is put in is not looked at again."""
    parts = template.split("{{")
    whole = [parts[0]]
    for part in parts[1:]:
        name, rest = part.split("}}", 1)
        whole += [words[name], rest]
    return "".join(whole)


def _status(story: Story) -> str:
    place = f"epoch {story.epoch} of {story.epochs}, step {story.step} of {story.steps}"
    ends = {
        "finished": f"Finished at {place}.",
        "early_stop": f"Stopped at {place}: the held-out loss no longer improved.",
        "interrupted": f"Interrupted at {place}.",
    }
    return ends.get(story.ended, f"At {place}." if story.step else "Not a step is made yet.")


def _listening(story: Story, versions: Sequence[_Versions], heard: Mapping[Path, _Heard]) -> str:
    each = zip(story.prompts, versions, strict=True)
    cards = [_prompt(prompt, own, heard, story.unread) for prompt, own in each if prompt and own.shown]
    return f"<section><h2>Listen</h2>{''.join(cards)}</section>" if cards else ""


def _prompt(prompt: Mapping[str, Any], own: _Versions, heard: Mapping[Path, _Heard], unread: Mapping[str, int]) -> str:
    versions = "".join(_version(entry, *heard[path]) for entry in own.shown if (path := own.file(entry)) in heard)
    linked = [e for e in own.shown if own.file(e) not in heard and _short(own.file(e)) not in unread]
    words = [f"{prompt['bpm']} bpm"] if prompt.get("bpm") else []
    known = (prompt.get("keyscale"), prompt.get("language"))
    words += [str(word) for word in known if word and word != UNKNOWN_LANGUAGE]
    words += [f"seed {prompt['seed']}", f"{prompt['duration']:g} s"]
    lyrics = ""
    if prompt["lyrics"] != INSTRUMENTAL:
        lyrics = f"<details><summary>Lyrics</summary><pre>{escape(prompt['lyrics'])}</pre></details>"
    note = f'<p class="note">{own.left} more are in the folder {SAMPLES.parent.as_posix()}.</p>' if own.left else ""
    caption = escape(prompt["caption"] or "No caption")
    return (
        f'<div class="prompt card" data-seconds="{prompt["duration"]:g}"><h3>{caption}</h3><p class="meta">'
        f"{escape(' · '.join(words))}</p>{lyrics}{versions}{_links(linked)}{note}</div>"
    )


def _links(entries: Sequence[_Entry]) -> str:
    """Return links to the files that the page has no room for."""
    files = [(SAMPLES.parent / entry["file"]).as_posix() for entry in entries]
    links = [f'<a href="{escape(quote(f))}">{_label(entry)}</a>' for f, entry in zip(files, entries, strict=True)]
    where = f"Too much for one page; in the folder {SAMPLES.parent.as_posix()} beside it:"
    return f'<p class="note">{where} {", ".join(links)}.</p>' if links else ""


def _short(path: Path) -> str:
    """Return the name of a sound and its epoch's folder."""
    return "/".join(path.parts[-2:])


def _label(entry: _Entry) -> str:
    return "Base" if entry["epoch"] is None else f"Epoch {entry['epoch']}"


def _chosen(epochs: Sequence[_Entry]) -> list[_Entry]:
    """Return the epochs that are shown: evenly spaced, the last one always."""
    if len(epochs) <= _MOST_EPOCHS:
        return list(epochs)
    return [epochs[at] for at in evenly_spaced(len(epochs) - 1, _MOST_EPOCHS - 1)] + [epochs[-1]]


def _version(entry: _Entry, audio: str, picture: str, seconds: float) -> str:
    label = _label(entry)
    return (
        f'<div class="version"><button type="button" aria-pressed="false">{label}</button>'
        f'<div class="sound" tabindex="0" role="slider" aria-label="Position in {label}" aria-valuemin="0" '
        f'aria-valuemax="{seconds:.1f}" aria-valuenow="0"><img alt="Spectrogram of {label}" src="{picture}">'
        f'<i></i></div><audio controls preload="metadata" src="{audio}"></audio></div>'
    )


def _curves(story: Story) -> str:
    curves = story.curves
    loss = Curve(name="training", points=curves.get("loss", []), is_noisy=True)
    figures = [
        chart("Loss", [loss]),
        chart("Loss on held-out songs", [Curve(name="held out", points=curves.get("validation", []), colour="second")]),
        chart("Learning rate", [Curve(name="learning rate", points=curves.get("lr", []))]),
        chart("Gradient norm", [Curve(name="gradient norm", points=curves.get("grad_norm", []), is_noisy=True)]),
    ]
    return f'<section><h2>Curves</h2><div class="charts">{"".join(figures)}</div></section>' if any(figures) else ""


def _map(rank_map: RankMap | None) -> str:
    """Return the rank map as a picture: a column a layer, a row a projection, brighter for a larger rank."""
    if rank_map is None:
        return ""
    cells = {}
    for module in rank_map.modules:
        _, layer, part = module.name.split(".", 2)
        cells[part, int(layer)] = module.rank
    layers, parts = sorted({layer for _, layer in cells}), list(dict.fromkeys(part for part, _ in cells))
    largest = max(cells.values()) or 1
    rows = "".join(
        f"<tr><th>{escape(part)}</th>{''.join(_cell(cells.get((part, layer)), largest) for layer in layers)}</tr>"
        for part in parts
    )
    head = "".join(f"<th>{layer}</th>" for layer in layers)
    return (
        f'<section><h2>Rank map</h2><div class="card map"><table><thead><tr><th>layer</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _cell(rank: int | None, largest: int) -> str:
    if rank is None:
        return "<td></td>"
    share = rank / largest
    red, green, blue = colours(np.array(0.1 + 0.9 * share))
    ink = "#000" if share > 0.55 else "#fff"
    return f'<td style="background:rgb({red},{green},{blue});color:{ink}">{rank}</td>'


def _facts(story: Story) -> str:
    tables = [_table(story.facts)]
    if story.songs:
        names = story.songs[:_MOST_SONGS]
        more = f" and {len(story.songs) - len(names)} more" if len(story.songs) > len(names) else ""
        tables.append(f"<details><summary>Songs</summary><p>{escape(', '.join(names))}{more}</p></details>")
    changed = {flag: show_value(value) for flag, value in changed_settings(story.settings).items()}
    if changed:
        tables.append(f"<details><summary>Settings that are not the defaults</summary>{_table(changed)}</details>")
    return f'<section><h2>The run</h2><div class="card">{"".join(tables)}</div></section>'


def _left_out(story: Story) -> str:
    """Say what of the run's files could not be read."""
    names = (f"{name} ({count} parts)" if count > 1 else name for name, count in story.unread.items())
    return f"What cannot be read is left out: {', '.join(names)}." if story.unread else ""


def _table(rows: Mapping[str, str]) -> str:
    lines = "".join(f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>" for key, value in rows.items())
    return f'<table class="facts">{lines}</table>' if lines else ""
