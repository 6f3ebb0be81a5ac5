"""report.html in a run's folder: one file to hear and see the run, offline, on any device. Loads no torch."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from sidestep.config.rank_map import RankMap
from sidestep.config.settings import show_value
from sidestep.data.fields import INSTRUMENTAL, UNKNOWN_LANGUAGE
from sidestep.data.spectrogram import colours
from sidestep.events import AdapterSaved, CheckpointSaved, Event, RunDone, SampleRendered
from sidestep.files import write_whole
from sidestep.listen.charts import Curve, chart
from sidestep.listen.pictures import sound_and_picture
from sidestep.listen.prompts import evenly_spaced
from sidestep.listen.story import SAMPLES, Story, changed_settings, read_story

REPORT = "report.html"
_TEMPLATE = Path(__file__).with_name("template")
_MOST_EPOCHS = 8
"""Versions of a prompt in the page besides the model alone; more would make it too large to open on a phone."""
_MOST_SONGS = 30


class ReportPage:
    """A sink that writes the page anew whenever something was saved or rendered."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sounds: dict[tuple[Path, int], tuple[str, str, float]] = {}

    def __call__(self, event: Event) -> None:
        """Write the page, if the event says that there is something new to keep."""
        if isinstance(event, CheckpointSaved | AdapterSaved | SampleRendered | RunDone):
            self.write()

    def write(self) -> Path:
        """Write the page of what the folder holds now; RunError when it cannot be written."""
        story = read_story(self._folder)
        sections = [_listening(story, self._sound), _curves(story), _map(story.rank_map), _facts(story)]
        words = {
            "title": escape(story.name),
            "status": escape(_status(story)),
            "recipe": escape(story.recipe),
            "sections": "\n".join(section for section in sections if section),
            "version": escape(story.version),
            "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "style": (_TEMPLATE / "report.css").read_text(encoding="utf-8"),
            "script": (_TEMPLATE / "report.js").read_text(encoding="utf-8"),
        }
        path = self._folder / REPORT
        write_whole(path, filled((_TEMPLATE / "report.html").read_text(encoding="utf-8"), words))
        return path

    def _sound(self, path: Path) -> tuple[str, str, float] | None:
        """Return what the page holds of a file; None of one that is damaged."""
        key = path, path.stat().st_mtime_ns
        if key not in self._sounds:
            try:
                self._sounds[key] = sound_and_picture(path)
            except soundfile.LibsndfileError:
                return None
        return self._sounds[key]


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


def _listening(story: Story, sound: Any) -> str:
    prompts, renderings = story.samples.get("prompts", []), story.samples.get("renderings", [])
    cards = [_prompt(story, number, prompt, renderings, sound) for number, prompt in enumerate(prompts, start=1)]
    return f"<section><h2>Listen</h2>{''.join(cards)}</section>" if any(cards) else ""


def _prompt(
    story: Story, number: int, prompt: Mapping[str, Any], renderings: Sequence[Mapping[str, Any]], sound: Any
) -> str:
    folder = (story.folder / SAMPLES).parent
    own = [entry for entry in renderings if entry["prompt"] == number and (folder / entry["file"]).is_file()]
    base = [entry for entry in own if entry["epoch"] is None]
    epochs = [entry for entry in own if entry["epoch"] is not None]
    shown = [*base, *_chosen(epochs)]
    if not shown:
        return ""
    versions = "".join(_version(entry, *heard) for entry in shown if (heard := sound(folder / entry["file"])))
    words = [f"{prompt['bpm']} bpm"] if prompt.get("bpm") else []
    known = (prompt.get("keyscale"), prompt.get("language"))
    words += [str(word) for word in known if word and word != UNKNOWN_LANGUAGE]
    words += [f"seed {prompt['seed']}", f"{prompt['duration']:g} s"]
    lyrics = ""
    if prompt["lyrics"] != INSTRUMENTAL:
        lyrics = f"<details><summary>Lyrics</summary><pre>{escape(str(prompt['lyrics']))}</pre></details>"
    left = len(own) - len(shown)
    note = f'<p class="note">{left} more are in the folder {SAMPLES.parent.as_posix()}.</p>' if left else ""
    caption = escape(str(prompt["caption"]) or "No caption")
    return (
        f'<div class="prompt card" data-seconds="{prompt["duration"]:g}"><h3>{caption}</h3><p class="meta">'
        f"{escape(' · '.join(words))}</p>{lyrics}{versions}{note}</div>"
    )


def _chosen(epochs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the epochs that are shown: evenly spaced, the last one always."""
    if len(epochs) <= _MOST_EPOCHS:
        return list(epochs)
    return [epochs[at] for at in evenly_spaced(len(epochs) - 1, _MOST_EPOCHS - 1)] + [epochs[-1]]


def _version(entry: Mapping[str, Any], audio: str, picture: str, seconds: float) -> str:
    label = "Base" if entry["epoch"] is None else f"Epoch {entry['epoch']}"
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


def _table(rows: Mapping[str, str]) -> str:
    lines = "".join(f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>" for key, value in rows.items())
    return f'<table class="facts">{lines}</table>' if lines else ""
