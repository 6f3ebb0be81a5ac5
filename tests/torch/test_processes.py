"""Several processes train as one does: started for real, by torchrun and by accelerate, with gloo on the CPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sidestep.commands.train import run
from sidestep.config.flags import GlobalConfig
from sidestep.config.processes import Place, Processes, Word, launched_place
from sidestep.config.runs import checkpoints_in
from sidestep.errors import ConfigError, DataError, ElsewhereError, LostProcessError, RunError
from sidestep.main import main
from sidestep.model.checkpoint import Checkpoint
from sidestep.training.processes import JoinedProcesses, joined
from tests.torch.test_interrupts import REPOSITORY, Command
from tests.torch.tiny import RUN_NAME, adapter_tensors, read_state, train, write_songs
from tests.torch.together import CONFIG, FEW_GRAPHS, FRAMES, seen

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
# Sums of the same float32 numbers in another order.
CLOSE = {"atol": 2e-6, "rtol": 1e-4}


@dataclass(frozen=True, slots=True)
class Left:
    """What two processes left of each scenario of `together`."""

    folder: Path
    checkpoint: Checkpoint

    def __call__(self, name: str) -> tuple[Any, Any]:
        """Give what the first and the second process found."""
        first, second = (torch.load(self.folder / f"{name}_{rank}.pt", weights_only=True) for rank in range(2))
        return first, second

    def alone(self, *, songs: str = "songs", **changes: Any) -> dict[str, Any]:
        """Train the same in this process, with twice the passes."""
        config = replace(CONFIG, gradient_accumulation=4, **changes)
        return seen(train(config, self.checkpoint, self.folder / songs, self.folder / f"{songs}_alone"))


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory, base: Checkpoint) -> Left:
    """Have two processes go through all scenarios, once."""
    folder = tmp_path_factory.mktemp("together")
    write_songs(folder / "songs", base, FRAMES, rows=(9, 12))
    write_songs(folder / "alike", base, (30,) * 4)
    subprocess.run(
        [sys.executable, *TORCHRUN, "-m", "tests.torch.together", str(base.root), str(folder)],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True,
    )  # fmt: skip
    return Left(folder, base)


def assert_same_run(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Assert that two runs had the same losses, gradients, held-out losses and weights, but for rounding."""
    assert found["reason"] == expected["reason"]
    for name in ("losses", "epochs"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    for name in ("layers", "bands"):
        assert len(found[name]) == len(expected[name])
        for one, other in zip(found[name], expected[name], strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-7)
    assert [best for *_, best in found["held_out"]] == [best for *_, best in expected["held_out"]]
    for name in ("weights", "average"):
        torch.testing.assert_close(found[name], expected[name], **CLOSE)


def test_two_processes_train_to_what_one_does_with_twice_the_accumulation(left: Left):
    first, second = left("plain")
    alone = left.alone()
    assert len(alone["bands"]) == 3 and len(alone["layers"]) == 2
    assert len(alone["losses"]) == 4  # Two steps an epoch; the last of them has one batch for two processes.
    assert max(weight.abs().max() for name, weight in alone["weights"].items() if "lora_B" in name) > 1e-3
    assert_same_run(first, alone)
    # Among themselves they differ in nothing but in who writes.
    for name in ("losses", "epochs", "layers", "held_out", "bands"):
        assert first[name] == second[name]
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    assert first["written"] == alone["written"]
    assert not second["written"]
    assert first["batch"] == "1 x 2 x 2 processes = 4 samples a step"


def test_every_batch_is_read_by_one_process(left: Left):
    first, second = left("read")
    layout = train_plan(left)[1:]
    assert [name for batch in layout[::2] for name in batch] == [name for batch in first for name in batch]
    assert [name for batch in layout[1::2] for name in batch] == [name for batch in second for name in batch]
    assert len(first) + len(second) == len(layout) == 6


def train_plan(left: Left) -> list[list[str]]:
    """Give the names of the songs in each batch of the second epoch, as one process has them."""
    from tests.torch.tiny import prepare

    config = replace(CONFIG, val_split=0.0, epochs=3)
    run = prepare(config, left.checkpoint, left.folder / "songs", left.folder / "prepared_alone")
    return [list(batch.names) for batch in run.batches.epoch(1)]


def test_patience_ends_all_at_the_same_epoch(left: Left):
    first, second = left("patience")
    assert first["reason"] == second["reason"] == "early_stop"
    assert len(first["epochs"]) == len(second["epochs"]) == 3


@pytest.mark.parametrize("name", ["sharded", "compiled"])
def test_a_base_spread_over_processes_trains_to_the_same_and_each_holds_its_half(left: Left, name: str):
    first, second = left(name)
    alone = left.alone() if name == "sharded" else left.alone(songs="alike", **FEW_GRAPHS)
    for process in (first, second):
        assert_same_run(process, alone)
        assert process["is_compiled"] == (name == "compiled")
        assert process["base"] == pytest.approx(alone["base"] / 2, rel=0.05)
    assert first["base"] + second["base"] == alone["base"]


def test_what_is_too_large_for_one_process_is_made_smaller_in_all(left: Left):
    first, second = left("room")
    # From 4 samples in 2 passes of 2 processes to 1 sample in 8.
    assert first == second == {"batch_size": 1, "passes": 16}


def test_one_that_fails_before_it_has_a_device_is_not_waited_for(left: Left):
    assert left("early") == ("ElsewhereError", "ElsewhereError")


def test_a_process_that_fails_ends_all_and_what_was_done_is_kept(left: Left):
    first, second = left("error")
    assert second[0] == "NoRoomError" and "out of memory" in second[1]
    assert first[0] == "ElsewhereError"
    (saved,) = checkpoints_in(left.folder / "failed")
    assert read_state(saved)["state"]["step"] == 2


# As users start it


def typed(tmp_path: Path, checkpoint: Checkpoint, songs: Path, output: str, *more: str) -> list[str]:
    """Give the words of a run of seven songs."""
    arguments = {
        "--checkpoint-dir": checkpoint.root, "--model-variant": checkpoint.variant, "--dataset-dir": songs,
        "--output-dir": tmp_path / output, "--run-name": RUN_NAME, "--device": "cpu", "--rank": 4,
        "--learning-rate": 0.001, "--warmup-steps": 2, "--log-every": 1,
    }  # fmt: skip
    return ["fixed", *(str(word) for pair in arguments.items() for word in pair), *more]


def test_sigterm_saves_once_and_one_process_goes_on_to_the_same_adapter(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, FRAMES)
    more = ["--epochs", "8", "--num-workers", "0"]
    words = typed(tmp_path, base, songs, "two", "--gradient-accumulation", "2", *more)
    command = Command(*words, home=tmp_path / "home", launcher=TORCHRUN)
    command.read_until("Step 3/")
    command.send(15)
    assert command.finish() != 0  # torchrun's own.
    assert command.output.count("1 x 2 x 2 processes = 4 samples a step") == 1
    assert command.output.count("Stopping: this step is finished and saved first.") == 1
    assert command.output.count("Saved a checkpoint") == 1
    (saved,) = checkpoints_in(tmp_path / "two")
    state = read_state(saved)["state"]
    assert 3 <= state["step"] < 16 and state["processes"] == 2

    assert main(["fixed", "--resume-from", str(tmp_path / "two"), "--plain"]) == 0
    assert main(typed(tmp_path, base, songs, "one", "--gradient-accumulation", "4", *more)) == 0
    expected = adapter_tensors(tmp_path / "one" / RUN_NAME)
    torch.testing.assert_close(adapter_tensors(tmp_path / "two" / RUN_NAME), expected, **CLOSE)
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "metrics"] == list(range(1, 17))
    facts = [line["facts"]["Batch"] for line in lines if line["event"] == "run_started"]
    assert facts[1] == "1 x 2 x 2 processes = 4 samples a step, made by 1 process"


