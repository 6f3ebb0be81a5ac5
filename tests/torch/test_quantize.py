"""Frozen weights in few bits: how near they stay, what their gradient is, and that every adapter trains on them."""

import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from sidestep.config.train import TrainConfig
from sidestep.errors import ConfigError
from sidestep.exports.base import BaseWeights
from sidestep.exports.run import export
from sidestep.exports.source import read_adapter
from sidestep.model.attention import use_processors
from sidestep.model.checkpoint import Checkpoint
from sidestep.model.quantize import STORAGES, QuantizedLinear, quantize_blocks
from tests.torch.tiny import RUN_NAME, adapter_tensors, assert_identical, prepare, tiny_config, train, write_songs
from tests.torch.tiny_adapters import KINDS, attach, loss_of, tiny_decoder

CPU = torch.device("cpu")
# The largest relative errors of a weight matrix (Frobenius norm) that the help text lets one expect.
ERRORS = {"int8": 0.01, "nf4": 0.12}
every_storage = pytest.mark.parametrize("kind", STORAGES)


def linear(*, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(192, 96, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return layer.to(dtype).requires_grad_(False)


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@every_storage
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_comes_back_within_the_stated_error(kind: str, dtype: torch.dtype):
    layer = linear(dtype=dtype)
    held = QuantizedLinear(layer, STORAGES[kind](), CPU)
    assert held.weight.dtype == dtype
    assert held.weight.shape == layer.weight.shape
    found = error(held.weight, layer.weight)
    print(f"{kind} of {dtype}: relative error {found:.2%}")
    assert ERRORS[kind] / 10 < found < ERRORS[kind]


@every_storage
def test_rows_of_very_different_size_keep_their_relative_error(kind: str):
    layer = linear()
    with torch.no_grad():
        layer.weight *= torch.logspace(-4, 4, 96)[:, None]
    held = QuantizedLinear(layer, STORAGES[kind](), CPU)
    assert max(error(*rows) for rows in zip(held.weight, layer.weight, strict=True)) < 1.3 * ERRORS[kind]


@every_storage
def test_a_weight_of_zeros_is_no_division_by_zero(kind: str):
    layer = linear()
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(QuantizedLinear(layer, STORAGES[kind](), CPU).weight, torch.zeros(96, 192))


@every_storage
def test_it_takes_a_half_or_a_quarter_of_bfloat16(kind: str):
    layer = linear(dtype=torch.bfloat16)
    held = QuantizedLinear(layer, STORAGES[kind](), CPU)
    size = sum(tensor.numel() * tensor.element_size() for tensor in (held.packed, held.scales))
    assert size / (layer.weight.numel() * 2) < {"int8": 0.52, "nf4": 0.30}[kind]
    assert not [name for name, _ in held.named_parameters() if name == "weight"]


@every_storage
@pytest.mark.parametrize("bias", [True, False])
def test_product_and_gradient_are_those_of_the_weight_made_whole(kind: str, bias: bool):
    held = QuantizedLinear(linear(bias=bias), STORAGES[kind](), CPU)
    x = torch.randn(2, 5, 192, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weights = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(2))
    found, wanted = held(x), nn.functional.linear(x, held.weight, held.bias)
    torch.testing.assert_close(found, wanted)
    (gradient,) = torch.autograd.grad((found * weights).sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad((wanted * weights).sum(), x)[0])


@every_storage
def test_only_the_linear_layers_of_the_blocks_are_packed(kind: str):
    decoder = tiny_decoder()
    quantize_blocks(decoder, kind, device=CPU)
    in_blocks = [module for block in decoder.layers for module in block.modules() if isinstance(module, nn.Linear)]
    assert in_blocks and all(isinstance(module, QuantizedLinear) for module in in_blocks)
    outside = [m for name, m in decoder.named_modules() if isinstance(m, nn.Linear) and not name.startswith("layers.")]
    assert outside and not any(isinstance(module, QuantizedLinear) for module in outside)


def whole_again(decoder: nn.Module) -> nn.Module:
    """A decoder of plain layers that hold what the packed ones of another amount to."""
    plain = tiny_decoder()
    for name, module in decoder.named_modules():
        if isinstance(module, QuantizedLinear):
            plain.get_submodule(name).weight.data = module.weight
    return plain


@every_storage
@pytest.mark.parametrize("adapter", KINDS)
def test_every_adapter_has_the_gradient_it_has_on_the_weights_made_whole(kind: str, adapter: str):
    quantized = tiny_decoder()
    quantize_blocks(quantized, kind, device=CPU)
    gradients = []
    for decoder in (whole_again(quantized), quantized):
        use_processors(decoder, device=CPU, dtype=torch.float32)
        attached = attach(decoder, adapter)
        with torch.no_grad():
            for name, parameter in attached.parameters.items():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                parameter += 0.05 * noise
        loss_of(decoder.train()).backward()
        gradients.append({name: parameter.grad for name, parameter in attached.parameters.items()})
    wanted, found = gradients
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient is not None and gradient.any(), name
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3)


SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"adapter_type": "dora"},
    "lokr": {"adapter_type": "lokr", "rank": 2, "lokr_weight_decompose": True},
    "loha": {"adapter_type": "loha"},
}


