"""`demo`: the whole way on a toy model and made-up songs, by the very commands that a user types."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from sidestep.commands import build_dataset, train
from sidestep.config.flags import GlobalConfig, parse
from sidestep.config.settings import build, parse_values
from sidestep.config.shell import program_words, shell_line, start_words
from sidestep.config.tasks import BuildDatasetConfig, DemoConfig
from sidestep.data.dataset_file import DATASET_FILE, read_dataset
from sidestep.files import cannot_write
from sidestep.model.checkpoint import find_checkpoint
from sidestep.ui.console import Console, open_console
from sidestep.ui.download import fetches_for
from sidestep.ui.problems import LOG_NAME, open_log, quiet_libraries
from sidestep.ui.sinks import open_screen
from sidestep.ui.wording import duration

SEED = 0
VARIANT = "base"
SONG_SECONDS = (3.0, 3.6)
EPOCHS, MORE_EPOCHS = 10, 15
RENDERED_SECONDS = 1.0
ADAPTER = "toy"
STEPS = 6
LINE = 76


@dataclass(frozen=True, slots=True)
class Place:
    """The demo's own folder and what goes where in it."""

    folder: Path

    @property
    def checkpoints(self) -> Path:
        """The toy checkpoint."""
        return self.folder / "checkpoints"

    @property
    def songs(self) -> Path:
        """The songs, their sidecars and the dataset file."""
        return self.folder / "songs"

    @property
    def tensors(self) -> Path:
        """The preprocessed songs."""
        return self.folder / "tensors"

    @property
    def output(self) -> Path:
        """The training run."""
        return self.folder / "output"

    @property
    def adapter(self) -> Path:
        """The finished adapter."""
        return self.output / ADAPTER


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One command of the demo: what is said before it, what after it, and the command for real music."""

    title: str
    before: str
    words: tuple[str, ...]
    after: Callable[[], str]
    real: tuple[str, ...]


def run(config: DemoConfig, *, screen: GlobalConfig) -> int:
    """Go the whole way in a new folder inside `config.folder`; returns the exit code. Touches no user settings."""
    started = time.monotonic()
    console = open_console(plain=screen.plain)
    place = Place(fresh_folder(config.folder))
    quiet_libraries()
    open_log(place.folder / LOG_NAME)
    _introduce(console, place)
    _title(console, 1, "A toy model and four songs")
    from sidestep.demo.threads import one_thread

    with one_thread():
        code = _go(console, place, screen)
    if code:
        console.print()
        console.print(f"The demo ends here; what it made so far is in {place.folder}.")
        return code
    _conclude(console, place, seconds=time.monotonic() - started)
    return 0


def fresh_folder(parent: Path) -> Path:
    """Make and return `parent`/run-1, or the next number that is free; nothing that is there is touched.

    Raises RunError when it cannot be made.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        number = next(number for number in count(1) if not (parent / f"run-{number}").exists())
        folder = parent / f"run-{number}"
        folder.mkdir()
    except OSError as error:
        raise cannot_write(parent, error) from error
    return folder