def test_an_error_of_one_process_is_told_once(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, FRAMES)
    words = typed(tmp_path, base, songs, "run", "--gradient-accumulation", "1", "--num-workers", "1")
    command = Command(*words, home=tmp_path / "home", launcher=ACCELERATE)
    command.read_until("Step 2/")
    for song in songs.glob("*.pt"):
        song.write_bytes(b"PK\x03\x04 and nothing more")
    assert command.finish() != 0
    (error,) = [line for line in command.output.splitlines() if line.startswith("Error: ")]
    assert "song_" in error
    assert command.output.count("Saved a checkpoint") == 1
    assert checkpoints_in(tmp_path / "run")


def damage_a_song(songs: Path, command: Command) -> None:
    """Damage one song, which one of the processes is to read."""
    (songs / "song_0.pt").write_bytes(b"PK\x03\x04 and nothing more")


def kill_the_second(songs: Path, command: Command) -> None:
    """Kill the second process, as the system does when main memory runs out."""
    (second,) = (child for child in psutil.Process(command.process.pid).children() if child.environ()["RANK"] == "1")
    second.kill()


@pytest.mark.parametrize(
    ("harm", "error"),
    [(damage_a_song, "song_0.pt cannot be read"), (kill_the_second, "Another process of this run has ended")],
)
def test_one_that_is_missed_where_the_base_is_spread_ends_all_and_what_was_done_is_kept(
    tmp_path: Path, base: Checkpoint, harm: Callable[[Path, Command], None], error: str
):
    songs = write_songs(tmp_path / "songs", base, FRAMES[:6])  # As many for each.
    more = ["--gradient-accumulation", "1", "--num-workers", "0", "--shard-base"]
    command = Command(*typed(tmp_path, base, songs, "run", *more), home=tmp_path / "home", launcher=TORCHRUN)
    command.read_until("Step 2/")
    harm(songs, command)
    assert command.finish() != 0
    (told,) = [line for line in command.output.splitlines() if line.startswith(("Error: ", "This is a bug"))]
    assert error in told
    assert command.output.count("Saved a checkpoint") == 1
    (saved,) = checkpoints_in(tmp_path / "run")
    assert read_state(saved)["state"]["step"] >= 2


