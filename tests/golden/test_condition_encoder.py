"""The condition encoder computes what the original model code computes."""

import pytest
import torch

from sidestep.model.loading import load_condition_encoder, load_silence_latent
from tests.golden.reference_cases import Case, cases


@pytest.mark.parametrize("case", cases("condition_encoder"), ids=str)
def test_the_condition_encoder_gives_the_rows_and_the_mask_of_the_original(case: Case):
    encoder = load_condition_encoder(case.checkpoint(), device=torch.device("cpu"), dtype=torch.float32)
    inputs = case.inputs()
    if "derived_inputs" in case.entry:
        inputs["refer_audio_acoustic_hidden_states_packed"] = load_silence_latent(case.checkpoint(), frames=750)
    with torch.no_grad():
        rows, mask = encoder(**inputs)
    case.check(rows, "out.encoder_hidden_states")
    assert torch.equal(mask, case.tensors()["out.encoder_attention_mask"].bool())
