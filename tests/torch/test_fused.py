"""Fused linear layers compute what PEFT's modules compute, whatever the ranks, the targets and the dropout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from torch import Tensor

from sidestep.model.attention import blocks_of, use_processors
from sidestep.model.checkpoint import Checkpoint
from sidestep.model.dropout import seed_dropout
from sidestep.model.forward import velocity
from sidestep.model.fuse import Fused, fuse
from sidestep.training.adapters.base import current_values
from sidestep.training.adapters.lora import LoraAdapter, attach_lora, plain_loras
from tests.torch.tiny import assert_identical, prepare, tiny_config, write_songs
from tests.torch.tiny_adapters import LAYERS, tiny_decoder

CPU = torch.device("cpu")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERYWHERE = [f"{part}.{name}" for part in ("self_attn", "cross_attn") for name in ATTENTION]
MLP = [f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]


@dataclass
class Subject:
    decoder: AceStepTransformer1DModel
    adapter: LoraAdapter
    fused: Fused | None


def subject(parts: list[str], *, is_fused: bool, dropout: float = 0.0, **settings: Any) -> Subject:
    """A decoder with a LoRA that is not at zero on these parts of every block."""
    decoder = tiny_decoder()
    modules = [f"layers.{layer}.{part}" for layer in range(LAYERS) for part in parts]
    adapter = attach_lora(decoder, modules, **{"rank": 3, "alpha": 5, "dropout": dropout, **settings})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    cross_attention, seed = use_processors(decoder, device=CPU, dtype=torch.float32), seed_dropout(decoder, dropout)
    decoder.train()
    seed.fill_(7)
    fused = fuse(decoder, plain_loras(adapter, decoder), cross_attention) if is_fused else None
    return Subject(decoder, adapter, fused)


def results(subject: Subject, *, compiled: bool = False, recompute: bool = False) -> tuple[Tensor, list[Tensor]]:
    """The velocity and the gradients of all trained values."""
    generator = torch.Generator().manual_seed(4)
    shapes = {"hidden_states_BTC": (2, 50, 64), "condition_BLD": (2, 5, 48), "context_BTC": (2, 50, 128)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    blocks: list[Any] = list(blocks_of(subject.decoder))
    if subject.fused:
        subject.fused.refresh()
        blocks = [torch.compile(block) if compiled else block for block in subject.fused.blocks]
    timestep_B = torch.tensor([0.3, 0.8])
    output = velocity(subject.decoder, **inputs, timestep_B=timestep_B, blocks=blocks, recompute=[recompute] * LAYERS)
    return output.detach(), list(torch.autograd.grad(output.square().sum(), list(subject.adapter.parameters.values())))


def assert_same(found: tuple[Tensor, list[Tensor]], wanted: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(found[0], wanted[0], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("parts", "settings"),
    [
        (EVERYWHERE, {}),
        (EVERYWHERE + MLP, {"rank": 8}),
        (["self_attn.k_proj", "cross_attn.v_proj", "mlp.up_proj"], {}),
        (["mlp.down_proj"], {"use_rslora": True}),
        (EVERYWHERE, {"ranks": {"layers.0.self_attn.q_proj": 5, "layers.1.cross_attn.o_proj": 11}}),
    ],
    ids=["attention", "all", "one of each group", "rank-stabilised", "ranks of their own"],
)
def test_fused_blocks_and_their_gradients_are_those_of_peft(parts: list[str], settings: dict[str, Any], dropout: float):
    wanted = results(subject(parts, is_fused=False, dropout=dropout, **settings))
    assert_same(results(subject(parts, is_fused=True, dropout=dropout, **settings)), wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_so_are_compiled_and_recomputed_ones(dropout: float):
    wanted = results(subject(EVERYWHERE, is_fused=False, dropout=dropout))
    assert_same(results(subject(EVERYWHERE, is_fused=True, dropout=dropout), compiled=True, recompute=True), wanted)


def test_what_was_trained_since_is_seen_after_a_refresh_and_in_the_modules_themselves():
    ours, theirs = (subject(EVERYWHERE, is_fused=is_fused) for is_fused in (True, False))
    for each in (ours, theirs):
        with torch.no_grad():
            for parameter in each.adapter.parameters.values():
                parameter.mul_(-2)
    wanted = results(theirs)
    assert_same(results(ours), wanted)
    # Samples and whatever else goes through diffusers' own modules.
    assert_same(results(Subject(ours.decoder, ours.adapter, None)), wanted)


def test_the_weights_lie_in_the_operands_and_nowhere_else():
    decoder = subject(EVERYWHERE, is_fused=True).decoder
    linear = decoder.get_submodule("layers.1.self_attn.to_k.base_layer")
    gate = decoder.get_submodule("layers.1.mlp.gate_proj")
    stores = {module.weight.untyped_storage().nbytes() // 4 for module in (linear, gate)}  # pyright: ignore
    assert all(size > 3 * linear.weight.numel() for size in stores)  # pyright: ignore
    assert not [name for name, parameter in decoder.named_parameters() if parameter.requires_grad != ("lora" in name)]


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"bias": "all"}], ids=str)
def test_what_is_not_plain_lora_stays_with_peft(settings: dict[str, Any]):
    decoder = tiny_decoder()
    adapter = attach_lora(decoder, ["layers.0.self_attn.q_proj"], rank=3, alpha=5, dropout=0.0, **settings)
    assert plain_loras(adapter, decoder) == {}


def test_a_run_trains_fused_and_to_the_weights_of_one_that_is_not(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (30, 30))
    values = []
    for is_fused in (True, False):
        run = prepare(tiny_config(dropout=0.2, epochs=1), base, songs, tmp_path / str(is_fused))
        assert run.stepper.model.fused is not None
        if not is_fused:
            run.stepper.model.fused = None
        for batch in run.batches.epoch(0):
            run.stepper([batch], lr=1e-3, seeds=[1])
        values.append(current_values(run.adapter))
    for name, value in values[0].items():
        torch.testing.assert_close(value, values[1][name], atol=2e-5, rtol=1e-4)
    with pytest.raises(AssertionError):
        assert_identical(values[0], values[1])  # They did take different ways.