def commands(place: Place) -> Sequence[Step]:
    """The steps between the toys and the sound, each with the words that are typed for it."""
    toy, real = _model(str(place.checkpoints)), _model("./checkpoints")
    songs, tensors, output = str(place.songs), str(place.tensors), str(place.output)
    curves = place.output / "runs"
    return (
        Step(
            title="Collect what is known about the songs",
            before="Captions, lyrics and tempo lie beside the songs in small text files. build-dataset gathers them, "
            "and looks for what is wrong with the audio.",
            words=("build-dataset", "--input", songs),
            after=lambda: f"What is known about the songs is now in one file, {DATASET_FILE}, to be read and edited.",
            real=("build-dataset", "--input", "./my_songs"),
        ),
        Step(
            title="Preprocess: from audio and words to tensors",
            before="The model reads no audio but latents, 25 frames of 64 numbers a second. The VAE encodes the audio, "
            "the text encoder captions and lyrics: once, so that training needs neither.",
            words=("fixed", "--preprocess", "--audio-dir", songs, "--tensor-output", tensors, *toy),
            after=lambda: (
                "Each song is now a tensor file with all that training reads. The same command again encodes "
                "only songs that are new or changed."
            ),
            real=("fixed", "--preprocess", "--audio-dir", "./my_songs", "--tensor-output", "./my_tensors", *real),
        ),
        Step(
            title="Train an adapter",
            before="The model stays as it is. A LoRA, a small set of numbers beside its attention layers, learns to "
            "turn noise into these songs.",
            words=("fixed", *toy, "--dataset-dir", tensors, "--output-dir", output, *_settings_for_a_toy()),
            after=lambda: (
                f"The loss, {_loss_after(place, 1)} in the first epoch, was {_loss_after(place, EPOCHS)} in "
                f"the last. Its curves:\n  {shell_line([*program_words('tensorboard'), '--logdir', curves])}"
            ),
            real=("fixed", *real, "--dataset-dir", "./my_tensors", "--output-dir", "./output/my_lora"),
        ),
        Step(
            title="Resume, and train for longer",
            before=f"The run goes on from its newest checkpoint, with the settings, the optimizer and the dice as they "
            f"were: {MORE_EPOCHS} epochs in place of {EPOCHS}. A run that was stopped by Ctrl-C goes on in the same "
            "way, without --epochs.",
            words=("fixed", "--resume-from", output, "--epochs", str(MORE_EPOCHS)),
            after=lambda: (
                f"The loss is now {_loss_after(place, MORE_EPOCHS)}. The new adapter took the old one's "
                "place; that one is still in its checkpoint."
            ),
            real=("fixed", "--resume-from", "./output/my_lora", "--epochs", "150"),
        ),
    )


def _model(checkpoints: str) -> tuple[str, ...]:
    return ("--checkpoint-dir", checkpoints, "--model-variant", VARIANT)


def _settings_for_a_toy() -> tuple[str, ...]:
    """What suits a toy that is trained for seconds: less rank, larger steps. A real model has use for the defaults."""
    return (
        *("--run-name", ADAPTER, "--epochs", str(EPOCHS), "--rank", "8", "--alpha", "16"),
        *("--learning-rate", "0.003", "--warmup-steps", "5", "--gradient-accumulation", "1", "--num-workers", "0"),
    )


