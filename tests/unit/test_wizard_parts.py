"""The wizard's parts by themselves: first start, fetching, plain prompts, paths, the machine."""

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from sidestep.config.places import remembered
from sidestep.errors import RunError
from sidestep.ui.asker import GoBack, Prompt
from sidestep.ui.console import open_console
from sidestep.ui.download import Fetch, fetch, fetches_for
from sidestep.ui.machine import Gpu, find_gpus
from sidestep.ui.paths import PathCompleter, beside, count_tensors, free_name, read_path, what_is_wrong_with_output
from sidestep.ui.plain_asker import PlainAsker
from sidestep.ui.questions import Choice
from sidestep.ui.wizard import Wizard
from tests.unit.stage import (
    DOWN,
    ENTER,
    LEAVE,
    SPACE,
    UP,
    NoHub,
    Stage,
    down,
    make_models,
    plain_lines,
    silent_console,
    stage,
    typed,
)
from tests.unit.terminal import Terminal

__all__ = ["stage"]
CHOICES = [
    Choice(value=None, title="nothing"),
    Choice(value=2, title="Two", note="a pair"),
    Choice(value=3, title="三"),
]


class FakeHub:
    """A hub with two files in each repository; `arrives` says how much of the second one comes."""

    def __init__(self, arrives: int = 3) -> None:
        self.arrives = arrives
        self.asked: list[str] = []

    def sizes(self, repository: str) -> dict[str, int]:
        language_model = {} if "v15-" in repository else {"acestep-5Hz-lm-1.7B/model.safetensors": 9}
        return {"config.json": 2, "deep/model.safetensors": 3, **language_model}

    def download(self, repository: str, folder: Path, without: Sequence[str]) -> None:
        self.asked.append(repository)
        (folder / "deep").mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        (folder / "deep" / "model.safetensors").write_bytes(b"x" * self.arrives)


