"""Commands as they are typed, run in this process on toy models, and what they leave behind."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sidestep.main import main
from sidestep.model.checkpoint import Checkpoint
from tests.torch.tiny import adapter_tensors

NAME = "typed"
# A run of one step a song, a reading every step, an adapter of rank 2.
SMALL = {
    "--device": "cpu", "--rank": "2", "--alpha": "4", "--dropout": "0", "--epochs": "1", "--gradient-accumulation": "1",
    "--warmup-steps": "0", "--learning-rate": "0.001", "--num-workers": "0", "--log-every": "1", "--run-name": NAME,
}  # fmt: skip


def train(checkpoint: Checkpoint, songs: Path, output: Path, *words: object, command: str = "fixed") -> "Left":
    """Type a small training run with these words added; what they say wins over the small run's own."""
    typed = [str(word) for word in words]
    small = [word for flag, value in SMALL.items() if flag not in typed for word in (flag, value)]
    model = [] if "-M" in typed or "--model-variant" in typed else ["-M", checkpoint.variant]
    paths = ["-c", str(checkpoint.root), "-d", str(songs), "-o", str(output)]
    assert main([command, *paths, *model, *small, "--plain", *typed]) == 0
    return Left(output)


class Left:
    """What a typed run left in its output folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def config(self) -> dict[str, Any]:
        """The settings in the run's config.json."""
        return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))["settings"]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that tell of this."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    @property
    def start(self) -> dict[str, Any]:
        """What was said at the start: the recipe, and facts by their name."""
        return self.events("run_started")[0]

    def readings(self, name: str) -> list[Any]:
        """One number of every reading: step, loss, lr, grad_norm."""
        return [event[name] for event in self.events("metrics")]

    @property
    def adapter(self) -> Path:
        """The folder of the finished adapter."""
        return self.folder / NAME

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The finished adapter's tensors."""
        return adapter_tensors(self.adapter)

    @property
    def header(self) -> dict[str, str]:
        """What the adapter's file says of itself."""
        (path,) = self.adapter.glob("*.safetensors")
        with safe_open(path, framework="pt") as file:
            return file.metadata()

    @property
    def peft(self) -> dict[str, Any]:
        """The adapter's adapter_config.json."""
        return json.loads((self.adapter / "adapter_config.json").read_text(encoding="utf-8"))


def modules_of(tensors: dict[str, Tensor]) -> set[str]:
    """Give the parts of the layers that PEFT tensors belong to: `self_attn.q_proj`."""
    return {name.split(".lora_")[0].split(".", 4)[-1] for name in tensors if ".lora_" in name}


def differ(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Say whether two adapters of the same shapes hold other numbers."""
    assert left.keys() == right.keys()
    return any(not torch.equal(value, right[name]) for name, value in left.items())
