"""`build-dataset`: from a folder of songs and their sidecars to a dataset.json, and a report on what it holds."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from sidestep.config.settings import settings_of
from sidestep.config.shell import shell_line
from sidestep.config.tasks import BuildDatasetConfig
from sidestep.config.train import TrainConfig
from sidestep.data.dataset_file import DATASET_FILE, Dataset, Track, read_dataset, scan_folder, write_dataset
from sidestep.data.inspect import Report, listen_to_all, report_on
from sidestep.data.sidecars import ENDINGS
from sidestep.errors import ConfigError, DataError, RunError
from sidestep.events import Emit, Event, Notice, TrackSkipped
from sidestep.ui.console import Console

NAMES_SHOWN = 5


def run(config: BuildDatasetConfig, *, emit: Emit, console: Console) -> int:
    """Write the dataset file and print the report; returns 1 when songs were skipped, else 0."""
    output = config.output or config.input / DATASET_FILE
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder.", hint=f"Name the file: {output / DATASET_FILE}")
    warnings: list[str] = []
    skipped: list[TrackSkipped] = []

    def collect(event: Event) -> None:
        """Keep remarks for the report, where they can be read in peace; pass everything else on."""
        if isinstance(event, Notice):
            warnings.append(event.text)
            return
        if isinstance(event, TrackSkipped):
            skipped.append(event)
        emit(event)

    dataset = scan_folder(config.input, emit=collect)
    sounds = listen_to_all(dataset, emit=collect)
    if not sounds:
        raise DataError(f"None of the songs in {config.input} can be used.", hint="See the reasons above.")
    dataset = replace(
        dataset,
        tracks=tuple(track for track in dataset.tracks if track.name in sounds),
        name=config.name or dataset.name,
        custom_tag=config.tag.strip(),
        tag_position=config.tag_position,
        genre_ratio=config.genre_ratio,
    )
    warnings += keep_previous(output, dataset)
    write_dataset(output, dataset)
    (max_seconds,) = (each.default for each in settings_of(TrainConfig) if each.name == "max_duration")
    show_report(console, report_on(dataset, sounds, max_seconds=max_seconds), skipped=skipped, warnings=warnings)
    console.print()
    console.print(f"Wrote {output}.")
    return 1 if skipped else 0


def keep_previous(path: Path, dataset: Dataset) -> list[str]:
    """Copy the dataset file at `path` aside if it knows more than `dataset`: captions made in another tool or corrected
    in it, a tag.

    Returns what is to be said of it. The copy never replaces an older one. Raises RunError when it cannot be written.
    """
    if not path.is_file():
        return []
    left_out: list[str] = []
    try:
        previous = read_dataset(path)
    except DataError:  # Not a dataset file, or a damaged one: only its owner knows what it is worth.
        knows_more = True
    else:
        left_out = _flags_left_out(previous, dataset)
        now = {track.audio_path: track for track in dataset.tracks}
        is_older = _older_than(path.stat().st_mtime, dataset.folder)
        knows_more = any(_is_lost(track, now.get(track.audio_path), is_older) for track in previous.tracks)
    if not knows_more and not left_out:
        return []
    copies = (path.with_name(f"{path.name}.bak{number or ''}") for number in range(1000))
    copy = next(copy for copy in copies if not copy.exists())
    try:
        shutil.copy2(path, copy)
    except OSError as error:
        raise RunError(f"{copy} cannot be written: {error.strerror}.", hint="Choose another --output.") from error
    remarks = [f"The previous {path.name} held what no sidecar says; it is kept as {copy.name}."] if knows_more else []
    if left_out:
        flags = shell_line(left_out)
        remarks.append(f"The previous {path.name}, kept as {copy.name}, was built with {flags}; this one is not.")
    return remarks


def show_report(console: Console, report: Report, *, skipped: Sequence[TrackSkipped], warnings: Sequence[str]) -> None:
    """Print what the dataset holds, what looks wrong and what was left out."""
    has = [(f"with {what}", f"{count} of {report.songs}") for what, count in report.coverage.items()]
    console.table("Dataset", [("songs", str(report.songs)), ("length", _length(report.hours)), *has])
    if report.findings:
        rows = [(finding.what, _some(finding.songs)) for finding in report.findings]
        console.table("What looks wrong", rows)
    if warnings:
        console.heading("Remarks")
        for text in warnings:
            console.warning(text)
    if skipped:
        console.table("Skipped", [(event.name, f"{event.reason} {event.hint}".strip()) for event in skipped])


def _flags_left_out(previous: Dataset, dataset: Dataset) -> list[str]:
    """Return the settings of the former dataset that this one has none of, as flags."""
    flags: list[str] = []
    if previous.custom_tag and not dataset.custom_tag:
        flags += ["--tag", previous.custom_tag, "--tag-position", previous.tag_position]
    if previous.genre_ratio and not dataset.genre_ratio:
        flags += ["--genre-ratio", str(previous.genre_ratio)]
    return flags


def _older_than(written: float, folder: Path) -> Callable[[Path], bool]:
    """Return what says of a song's audio whether all that speaks of it is older than `written`."""
    tables = [path.stat().st_mtime for path in folder.iterdir() if path.suffix.lower() == ".csv" and path.is_file()]

    def is_older(audio: Path) -> bool:
        sidecars = (audio.with_name(audio.stem + ending) for ending in ENDINGS)
        return all(time < written for time in (*tables, *(path.stat().st_mtime for path in sidecars if path.is_file())))

    return is_older


def _is_lost(before: Track, now: Track | None, is_older: Callable[[Path], bool]) -> bool:
    """Say whether a field that was filled is empty now, or another though no sidecar was changed since: then it was
    corrected in the dataset file. (A song that is gone from the disk loses nothing.)"""
    if now is None:
        return before.audio_path.exists()
    empty = asdict(Track(id="", audio_path=before.audio_path, name=""))
    old, new = asdict(before), asdict(now)
    described = empty.keys() - {"id", "audio_path", "name", "duration"}
    changed = [name for name in described if old[name] != empty[name] and new[name] != old[name]]
    return any(new[name] == empty[name] for name in changed) or (bool(changed) and is_older(before.audio_path))


def _length(hours: float) -> str:
    minutes, seconds = divmod(round(hours * 3600), 60)
    return f"{hours:.2f} hours ({minutes} min {seconds} s)"


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
