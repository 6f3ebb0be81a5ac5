"""Adapters of the official trainer are taken over whole: the output is the original model's with that adapter."""

from typing import Any

import pytest
import torch
from torch import nn

from sidestep.model.loading import load_decoder
from sidestep.training.adapters.base import ATTENTION_PROJECTIONS, target_names
from sidestep.training.adapters.files import LOKR_FILE, read_weights
from sidestep.training.adapters.lora import attach_lora
from sidestep.training.adapters.lycoris import LycorisAdapter, attach_lokr
from tests.golden.reference_cases import Case, cases

CPU = torch.device("cpu")


def decoder_of(case: Case) -> nn.Module:
    return load_decoder(case.checkpoint(), device=CPU, dtype=case.dtype)


def targets(decoder: Any) -> list[str]:
    return target_names(len(decoder.layers), attention_type="both", target_modules=ATTENTION_PROJECTIONS)


def attach_default_lokr(decoder: nn.Module, *, alpha: float) -> LycorisAdapter:
    return attach_lokr(decoder, targets(decoder), rank=4, alpha=alpha, dropout=0.1)


def check_output(decoder: nn.Module, case: Case, output: str = "out.sample") -> None:
    with torch.no_grad():
        case.check(decoder.eval()(**case.inputs()).sample, output)


@pytest.mark.parametrize("case", cases("peft_lora"), ids=str)
@pytest.mark.parametrize("alpha", [8.0, 3.0])
def test_an_official_lora_gives_its_own_output_whatever_alpha_the_new_run_has(case: Case, alpha: float):
    decoder = decoder_of(case)
    adapter = attach_lora(decoder, targets(decoder), rank=4, alpha=alpha, dropout=0.1)
    check_output(decoder, case, "out.sample_without_adapter")
    adapter.read(case.folder)
    check_output(decoder, case)


@pytest.mark.parametrize("case", cases("peft_lora"), ids=str)
def test_an_official_lora_of_a_smaller_rank_keeps_its_effect(case: Case):
    decoder = decoder_of(case)
    attach_lora(decoder, targets(decoder), rank=6, alpha=8, dropout=0.1, use_rslora=True).read(case.folder / "adapter")
    check_output(decoder, case)


@pytest.mark.parametrize("case", cases("lycoris_lokr"), ids=str)
@pytest.mark.parametrize("alpha", [8.0, 3.0])
def test_an_official_lokr_gives_its_own_output_whatever_alpha_the_new_run_has(case: Case, alpha: float):
    decoder = decoder_of(case)
    adapter = attach_default_lokr(decoder, alpha=alpha)
    check_output(decoder, case, "out.sample_without_adapter")
    adapter.read(case.folder)
    check_output(decoder, case)


@pytest.mark.parametrize("case", cases("lycoris_lokr"), ids=str)
def test_the_official_lokr_file_holds_every_linear_layer_and_ours_only_the_targets(case: Case):
    decoder = decoder_of(case)
    adapter = attach_default_lokr(decoder, alpha=8.0)
    tensors, _ = read_weights(case.folder / LOKR_FILE)
    assert len({name.split(".")[0] for name in tensors}) == 52
    assert len(adapter.modules) == 32
