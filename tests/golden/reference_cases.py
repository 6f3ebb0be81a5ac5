"""The reference cases: inputs and outputs of the original model code, with the tolerance each is compared by."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sidestep.model.checkpoint import Checkpoint, find_checkpoint

REFERENCE = Path(__file__).parent / "reference"
MANIFEST: dict[str, Any] = json.loads((REFERENCE / "manifest.json").read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Case:
    """One case of the manifest; `str(case)` is its id, for pytest."""

    entry: dict[str, Any]

    def __str__(self) -> str:
        return self.entry["id"]

    @property
    def tolerance(self) -> dict[str, Any]:
        """The keys of `tol` in the manifest: atol and rtol, or a metric and its maximum, or names of the kind's own."""
        return self.entry["tol"]

    @property
    def dtype(self) -> torch.dtype:
        """What the original computed in."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.entry.get("dtype", "float32")]

    @property
    def folder(self) -> Path:
        """The folder of further files of this case: its adapter, its preprocessed tensors."""
        return REFERENCE / Path(self.entry["file"]).with_suffix("")

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, named `in.…` and `out.…`."""
        return load_file(REFERENCE / self.entry["file"])

    def inputs(self) -> dict[str, Tensor]:
        """The input tensors without their `in.`."""
        return {name[3:]: tensor for name, tensor in self.tensors().items() if name.startswith("in.")}

    def checkpoint(self) -> Checkpoint:
        """The tiny checkpoint the case was computed with."""
        folder = REFERENCE / self.entry["checkpoint_dir"]
        return find_checkpoint(folder.parent, folder.name)

    def check(self, actual: Tensor, output: str) -> None:
        """Assert that `actual` equals this output within the case's tolerance; a failure states the error."""
        expected = self.tensors()[output]
        assert actual.shape == expected.shape
        if self.tolerance.get("metric") == "rel_l2":
            error = relative_l2(actual, expected)
            assert error <= self.tolerance["max"], f"{self}: {output} differs by rel L2 {error:.3g}"
        else:
            torch.testing.assert_close(
                actual.float(), expected.float(), atol=self.tolerance["atol"], rtol=self.tolerance["rtol"]
            )


def cases(kind: str) -> list[Case]:
    """All cases of one kind: decoder, condition_encoder, train_forward, trainer_step, preprocess, peft_lora, ..."""
    found = [Case(entry) for entry in MANIFEST["cases"] if entry["kind"] == kind]
    assert found, f"the manifest has no case of the kind {kind!r}"
    return found


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what was expected."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