def _loss_after(place: Place, epoch: int) -> str:
    """Read the mean loss of an epoch from the run's metrics."""
    lines = (place.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = (json.loads(line) for line in lines)
    (loss,) = (event["loss"] for event in events if event["event"] == "epoch_done" and event["epoch"] == epoch)
    return f"{loss:.2f}"


def _introduce(console: Console, place: Place) -> None:
    console.print("From a folder of songs to an adapter, on a toy", style="bold")
    console.print()
    console.print(
        "The model below is a toy: random weights, thousands of times fewer than the real one has; the songs are a "
        "little arithmetic. The steps are the real ones, but what comes out is noise, not music. Nothing is "
        "downloaded, and your settings are not touched."
    )
    console.print()
    console.print(f"All of it goes into {place.folder}. It takes about a minute.")


def _go(console: Console, place: Place, screen: GlobalConfig) -> int:
    """Take the steps one after the other; returns the exit code of the one that failed, else 0."""
    _make_toys(console, place)
    for number, step in enumerate(commands(place), start=2):
        code = _carry_out(console, number, step, screen)
        if code:
            return code
    open_log(place.folder / LOG_NAME)
    _render(console, place)
    return 0


def _make_toys(console: Console, place: Place) -> None:
    from sidestep.demo.checkpoint import build_toy_checkpoint
    from sidestep.demo.songs import write_toy_songs

    build_toy_checkpoint(place.checkpoints, variant=VARIANT, seed=SEED)
    songs = write_toy_songs(place.songs, seed=SEED, seconds=SONG_SECONDS)
    size = sum(file.stat().st_size for file in place.checkpoints.rglob("*") if file.is_file())
    rows = [
        (str(place.checkpoints), f"the toy checkpoint, {size / 1e6:.0f} MB"),
        (str(place.songs), f"{len(songs)} songs of 3 seconds, with captions and lyrics"),
    ]
    console.table("", rows)
    console.print()
    console.print("For the real model and your own music, download the one and bring the other:", style="dim")
    for fetch in fetches_for(Path("checkpoints"), ("base",)):
        console.print(f"  {fetch.command}", style="dim", wrap=False)


def _carry_out(console: Console, number: int, step: Step, screen: GlobalConfig) -> int:
    """Say what a step does, run its command as if it had been typed, and say what it did; returns its exit code."""
    _title(console, number, step.title)
    console.print(step.before)
    console.print()
    _show_command(console, step.words, style="cyan")
    console.print()
    typed = parse(step.words)
    if typed.command == "build-dataset":
        config = build(BuildDatasetConfig, parse_values(BuildDatasetConfig, typed.values))
        with open_screen(console) as emit:
            code = build_dataset.run(config, emit=emit, console=console)
    else:
        assert typed.command is not None
        code = train.run(typed.command, typed.values, screen=screen, remembers=False)
    if code:
        return code
    console.print()
    console.print("\n".join(console.way_out(step.after())), wrap=False)
    console.print()
    console.print("With the real model and your own music:", style="dim")
    _show_command(console, step.real, style="dim")
    return 0


def _render(console: Console, place: Place) -> None:
    _title(console, STEPS, "Hear it: the adapter in another program")
    console.print(
        "diffusers, a library that knows nothing of Side-Step, loads the toy model and renders a second of sound from "
        "the first song's caption and lyrics: once as it is, and once more, from the same noise, with the adapter."
    )
    console.print()
    from sidestep.demo.render import render_with_and_without
    from sidestep.model.device import choose_device, choose_dtype

    device = choose_device("auto")
    rendering = render_with_and_without(
        find_checkpoint(place.checkpoints, VARIANT),
        place.adapter,
        read_dataset(place.songs / DATASET_FILE).tracks[0],
        folder=place.folder / "sound",
        seconds=RENDERED_SECONDS,
        seed=SEED,
        device=device,
        dtype=choose_dtype("auto", device),
    )
    rows = [("without", str(rendering.without_adapter)), ("with", str(rendering.with_adapter))]
    console.table("", rows)
    console.print()
    console.print(
        f"The adapter changes the sound: the two differ by {rendering.difference:.0%} (RMS of the difference, over the "
        "RMS of the sound without it)."
    )
    console.print()
    console.print("With the real model, in Python; ComfyUI and acestep.cpp load the same folder:", style="dim")
    for line in _real_rendering():
        console.print(f"  {line}", style="dim", wrap=False)


def _real_rendering() -> Iterator[str]:
    yield 'pipeline = AceStepPipeline.from_pretrained("THE_MODEL_IN_DIFFUSERS_LAYOUT")'
    yield 'pipeline.load_lora_weights("output/my_lora/NAME_OF_THE_ADAPTER")'
    yield 'pipeline(prompt="...", lyrics="...", audio_duration=60).audios'


def _conclude(console: Console, place: Place, *, seconds: float) -> None:
    console.print()
    console.print(f"That was the whole way, in {duration(seconds)}.", style="bold")
    console.print(f"Delete {place.folder} whenever you like. Your own music comes next: the commands are above.")


def _title(console: Console, number: int, text: str) -> None:
    console.print()
    console.heading(f"[{number}/{STEPS}] {text}")


def _show_command(console: Console, words: Sequence[str], *, style: str) -> None:
    """Print what to type, broken where a shell reads on; in one line where it would not (Windows)."""
    for line in command_lines(words, width=LINE if os.name == "posix" else 10_000):
        console.print(f"  {line}", style=style, wrap=False)


def command_lines(words: Sequence[str], *, width: int) -> Iterator[str]:
    r"""Yield a command in lines of at most `width` characters that end in \ where it goes on; never splits a flag
    from its value.
    """
    line = shell_line((*start_words(), words[0]))
    for argument in _arguments(words[1:]):
        if len(line) + len(argument) + 3 > width:
            yield f"{line} \\"
            line = f"  {argument}"
        else:
            line = f"{line} {argument}"
    yield line


def _arguments(words: Sequence[str]) -> Iterator[str]:
    """Yield each flag together with its value."""
    argument: list[str] = []
    for word in words:
        if word.startswith("--") and argument:
            yield shell_line(argument)
            argument = []
        argument.append(word)
    if argument:
        yield shell_line(argument)
