"""The decoder computes what the original model code computes."""

import pytest
import torch

from sidestep.model.loading import load_decoder
from tests.golden.reference_cases import Case, cases, relative_l2

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", cases("decoder"), ids=str)
def test_the_decoder_predicts_the_velocity_of_the_original(case: Case):
    decoder = load_decoder(case.checkpoint(), device=CPU, dtype=case.dtype)
    inputs = {name: tensor.to(case.dtype) for name, tensor in case.inputs().items()}
    with torch.no_grad():
        velocity = decoder(**inputs).sample
    assert velocity.dtype == case.dtype
    case.check(velocity, "out.sample")


def test_the_original_in_bfloat16_is_met_only_by_rounding_the_timestep_too():
    (case,) = [case for case in cases("decoder") if case.dtype == torch.bfloat16]
    decoder = load_decoder(case.checkpoint(), device=CPU, dtype=torch.float32)
    inputs = {name: tensor.float() for name, tensor in case.inputs().items()}
    with torch.no_grad():
        velocity = decoder(**inputs).sample
    tensors = case.tensors()
    torch.testing.assert_close(velocity, tensors["out.sample_fp32_from_same_inputs"].float(), atol=2e-5, rtol=1e-4)
    assert relative_l2(velocity, tensors["out.sample"]) > 0.1