@pytest.fixture
def new_machine(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A machine on which no model is known."""
    monkeypatch.delenv("SIDESTEP_CHECKPOINT_DIR")
    return stage


def test_the_first_start_shows_the_gpu_what_fits_it_and_the_commands(new_machine: Stage):
    new_machine.gpus = (Gpu("GeForce RTX 4090", 24),)
    code, screen = new_machine.play()
    assert code == 130
    assert "GPU: GeForce RTX 4090, 24 GB (preset vram_24gb_plus)" in screen
    assert "hf download ACE-Step/Ace-Step1.5 --local-dir checkpoints --exclude 'acestep-5Hz-lm-*/*'" in screen
    assert "hf download ACE-Step/acestep-v15-base --local-dir checkpoints/acestep-v15-base" in screen


def test_the_first_start_says_nothing_about_a_gpu_it_does_not_know(new_machine: Stage):
    assert "GPU" not in new_machine.play()[1]


def test_the_first_start_takes_the_folder_and_remembers_it(new_machine: Stage):
    models = new_machine.folder / "models"
    one = models / "acestep-v15-base"
    _, screen = new_machine.play(ENTER, typed(one), typed(models), LEAVE)
    assert f"the folder above it has: {models}" in " ".join(screen.split())
    assert "Models: turbo, base." in screen
    assert remembered()["checkpoint_dir"] == str(models)


def test_the_first_start_can_be_put_off(new_machine: Stage):
    code, _ = new_machine.play(down(2), UP + ENTER)
    assert code == 0


def test_models_are_fetched_and_checked(new_machine: Stage):
    hub = FakeHub()
    # The suggestion base stays marked, sft is added.
    _, screen = new_machine.play(down(1), DOWN * 2 + SPACE + ENTER, typed("here"), LEAVE, hub=hub)
    assert hub.asked == ["ACE-Step/Ace-Step1.5", "ACE-Step/acestep-v15-base", "ACE-Step/acestep-v15-sft"]
    assert "ACE-Step/acestep-v15-sft is whole: 2 files" in screen
    assert remembered()["checkpoint_dir"] == str(new_machine.folder / "here")


def test_a_fetch_that_fails_says_how_to_go_on_and_offers_again(new_machine: Stage):
    hub = FakeHub(arrives=1)
    code, screen = new_machine.play(down(1), ENTER, typed("here"), LEAVE, hub=hub)
    words = " ".join(screen.split())
    assert "ACE-Step/Ace-Step1.5 is not whole in here: deep/model.safetensors." in words
    assert "it goes on where it stopped:" in words and "hf download ACE-Step/Ace-Step1.5 --local-dir here" in words
    assert code == 130 and "checkpoint_dir" not in remembered()


def test_what_is_whole_is_not_fetched_again(tmp_path: Path):
    hub, said = FakeHub(), []
    each = Fetch(repository="a/b", folder=tmp_path, without=("acestep-5Hz-lm-*",))
    fetch(each, hub, say=said.append)
    fetch(each, hub, say=said.append)
    assert hub.asked == ["a/b"]
    assert said[-1] == "a/b is whole: 2 files, each in its full size."


def test_a_file_cut_short_is_found_and_fetched_again(tmp_path: Path):
    each = Fetch(repository="a/b", folder=tmp_path, without=("acestep-5Hz-lm-*",))
    with pytest.raises(RunError, match="not whole"):
        fetch(each, FakeHub(arrives=2), say=lambda text: None)
    fetch(each, FakeHub(), say=lambda text: None)


def test_turbo_needs_no_repository_beside_the_main_one():
    assert [each.repository for each in fetches_for(Path("c"), ["turbo"])] == ["ACE-Step/Ace-Step1.5"]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("  'a b/c' ", Path("a b/c")),
        ('"a b"', Path("a b")),
        (r"'/dragged/it'\''s mine'", Path("/dragged/it's mine")),
        ("""'/copied/it'"'"'s mine'/""", Path("/copied/it's mine")),
        ("'it's mine'", Path("it's mine")),
        ("'Rock 'n' Roll'", Path("Rock 'n' Roll")),
        ("it's mine", Path("it's mine")),
        ("~/x", Path.home() / "x"),
        (r"/dragged/my\ songs\ \(1\) ", Path("/dragged/my songs (1)")),
        ("file:///dragged/my%20songs", Path("/dragged/my songs")),
        ("夜の歌/שיר", Path("夜の歌/שיר")),
    ],
)
def test_paths_are_read_as_people_give_them(text: str, path: Path):
    assert read_path(text, is_windows=False) == path


def test_backslashes_of_windows_stay():
    assert str(read_path(r"C:\Users\me\my songs", is_windows=True)) == r"C:\Users\me\my songs"


@pytest.mark.parametrize("text", ["", "  ", "''", "a\0b"])
def test_no_path_is_no_answer(text: str):
    with pytest.raises(ValueError, match="A path is needed here"):
        read_path(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("~nobody-of-this-name/x", "There is no user ~nobody-of-this-name here."),
        ("n" * 300, "cannot be used: File name too long."),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="Windows words it otherwise")
def test_a_path_that_the_system_refuses_is_a_wrong_answer_and_no_end(stage: Stage, text: str, reason: str):
    with pytest.raises(ValueError, match=re.escape(reason)):
        read_path(text)
    songs = stage.songs()
    _, screen = stage.play(down(2), f"{text}\t{ENTER}", typed(songs), ENTER, ENTER)
    assert "".join(reason.split()) in "".join(screen.split())
    assert stage.started[0].values["input"] == songs


def test_a_drive_that_is_not_there_is_a_wrong_answer_and_no_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "exists", lambda path: False)  # As for E:\ without its stick.
    assert what_is_wrong_with_output(Path("runs")) == f"There is no {Path.cwd().anchor} here."


def test_tab_completes_folders_behind_quotes_and_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my songs").mkdir()
    (tmp_path / "my.txt").touch()
    (tmp_path / ".hidden").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))

    def completions(text: str, *, only_folders: bool = True) -> list[str]:
        found = PathCompleter(only_folders=only_folders).get_completions(Document(text), CompleteEvent())
        return [completion.text for completion in found]

    assert completions(f"{tmp_path}/my") == [" songs/"]
    assert completions(f"'{tmp_path}/my") == [" songs/"]
    assert completions("~/m") == ["y songs/"]
    assert completions(f"{tmp_path}/m", only_folders=False) == ["y songs/", "y.txt"]
    assert completions(f"{tmp_path}/") == ["my songs/"]
    assert completions(f"{tmp_path}/nowhere/") == []


def test_tensors_are_counted_by_the_manifest_or_by_files(tmp_path: Path):
    for name in ("a.pt", "b.pt", "c.tmp.pt"):
        (tmp_path / name).touch()
    assert count_tensors(tmp_path) == 2
    (tmp_path / "manifest.json").write_text('{"samples": ["a.pt", "b.pt", "d/e.pt"]}')
    assert count_tensors(tmp_path) == 3
    (tmp_path / "manifest.json").write_text("{")
    assert count_tensors(tmp_path) == 2
    assert count_tensors(tmp_path / "nowhere") == 0


def test_names_beside_and_free(tmp_path: Path):
    assert beside(Path("a/songs"), "tensors") == Path("a/songs_tensors")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora_2").mkdir()
    assert free_name(tmp_path / "lora") == tmp_path / "lora_3"
    assert free_name(tmp_path / "new") == tmp_path / "new"


@pytest.mark.parametrize(
    ("line", "gpus"),
    [
        ("NVIDIA GeForce RTX 4090, 24564\n", [Gpu("NVIDIA GeForce RTX 4090", 24)]),
        ("Card, with comma, 8188\nOther, 12282\n", [Gpu("Card, with comma", 8), Gpu("Other", 12)]),
        ("GRID, [N/A]\n", []),
        ("", []),
    ],
)
def test_the_drivers_tool_is_read(line: str, gpus: list[Gpu], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.which", lambda name: name)
    assert find_gpus(lambda *words, **options: subprocess.CompletedProcess(words, 0, line)) == gpus


@pytest.mark.parametrize("failure", [OSError(), subprocess.TimeoutExpired("nvidia-smi", 5)])
def test_a_driver_that_does_not_answer_is_not_known(failure: Exception, monkeypatch: pytest.MonkeyPatch):
    def fail(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
        raise failure

    monkeypatch.setattr("shutil.which", lambda name: name)
    assert find_gpus(fail) == []


@pytest.mark.parametrize(
    ("memory", "preset"),
    [(4, ""), (6, "vram_6gb"), (8, "vram_8gb"), (11, "vram_10gb"), (16, "vram_16gb"), (80, "vram_24gb_plus")],
)
def test_each_size_of_memory_has_its_preset(memory: int, preset: str):
    assert Gpu("Card", memory).preset == preset


def test_plain_prompts_take_enter_numbers_and_words():
    asker = PlainAsker(silent_console(), read=plain_lines("", "9", "two", "", "1 3", "-", ""))
    assert asker.text(Prompt("Rank"), "64") == "64"
    assert asker.choose(Prompt("Which"), CHOICES, 3) == 2
    assert asker.choose(Prompt("Which"), CHOICES, None) is None
    assert asker.mark(Prompt("Which"), CHOICES, ()) == (None, 3)
    assert asker.mark(Prompt("Which"), CHOICES, (2,)) == ()
    assert asker.mark(Prompt("Which"), CHOICES, (2,)) == (2,)


def test_plain_prompts_go_back_empty_a_line_and_end_with_the_input():
    asker = PlainAsker(silent_console(), read=plain_lines("<", "-", "<"))
    with pytest.raises(GoBack):
        asker.text(Prompt("Tag"), "old")
    assert asker.text(Prompt("Tag"), "old") == ""
    with pytest.raises(GoBack):
        asker.choose(Prompt("Which"), CHOICES, 2)
    with pytest.raises(KeyboardInterrupt):
        asker.text(Prompt("Tag"), "old")


def test_the_whole_wizard_works_with_plain_prompts_and_no_escape_codes(stage: Stage):
    songs = stage.songs("歌 שיר")
    screen = Terminal()
    console = open_console(plain=True, stream=screen)
    # Build dataset: back from the tag to the folder, accepted as it is; then a tag, start, exit.
    read = plain_lines("3", "nowhere", str(songs), "<", "", "mytag", "1", "2")
    wizard = Wizard(PlainAsker(console, read=read), console, start=stage.start, hub=NoHub(), find_gpus=lambda: ())
    assert wizard.run() == 0
    assert stage.started[0].values == {"input": songs, "tag": "mytag"}
    assert "\x1b" not in screen.getvalue()
    assert "nowhere does not exist." in screen.getvalue()


def test_narrow_terminals_and_wide_names_are_no_problem(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "30")
    make_models(stage.folder / "models", "夜の歌" * 12)
    data = stage.tensors("שירים של " + "לילה" * 5)
    _, screen = stage.play(ENTER, ENTER, ENTER, ENTER, ENTER, typed(data), *[ENTER] * 9)
    assert "Ready?" not in screen  # It is a prompt, which goes away; the review stays.
    assert "What happens" in screen