@every_storage
@pytest.mark.parametrize("adapter", SETTINGS)
def test_a_run_on_packed_weights_trains_saves_loads_and_exports_like_any_other(
    tmp_path: Path, base: Checkpoint, kind: str, adapter: str
):
    songs = write_songs(tmp_path / "songs", base, (30, 30))
    config = tiny_config(quantize=kind, gradient_checkpointing=True, **SETTINGS[adapter])
    trained = train(config, base, songs, tmp_path / "run")
    whole = train(tiny_config(**SETTINGS[adapter]), base, songs, tmp_path / "whole")
    blocks = trained.run.stepper.model.decoder.layers
    assert any(isinstance(module, QuantizedLinear) for block in blocks for module in block.modules())
    assert 1e-6 < abs(trained.losses[0] / whole.losses[0] - 1) < 5 * ERRORS[kind]
    # The same tensors as a run without it leaves.
    saved, other = (adapter_tensors(tmp_path / name / RUN_NAME) for name in ("run", "whole"))
    assert {name: t.shape for name, t in saved.items()} == {name: t.shape for name, t in other.items()}
    again = prepare(
        tiny_config(**SETTINGS[adapter], init_from=tmp_path / "run" / RUN_NAME), base, songs, tmp_path / "x"
    )
    for name, parameter in again.adapter.parameters.items():
        torch.testing.assert_close(parameter.detach(), trained.weights[name], atol=1e-6, rtol=1e-5)
    export(tmp_path / "run" / RUN_NAME, base, target_name="comfyui", output=tmp_path / "comfyui")
    assert read_adapter(tmp_path / "comfyui", BaseWeights(base)).changes.keys() == set(again.adapter.modules)


@every_storage
def test_a_run_on_packed_weights_resumes_bit_for_bit(tmp_path: Path, base: Checkpoint, kind: str):
    songs = write_songs(tmp_path / "songs", base, (30, 30))
    config = tiny_config(quantize=kind, dropout=0.1)
    whole = train(config, base, songs, tmp_path / "whole")
    train(config, base, songs, tmp_path / "run", stop_after=1)
    resumed = train(
        tiny_config(quantize=kind, dropout=0.1, resume_from=tmp_path / "run"), base, songs, tmp_path / "run"
    )
    assert_identical(resumed.state, whole.state)


def test_nf4_without_its_package_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="--quantize nf4 needs bitsandbytes") as caught:
        quantize_blocks(tiny_decoder(), "nf4", device=CPU)
    assert "--quantize int8" in caught.value.hint


def test_there_is_a_storage_for_every_choice():
    assert {"none", *STORAGES} == set(get_args(get_type_hints(TrainConfig)["quantize"]))
