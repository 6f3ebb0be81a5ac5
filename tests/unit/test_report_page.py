"""report.html: whole in one file, true to the run's files, and readable by a parser (a browser: scripts/check-page)."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import soundfile

from sidestep.events import CheckpointSaved, Event, Notice, SampleRendered
from sidestep.listen import page as page_module
from sidestep.listen.charts import Curve, chart, nice_ticks, smoothed, thinned
from sidestep.listen.page import ReportPage, filled
from sidestep.listen.pictures import png
from sidestep.listen.sound import write_flac
from sidestep.listen.story import changed_settings, read_story

VOID = {"meta", "link", "img", "br", "input", "line", "polyline", "path"}


class Parsed(HTMLParser):
    """The elements of a page, and whether each was closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == [], f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] not in ("script", "style"):
            self.text += data

    def all_of(self, tag: str, kind: str = "") -> list[dict[str, str]]:
        return [a for name, a in self.elements if name == tag and kind in ["", *a.get("class", "").split(" ")]]


def write_run(folder: Path, *, epochs: int = 3, caption: str = "warm synths", rank_map: Path | None = None) -> Path:
    """Write what a run leaves behind: settings, metrics, samples."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"run_name": "night & day", "rank": 16, "batch_size": 1, "dataset_dir": str(folder / "tensors")}
    settings["rank_map"] = str(rank_map) if isinstance(rank_map, Path) else rank_map
    config = {"format_version": 1, "sidestep_version": "9.9", "recipe": "fixed", "objective": "o", "settings": settings}
    (folder / "config.json").write_text(json.dumps(config))
    lines: list[dict[str, Any]] = [
        {"event": "run_started", "step": 0, "recipe": "fixed: all of it", "facts": {"Songs": "4 <short>"}, "epochs": 9,
         "steps": 90}
    ]  # fmt: skip
    for step in range(1, 31):
        numbers = {"loss": 1 / step, "lr": 1e-4, "grad_norm": None}
        lines.append({"event": "metrics", "step": step, "epoch": step // 10 + 1, **numbers})
    lines += [{"event": "validated", "step": step, "loss": 0.5} for step in (0, 10, 20)]
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + '\n{"torn')
    (folder / "tensors").mkdir(exist_ok=True)
    (folder / "tensors" / "preprocess_meta.json").write_text(json.dumps({"songs": {"a.pt": "First Song.wav"}}))
    renderings = []
    tone = 0.5 * np.sin(np.arange(24_000) / 10)
    for epoch in [None, *range(1, epochs + 1)]:
        file = f"{'base' if epoch is None else f'epoch_{epoch:04d}'}/1_x.flac"
        write_flac(folder / "samples" / file, np.stack([tone, tone]))
        renderings.append({"epoch": epoch, "step": (epoch or 0) * 10, "prompt": 1, "file": file})
    prompt = {"caption": caption, "lyrics": "la <la>", "bpm": 90, "language": "en", "seed": 42, "duration": 0.5}
    index = {"format_version": 1, "sampling": {}, "prompts": [prompt], "renderings": renderings}
    (folder / "samples" / "samples.json").write_text(json.dumps(index))
    return folder


def page_of(folder: Path) -> tuple[str, Parsed]:
    text = ReportPage(folder, emit=[].append).write().read_text(encoding="utf-8")
    return text, Parsed(text)


def edit_samples(folder: Path, **changes: Any) -> None:
    """Change samples.json as by hand."""
    index = folder / "samples" / "samples.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **changes}))


def test_the_page_needs_nothing_but_itself(tmp_path: Path):
    text, page = page_of(write_run(tmp_path / "run"))
    for tag, attributes in page.elements:
        for name in ("src", "href", "poster", "srcset", "action", "data"):
            assert attributes.get(name, "data:").startswith("data:"), f"{tag} {name}"
    outside = re.sub(r"data:[a-z]+/[a-z]+;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.findall(r"(?:https?:)?//[a-z]|@import|url\(", outside)
    (policy,) = [a["content"] for a in page.all_of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:; media-src data:;")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all_of("meta")
    assert "prefers-color-scheme: dark" in text and "lang" in dict(page.elements)["html"]


def test_every_version_can_be_heard_and_seen(tmp_path: Path):
    text, page = page_of(write_run(tmp_path / "run"))
    assert re.findall(r'aria-pressed="false">([^<]+)<', text) == ["Base", "Epoch 1", "Epoch 2", "Epoch 3"]
    for audio in page.all_of("audio"):
        kind, content = audio["src"].split(",", 1)
        sound, rate = soundfile.read(io.BytesIO(base64.b64decode(content)))
        assert kind == "data:audio/mpeg;base64" and rate == 48_000
        assert sound.shape[0] >= 24_000 and 0.3 < np.abs(sound).max() < 0.7
    pictures = [base64.b64decode(image["src"].split(",", 1)[1]) for image in page.all_of("img")]
    assert len(pictures) == len(page.all_of("audio")) == 4
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert "90 bpm · en · seed 42 · 0.5 s" in page.text and "la <la>" in page.text


def test_a_long_run_shows_some_epochs_the_last_among_them(tmp_path: Path):
    text, page = page_of(write_run(tmp_path / "run", epochs=30))
    labels = re.findall(r'aria-pressed="false">([^<]+)<', text)
    assert len(labels) == 9 and labels[:2] == ["Base", "Epoch 1"] and labels[-1] == "Epoch 30"
    assert "22 more are in the folder samples." in page.text


def test_curves_and_facts_are_the_runs_own(tmp_path: Path):
    text, page = page_of(write_run(tmp_path / "run"))
    assert [a["aria-label"] for a in page.all_of("svg")] == [
        "Loss: training 1 to 0.03333",
        "Loss on held-out songs: held out 0.5 to 0.5",
        "Learning rate: learning rate 0.0001 to 0.0001",
    ]
    (data, *_) = [json.loads(block) for block in re.findall(r'<script type="application/json">(.*?)</script>', text)]
    assert data["first"] == 1 and data["last"] == 30
    assert data["series"][0]["points"][1] == [2, 0.5]
    assert "At epoch 4 of 9, step 30 of 90." in page.text and "fixed: all of it" in page.text
    assert "4 <short>" in page.text and "First Song.wav" in page.text and "Side-Step 9.9" in page.text
    assert "--rank" in page.text and "--batch-size" not in page.text


@pytest.mark.parametrize("caption", ["<script>alert(1)</script>", "{{style}}", '"><b>', "</script>", ""])
def test_words_of_the_user_stay_words(tmp_path: Path, caption: str):
    text, page = page_of(write_run(tmp_path / "run", caption=caption))
    assert text.count("<script>") == 1 and (caption or "No caption") in page.text
    assert "night & day" in page.text


def test_a_rank_map_is_a_picture(tmp_path: Path):
    from sidestep.config.rank_map import RankMap, read_rank_map

    modules = [f"layers.{layer}.{part}" for layer in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")]
    path = tmp_path / "map.json"
    write_rank_map(path, dict(zip(modules, (8, 0, 32, 16), strict=True)))
    assert isinstance(read_rank_map(path), RankMap)
    _, page = page_of(write_run(tmp_path / "run", rank_map=path))
    cells = [a["style"] for a in page.all_of("td") if "background" in a.get("style", "")]
    assert len(cells) == 4 and len(set(cells)) == 4
    assert "self_attn.q_proj" in page.text


def write_rank_map(path: Path, ranks: dict[str, int]) -> None:
    from sidestep.config.rank_map import Budget, ModuleRank, Origin, RankMap, write_rank_map

    origin = Origin(
        sidestep_version="0", method="eva", granularity="module", seed=0, draws=2, songs=1, timestep_range=(0.0, 1.0),
        model_variant="base", model="m", dataset="d", recipe="r", objective="o",
    )  # fmt: skip
    modules = tuple(ModuleRank(name=name, rank=rank, cost=10, score=1.0) for name, rank in ranks.items())
    budget = Budget(parameters=10_000, spent=sum(ranks.values()) * 10, rank_min=8, rank_max=128)
    write_rank_map(path, RankMap(origin=origin, budget=budget, modules=modules))


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path):
    (tmp_path / "run").mkdir()
    _, page = page_of(tmp_path / "run")
    assert "Not a step is made yet." in page.text


def test_the_page_is_renewed_when_something_is_saved(tmp_path: Path):
    folder = write_run(tmp_path / "run", epochs=1)
    page = ReportPage(folder, emit=[].append)
    page(Notice(text="nothing to show"))
    assert not (folder / "report.html").exists()
    page(CheckpointSaved(folder=folder, step=1, epoch=1))
    first = (folder / "report.html").read_text()
    write_run(folder, epochs=2)
    page(SampleRendered(step=2, epoch=2, prompt=1, caption="x", path=folder, seconds=1.0))
    assert "Epoch 2" in (folder / "report.html").read_text() and "Epoch 2" not in first


def test_an_epoch_of_many_prompts_is_written_once(tmp_path: Path):
    folder = write_run(tmp_path / "run", epochs=1)
    index = json.loads((folder / "samples" / "samples.json").read_text())
    edit_samples(folder, prompts=index["prompts"] * 2)
    page = ReportPage(folder, emit=[].append)
    page(SampleRendered(step=1, epoch=1, prompt=1, caption="x", path=folder, seconds=1.0))
    assert not (folder / "report.html").exists()
    edit_samples(folder, renderings=[*index["renderings"], {**index["renderings"][1], "prompt": 2}])
    page(SampleRendered(step=1, epoch=1, prompt=2, caption="x", path=folder, seconds=1.0))
    assert (folder / "report.html").exists()


def test_what_a_page_has_no_room_for_is_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_run(tmp_path / "run")
    index = json.loads((folder / "samples" / "samples.json").read_text())
    second = [{**e, "prompt": 2, "file": e["file"].replace("1_x", "2_ü x")} for e in index["renderings"]]
    for entry in second:
        content = (folder / "samples" / "base" / "1_x.flac").read_bytes()
        (folder / "samples" / entry["file"]).write_bytes(content)
    edit_samples(folder, prompts=index["prompts"] * 2, renderings=[*index["renderings"], *second])
    sound, picture, _ = page_module.sound_and_picture(folder / "samples" / "base" / "1_x.flac")
    monkeypatch.setattr(page_module, "_MOST_BYTES", int(5.5 * (len(sound) + len(picture))))
    text, page = page_of(folder)
    assert re.findall(r'aria-pressed="false">([^<]+)<', text) == ["Base", "Epoch 1", "Epoch 3", "Base", "Epoch 3"]
    links = [a["href"] for a in page.all_of("a")]
    names = ["epoch_0002/1_x.flac", "epoch_0001/2_ü x.flac", "epoch_0002/2_ü x.flac"]
    assert [unquote(link) for link in links] == [f"samples/{name}" for name in names]
    assert not any(" " in link for link in links)
    assert page.text.count("Too much for one page; in the folder samples beside it:") == 2


PROMPT = {"caption": "warm", "lyrics": "la", "seed": 42, "duration": 0.5}
RENDERING = {"epoch": 1, "step": 10, "prompt": 1, "file": "epoch_0001/1_x.flac"}


@pytest.mark.parametrize(
    "changes",
    [
        {"renderings": [{key: value for key, value in RENDERING.items() if key != name}, RENDERING]}
        for name in RENDERING
    ]
    + [{"renderings": [{**RENDERING, **odd}, RENDERING]} for odd in (
        {"file": 5}, {"file": "a\0b"}, {"prompt": "one"}, {"prompt": [1]}, {"epoch": "x"}, {"step": None}
    )]
    + [{"renderings": [5, RENDERING]}]
    + [{"prompts": [PROMPT, {key: value for key, value in PROMPT.items() if key != name}]} for name in PROMPT]
    + [{"prompts": [PROMPT, odd]} for odd in ({**PROMPT, "duration": "long"}, {**PROMPT, "caption": None}, 5)],
    ids=str,
)  # fmt: skip
def test_entries_of_samples_that_cannot_be_read_are_left_out_and_said(tmp_path: Path, changes: dict[str, Any]):
    folder = write_run(tmp_path / "run", epochs=1)
    edit_samples(folder, **changes)
    text, page = page_of(folder)
    assert "Epoch 1" in text and page.all_of("audio")
    assert "What cannot be read is left out: metrics.jsonl, samples.json." in page.text


@pytest.mark.parametrize("content", [{"prompts": {"a": 1}}, {"renderings": "none"}, {"prompts": None}], ids=str)
def test_samples_of_another_shape_are_left_out(tmp_path: Path, content: dict[str, Any]):
    folder = write_run(tmp_path / "run", epochs=1)
    edit_samples(folder, **content)
    _, page = page_of(folder)
    assert page.all_of("audio") == [] and "samples.json" in page.text


@pytest.mark.parametrize(
    "line",
    [
        {"event": "metrics", "step": 31, "loss": "low"},
        {"event": "metrics", "step": 31, "loss": [1]},
        {"event": "metrics", "step": 31, "loss": 10**400},
        {"event": "metrics", "step": "31", "loss": 0.1},
        {"event": "metrics", "step": None, "loss": 0.1},
        {"event": "run_started", "step": 0, "facts": ["x"]},
        [1, 2],
    ],
    ids=lambda line: str(line)[:60],
)
def test_lines_of_metrics_that_cannot_be_read_are_left_out(tmp_path: Path, line: object):
    folder = write_run(tmp_path / "run", epochs=1)
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text() + "\n" + json.dumps(line))
    _, page = page_of(folder)
    assert "metrics.jsonl (2 parts)." in page.text
    assert read_story(folder).curves["loss"][-1] == (30, 1 / 30)


def test_a_curve_of_one_step_is_not_drawn():
    assert chart("twice", [Curve(name="x", points=[(5, 1.0), (5, 2.0)])]) == ""


@pytest.mark.parametrize("config", [{"settings": ["rank", 8]}, [], {"settings": None}, {"settings": 5}], ids=str)
def test_settings_that_cannot_be_read_are_left_out(tmp_path: Path, config: object):
    folder = write_run(tmp_path / "run", epochs=1)
    (folder / "config.json").write_text(json.dumps(config))
    _, page = page_of(folder)
    assert "config.json" in page.text and len(page.all_of("audio")) == 2


def test_a_rank_map_of_strange_modules_is_left_out(tmp_path: Path):
    path = tmp_path / "map.json"
    write_rank_map(path, {"q_proj": 8})
    _, page = page_of(write_run(tmp_path / "run", rank_map=path))
    assert "map.json" in page.text
    _, page = page_of(write_run(tmp_path / "other", rank_map=[8]))  # pyright: ignore[reportArgumentType]
    assert page.all_of("audio")


def test_what_cannot_be_read_is_said_once(tmp_path: Path):
    folder = write_run(tmp_path / "run", epochs=2)
    (folder / "metrics.jsonl").unlink()
    said: list[Event] = []
    page = ReportPage(folder, emit=said.append)
    page.write()
    assert said == []
    (folder / "samples" / "epoch_0001" / "1_x.flac").write_bytes(b"fLaC")
    page.write()
    page.write()
    text = f"{folder / 'report.html'}: what cannot be read is left out: epoch_0001/1_x.flac."
    assert said == [Notice(text=text, level="warning")]


def test_a_template_is_filled_once():
    assert filled("a {{x}} b {{y}}", {"x": "{{y}}", "y": "2"}) == "a {{y}} b 2"


def test_ticks_are_round_and_span_the_values():
    assert nice_ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert nice_ticks(3.1, 4.9) == [3.0, 3.5, 4.0, 4.5, 5.0]
    assert nice_ticks(2e-5, 9e-5) == [2e-5, 4e-5, 6e-5, 8e-5, 1e-4]
    low, *_, high = nice_ticks(0.5, 0.5)
    assert low < 0.5 < high


def test_curves_keep_their_ends_and_their_mean():
    points = [(float(step), 3.0) for step in range(1000)]
    assert len(thinned(points)) == 400 and thinned(points)[0] == points[0] and thinned(points)[-1] == points[-1]
    assert smoothed(points)[0] == (0.0, pytest.approx(3.0)) and smoothed(points)[-1][1] == pytest.approx(3.0)
    assert chart("none", [Curve(name="x", points=[])]) == chart("one", [Curve(name="x", points=[(5, 1.0)])]) == ""
    assert Parsed(chart("two", [Curve(name="x", points=[(5, 1.0), (6, 1.0)])])).all_of("svg")


def test_a_png_holds_its_pixels():
    import struct
    import zlib

    picture = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    content = png(picture)
    assert struct.unpack(">II", content[16:24]) == (3, 2)
    start = content.index(b"IDAT") + 4
    rows = np.frombuffer(zlib.decompress(content[start:]), np.uint8).reshape(2, 10)
    assert (rows[:, 0] == 0).all() and (rows[:, 1:].reshape(2, 3, 3) == picture).all()


def test_settings_are_compared_with_their_defaults():
    settings = {"rank": 16, "alpha": 128.0, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "strange": 1}
    assert changed_settings(settings) == {"--rank": 16}


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path):
    write_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('\n{"event": "metrics", "step": 31, "epoch": 4, "loss": NaN, "lr": 1e-4, "grad_norm": Infinity}\n')
    page, _ = page_of(tmp_path)
    assert "NaN" not in page.split("<main>")[1].split("</main>")[0]
    assert read_story(tmp_path).curves["loss"][-1] == (30, 1 / 30)


def test_a_damaged_sound_is_left_out(tmp_path: Path):
    write_run(tmp_path, epochs=2)
    damaged = sorted((tmp_path / "samples").rglob("*.flac"))[0]
    damaged.write_bytes(b"fLaC")
    _, parsed = page_of(tmp_path)
    assert len(parsed.all_of("audio")) == 2


def test_only_sounds_of_the_runs_own_folder_are_in_the_page(tmp_path: Path):
    folder = write_run(tmp_path / "run", epochs=2)
    write_run(tmp_path / "other", epochs=1)
    index = folder / "samples" / "samples.json"
    content = json.loads(index.read_text())
    outside = tmp_path / "other" / "samples" / "base" / "1_x.flac"
    content["renderings"][0]["file"] = "../../other/samples/base/1_x.flac"
    content["renderings"][1]["file"] = str(outside)
    index.write_text(json.dumps(content))
    assert outside.is_file()
    _, parsed = page_of(folder)
    assert len(parsed.all_of("audio")) == 1


def test_a_torn_file_is_left_out(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    (folder / "samples" / "samples.json").write_text('{"prompts": [')
    story = read_story(folder)
    assert (story.prompts, story.renderings, story.step) == ([], [], 30)
    assert story.unread == {"samples.json": 1, "metrics.jsonl": 1}
