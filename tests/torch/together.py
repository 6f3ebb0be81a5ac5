"""Two processes that train together: torchrun starts this file, and `test_processes` reads what each of them left.

torchrun --nproc-per-node 2 tests/torch/together.py CHECKPOINTS FOLDER
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sidestep.config.processes import Processes, Word, launched_place
from sidestep.errors import ElsewhereError, LostProcessError, NoRoomError
from sidestep.events import EpochDone, LayerGradients, RunStarted, Validated
from sidestep.model.checkpoint import Checkpoint, find_checkpoint
from sidestep.training import accelerate, fit
from sidestep.training.assemble import Run
from sidestep.training.batches import Batch
from sidestep.training.passes import Passes
from sidestep.training.processes import JoinedProcesses, joined, new_group, own_device
from sidestep.training.run import carry_out
from tests.torch.tiny import RUN_NAME, Trained, prepare, tiny_config, train

# Seven songs, two of them held out: a step of two passes in each of two processes leaves one batch for the last.
FRAMES = (40, 52, 64, 40, 71, 52, 40)
CONFIG = tiny_config(
    gradient_accumulation=2,
    gradient_checkpointing=True,
    dropout=0.1,
    ema_decay=0.9,
    val_split=0.3,
    save_every=1,
    log_heavy_every=2,
)
# Compiling takes seconds for each way that a block is called.
FEW_GRAPHS = {"epochs": 1, "val_split": 0.0, "gradient_checkpointing": False, "target_modules": ("q_proj",)}
COMPILE = torch.compile
SOON = timedelta(seconds=30)


class Scenarios:
    """What the two processes do, one after the other."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, processes: Processes) -> None:
        self.checkpoint, self.folder, self.processes = checkpoint, folder, processes

    def train(self, name: str, *, songs: str = "songs", **changes: Any) -> dict[str, Any]:
        """Train in both processes and give what each saw."""
        config = replace(CONFIG, **changes)
        trained = train(config, self.checkpoint, self.folder / songs, self.folder / name, processes=self.processes)
        return seen(trained)

    def read(self) -> list[tuple[str, ...]]:
        """Read an epoch from its second batch on."""
        return [batch.names for batch in self._prepared().batches.epoch(1, position=1)]

    def find_room(self) -> dict[str, Any]:
        """Put a run together that fits the second process only when its batch is smaller."""
        measure = fit.measure

        def measured(run: Run) -> None:
            if self.processes.rank == 1 and run.config.batch_size > 1:
                raise NoRoomError("Too small.")
            run.processes.meet()  # As its steps would.

        fit.measure = measured
        try:
            run = fit.assemble_fitting(
                replace(CONFIG, batch_size=4, auto_fit=True),
                recipe_name="fixed",
                checkpoint=self.checkpoint,
                dataset_dir=self.folder / "songs",
                output_dir=self.folder / "room",
                run_name=RUN_NAME,
                version="0",
                emit=lambda event: None,
                processes=self.processes,
            )
        finally:
            fit.measure = measure
        return {"batch_size": run.config.batch_size, "passes": run.pace.passes}

    def fail_early(self) -> str:
        """Fail in the second process while the first one gets its device."""
        own = self.processes
        others = JoinedProcesses(own.rank, own.local_rank, own.count, meetings=new_group("gloo", SOON))
        try:
            others.meet(Word.FAILED) if own.rank == 1 else own_device("cpu", others)
        except LostProcessError:
            os._exit(1)  # The first one does not listen, and Python would wait for it; so the launcher ends both.
        except ElsewhereError as error:
            return type(error).__name__
        return ""

    def fail(self) -> None:
        """Run out of memory in the second process, in its fourth pass of a run: in the third step."""
        run = self._prepared(output="failed")
        if self.processes.rank == 1:
            run.stepper.passes = FullAfter(run.stepper.passes, left=3)
        carry_out(run, emit=lambda event: None, stop_requested=lambda: self.processes.anyone(False))

    def _prepared(self, output: str = "prepared") -> Run:
        return prepare(
            replace(CONFIG, val_split=0.0, epochs=3),
            self.checkpoint,
            self.folder / "songs",
            self.folder / output,
            processes=self.processes,
        )


class FullAfter:
    """Passes that run out of memory after so many."""

    def __init__(self, passes: Passes, *, left: int) -> None:
        self.passes, self.left = passes, left

    def prepare(self, batches: Sequence[Batch]) -> None:
        self.passes.prepare(batches)

    def __call__(self, batch: Batch, *, share: float, seed: int) -> Tensor:
        if not self.left:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.left -= 1
        return self.passes(batch, share=share, seed=seed)


def seen(trained: Trained) -> dict[str, Any]:
    """Give what a process saw of a run, as plain values."""
    return {
        "reason": trained.reason,
        "batch": trained.all_of(RunStarted)[0].facts["Batch"],
        "losses": trained.losses,
        "layers": [event.norms for event in trained.all_of(LayerGradients)],
        "epochs": [event.loss for event in trained.all_of(EpochDone)],
        "held_out": [(event.loss, event.standard_error, event.is_best) for event in trained.all_of(Validated)],
        "bands": [event.bands for event in trained.all_of(Validated)],
        "written": [str(event.folder.name) for event in trained.events if hasattr(event, "folder")],
        "weights": trained.weights,
        "average": trained.run.ema.values() if trained.run.ema else {},
        "base": held_base(trained),
        "is_compiled": trained.run.stepper.model.compiled_blocks is not None,
    }


def held_base(trained: Trained) -> int:
    """Count the numbers of the frozen blocks that this process holds after training."""
    own = {id(parameter) for parameter in trained.run.adapter.parameters.values()}
    parameters = [p for p in trained.run.stepper.model.decoder.layers.parameters() if id(p) not in own]
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)


def main(checkpoints: Path, folder: Path) -> None:
    """Go through the scenarios; each process leaves what it found in files of its own."""
    place = launched_place(os.environ)
    assert place is not None
    with joined(place) as processes:
        scenarios = Scenarios(find_checkpoint(checkpoints, "base"), folder, processes)

        def keep(name: str, do: Callable[[], Any]) -> None:
            torch.save(do(), folder / f"{name}_{processes.rank}.pt")

        keep("plain", lambda: scenarios.train("plain"))
        keep("read", scenarios.read)
        keep("early", scenarios.fail_early)
        keep("room", scenarios.find_room)
        keep("sharded", lambda: scenarios.train("sharded", shard_base=True))
        keep("patience", lambda: scenarios.train("patience", epochs=12, early_stop_patience=2, learning_rate=1e-14))
        accelerate.why_not_compile = lambda device: ""
        torch.compile = lambda block: COMPILE(block, backend="eager")
        keep(
            "compiled", lambda: scenarios.train("compiled", songs="alike", shard_base=True, compile=True, **FEW_GRAPHS)
        )
        scenarios.fail()


if __name__ == "__main__":
    root, output = map(Path, sys.argv[1:])
    try:
        main(root, output)
    except (NoRoomError, ElsewhereError) as error:
        torch.save((type(error).__name__, str(error)), output / f"error_{os.environ['RANK']}.pt")
