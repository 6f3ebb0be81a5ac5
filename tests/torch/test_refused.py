"""What is left of a command that is refused: what was there before, and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

from sidestep.demo.songs import write_toy_songs
from sidestep.main import main
from sidestep.model.checkpoint import Checkpoint
from sidestep.ui.problems import close_log
from tests.torch.tiny import write_songs


def refused(tmp_path: Path, base: Checkpoint, output: Path) -> int:
    """Train on songs one of which is no tensor file, which is found when torch is there."""
    songs = write_songs(tmp_path / "songs", base, (20, 20))
    (songs / "song_1.pt").write_bytes(b"nothing")
    return main(["fixed", "-c", str(base.root), "-M", "base", "-d", str(songs), "-o", str(output), "--plain"])


def test_a_refused_run_leaves_no_folder(tmp_path: Path, base: Checkpoint):
    (tmp_path / "output").mkdir()
    assert refused(tmp_path, base, tmp_path / "output" / "deep" / "run") == 1
    assert (tmp_path / "output").is_dir(), "that one was there before"
    assert not (tmp_path / "output" / "deep").exists()


def test_a_refused_run_leaves_a_folder_as_it_was(tmp_path: Path, base: Checkpoint):
    output = tmp_path / "run"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    assert refused(tmp_path, base, output) == 1
    assert [path.name for path in output.iterdir()] == ["notes.txt"]


def test_a_refused_run_adds_to_a_log_that_is_there(tmp_path: Path, base: Checkpoint):
    output = tmp_path / "run"
    output.mkdir()
    (output / "sidestep.log").write_text("an earlier run\n")
    assert refused(tmp_path, base, output) == 1
    close_log()
    text = (output / "sidestep.log").read_text()
    assert text.startswith("an earlier run\n") and "song_1.pt" in text


@pytest.mark.parametrize("command", ["preprocess", "estimate"])
def test_other_commands_that_are_refused_leave_no_folder(tmp_path: Path, base: Checkpoint, command: str):
    model = ["-c", str(base.root), "-M", "base"]
    if command == "preprocess":
        (tmp_path / "silent").mkdir()
        words = ["fixed", "--preprocess", "--audio-dir", str(tmp_path / "silent"), "--tensor-output"]
    else:
        songs = write_songs(tmp_path / "songs", base, (20,))
        (songs / "song_0.pt").write_bytes(b"nothing")
        words = ["estimate", "-d", str(songs), "--output"]
    assert main([*words, str(tmp_path / "new" / "map.json"), *model]) == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--init-from", "nowhere"], "There is no adapter nowhere: no such file or folder."),
        (["--init-from", str(Path(__file__).parent)], f"{Path(__file__).parent} holds no safetensors file."),
        (["--rank-map", "nowhere.json"], "There is no rank map nowhere.json"),
        (
            ["--sample-every-n-epochs", "1", "--sample-prompts", "nowhere.txt"],
            "The prompts in nowhere.txt cannot be read: No such file or directory.",
        ),
    ],
)
def test_what_a_run_is_to_read_is_looked_for_before_songs_are_encoded(
    tmp_path: Path, base: Checkpoint, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    write_toy_songs(tmp_path / "songs", seed=1, seconds=(1.0, 1.0))
    folders = ["--audio-dir", str(tmp_path / "songs"), "--tensor-output", str(tmp_path / "tensors")]
    model = ["-c", str(base.root), "-M", "base", "-o", str(tmp_path / "run")]
    assert main(["fixed", "--preprocess", *folders, *model, *words]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "tensors").exists() and not (tmp_path / "run").exists()


def test_preprocessing_that_is_stopped_says_how_it_goes_on(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stopped(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sidestep.preprocess.run.preprocess", stopped)
    write_toy_songs(tmp_path / "songs", seed=1, seconds=(1.0, 1.0))
    folders = ["--audio-dir", str(tmp_path / "songs"), "--tensor-output", str(tmp_path / "tensors")]
    assert main(["fixed", "--preprocess", *folders, "-c", str(base.root), "-M", "base"]) == 130
    said = capsys.readouterr()
    assert said.out.endswith("Songs that were encoded are kept: the same command goes on with the others.\n")
    assert said.err.endswith("Stopped.\n")


def test_a_run_that_began_keeps_its_log(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (20, 20))
    words = ["-c", str(base.root), "-M", "base", "-d", str(songs), "-o", str(tmp_path / "run"), "--lr", "1e30"]
    assert main(["fixed", *words, "--warmup-steps", "0", "--num-workers", "0", "--plain"]) == 1
    assert "no longer a finite number" in (tmp_path / "run" / "sidestep.log").read_text()


HOLDING = "from pathlib import Path; import sys; from sidestep.commands.output import alone_in, log_in\n\
with log_in(Path(sys.argv[1])), alone_in(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


def test_a_run_is_refused_where_another_one_is_at_work_until_that_is_gone(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sidestep.commands.output.WAIT", 0)
    songs, output = write_songs(tmp_path / "songs", base, (20, 20)), tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        words = ["fixed", "-c", str(base.root), "-M", "base", "-d", str(songs), "-o", str(output), "--epochs", "1"]
        assert main([*words, "--num-workers", "0", "--plain"]) == 2
        assert f"Another run is writing to {output}." in capsys.readouterr().err
        assert [path.name for path in output.iterdir()] == ["sidestep.log"]
        other.kill()  # The lock ends with the process, however that ends.
    assert main([*words, "--num-workers", "0", "--plain"]) == 0