def test_the_prompts_of_samples_have_to_be_where_they_are_rendered_and_nowhere_else(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    def loaded(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sidestep.commands.train.load_libraries", loaded)
    _, *words = typed(tmp_path, base, write_songs(tmp_path / "songs", base, FRAMES), "run")
    values = {flag.lstrip("-").replace("-", "_"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
    values |= {"sample_every_n_epochs": "1", "sample_prompts": str(tmp_path / "of the first machine.txt")}
    with pytest.raises(DataError, match="cannot be read"):
        run("fixed", values, screen=GlobalConfig(), processes=Processes(count=2))
    with pytest.raises(KeyboardInterrupt):
        run("fixed", values, screen=GlobalConfig(), processes=Processes(rank=1, local_rank=1, count=2))


def test_a_run_of_several_that_is_stopped_while_it_starts_goes_on_in_as_many(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    songs = write_songs(tmp_path / "songs", base, FRAMES)
    assert main(typed(tmp_path, base, songs, "run", "--max-steps", "1")) == 0
    monkeypatch.setattr("sidestep.commands.train.load_libraries", stopped)
    with pytest.raises(KeyboardInterrupt):
        run("fixed", {"resume_from": str(tmp_path / "run")}, screen=GlobalConfig(), processes=Processes(count=2))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "--resume-from" in line]
    assert "torchrun --standalone --nproc-per-node 2 " in line


def test_an_exchange_that_breaks_off_is_the_end_of_another_process(monkeypatch: pytest.MonkeyPatch):
    processes = JoinedProcesses(0, 0, 2, meetings=torch.distributed.ProcessGroup(0, 2))
    said = iter([(Word.FINE, Word.FINE), (Word.FINE, Word.FAILED), (Word.FINE, Word.FINE), (Word.FINE, Word.FINE)])
    monkeypatch.setattr(JoinedProcesses, "_exchange", lambda *_: list(next(said)))
    broken = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    with pytest.raises(ElsewhereError), processes.needing_all():
        raise broken
    with pytest.raises(LostProcessError), processes.needing_all():
        raise broken


def test_a_launcher_is_known_by_its_environment():
    launched = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    assert launched_place(launched) == Place(rank=3, local_rank=1, count=4)
    assert launched_place({}) is None
    assert launched_place({**launched, "RANK": "0", "WORLD_SIZE": "1"}) is None
    assert launched_place({"WORLD_SIZE": "4"}) is None  # Some clusters set it in every shell.
    with pytest.raises(ConfigError, match="LOCAL_RANK"):  # Or each of them would train a whole run by itself.
        launched_place({name: value for name, value in launched.items() if name != "LOCAL_RANK"})
    assert launched_place({**launched, "RANK": "", "WORLD_SIZE": ""}) is None
    with pytest.raises(ConfigError, match="not MASTER_ADDR"):
        launched_place({**launched, "MASTER_ADDR": ""})
    for wrong in ({"RANK": "x"}, {"RANK": "4"}, {"MASTER_PORT": "x"}, {"MASTER_PORT": "99999"}, {"MASTER_PORT": "0"}):
        with pytest.raises(ConfigError) as caught:
            launched_place({**launched, **wrong})
        assert "unset them" in caught.value.hint


def test_processes_meet_on_the_interface_that_leads_to_the_first_machine(monkeypatch: pytest.MonkeyPatch):
    def nobody_there(*_args: object, **_settings: object) -> None:
        raise RuntimeError("Gloo connectFullMesh failed with [pair.cc:152] timed out.\nmore")

    monkeypatch.setattr(torch.distributed, "init_process_group", nobody_there)
    place = Place(rank=0, local_rank=0, count=2)
    loopback = next(
        name for name, found in psutil.net_if_addrs().items() if "127.0.0.1" in (at.address for at in found)
    )
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for set_before, expected in (({}, loopback), ({"GLOO_SOCKET_IFNAME": "mine"}, "mine")):
        monkeypatch.setattr(os, "environ", {**launched, **set_before})
        with pytest.raises(RunError, match=r"did not find each other: Gloo .* timed out\.") as caught, joined(place):
            pass
        assert os.environ["GLOO_SOCKET_IFNAME"] == expected
        assert "--master-addr" in caught.value.hint
    monkeypatch.setattr(os, "environ", {**launched, "MASTER_ADDR": "no.such.machine.invalid"})
    with pytest.raises(RunError, match="did not find each other"), joined(place):
        pass


def test_only_training_takes_several_processes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    for words in ([], ["estimate", "--dataset-dir", "x"], ["demo"]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert "runs in one process, and a launcher started 2" in error and "Start it without torchrun" in error


def test_a_base_is_not_spread_over_one_process(tmp_path: Path, base: Checkpoint, capsys: pytest.CaptureFixture[str]):
    assert main([*typed(tmp_path, base, tmp_path, "run"), "--shard-base"]) == 2
    assert "and there is one" in capsys.readouterr().err
    assert main([*typed(tmp_path, base, tmp_path, "run"), "--shard-base", "--quantize", "int8"]) == 2
    assert "does not go with --quantize" in capsys.readouterr().err
