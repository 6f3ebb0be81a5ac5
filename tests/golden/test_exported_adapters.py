"""Official adapters, read and exported: the output stays the original model's with that adapter."""

from pathlib import Path

import pytest
import torch

from sidestep.exports.base import BaseWeights
from sidestep.exports.run import export
from sidestep.exports.source import read_adapter
from sidestep.listen.attach import Attached
from sidestep.model.checkpoint import find_checkpoint
from sidestep.model.loading import load_decoder
from tests.golden.reference_cases import Case, cases

CPU = torch.device("cpu")
OFFICIAL = [*cases("peft_lora"), *cases("lycoris_lokr")]


def check_with(case: Case, adapter: Path) -> None:
    """Put the adapter beside the reference decoder and compare with the original model's output."""
    checkpoint = case.checkpoint()
    decoder = load_decoder(checkpoint, device=CPU, dtype=case.dtype)
    base = BaseWeights(checkpoint)
    attached = Attached(decoder, read_adapter(adapter, base), base)
    with torch.no_grad():
        case.check(decoder(**case.inputs()).sample, "out.sample")
        attached.strength = 0.0
        case.check(decoder(**case.inputs()).sample, "out.sample_without_adapter")


@pytest.mark.parametrize("case", OFFICIAL, ids=str)
def test_an_official_adapter_acts_as_in_the_original_model(case: Case):
    check_with(case, case.folder)


@pytest.mark.parametrize("case", OFFICIAL, ids=str)
@pytest.mark.parametrize("target", ["comfyui", "merged"])
def test_its_export_acts_the_same(tmp_path: Path, case: Case, target: str):
    checkpoint = case.checkpoint()
    done = export(case.folder, checkpoint, target_name=target, output=tmp_path / "acestep-v15-turbo")
    assert done.error < 1e-4
    if target == "comfyui":
        check_with(case, tmp_path / "acestep-v15-turbo")
        return
    for part in ("vae", "Qwen3-Embedding-0.6B"):
        (tmp_path / part).symlink_to(checkpoint.root / part)
    decoder = load_decoder(find_checkpoint(tmp_path, "turbo"), device=CPU, dtype=case.dtype)
    with torch.no_grad():
        case.check(decoder(**case.inputs()).sample, "out.sample")


@pytest.mark.parametrize("case", cases("peft_lora"), ids=str)
@pytest.mark.parametrize("target", ["peft", "diffusers"])
def test_its_export_for_peft_and_diffusers_acts_the_same(tmp_path: Path, case: Case, target: str):
    export(case.folder, case.checkpoint(), target_name=target, output=tmp_path / "out")
    check_with(case, tmp_path / "out")
