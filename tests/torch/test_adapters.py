"""What every kind of adapter promises: one contract, and what is particular to each kind."""

from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from sidestep.config.train import TrainConfig
from sidestep.model import architecture
from sidestep.training.adapters import ADAPTERS
from sidestep.training.adapters.base import (
    ATTENTION_PROJECTIONS,
    current_values,
    load_values,
    target_names,
    target_suffixes,
)
from sidestep.training.adapters.lora import attach_lora
from sidestep.training.adapters.lycoris import attach_loha, attach_lokr
from tests.torch.tiny_adapters import KINDS, PROJECTIONS, attach, inputs, loss_of, output, tiny_decoder, train_a_little

every_kind = pytest.mark.parametrize("kind", KINDS)


def test_there_is_an_adapter_for_every_choice_of_the_setting():
    assert tuple(ADAPTERS) == get_args(get_type_hints(TrainConfig)["adapter_type"])


@every_kind
def test_an_untrained_adapter_changes_nothing(kind: str):
    decoder = tiny_decoder()
    before = output(decoder)
    attach(decoder, kind)
    torch.testing.assert_close(output(decoder), before, atol=2e-6, rtol=1e-5)


@every_kind
def test_training_changes_the_adapter_alone_and_its_gradient_reaches_every_parameter(kind: str):
    decoder = tiny_decoder()
    held = dict(decoder.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in held.items()}
    adapter = attach(decoder, kind)
    fresh = current_values(adapter)
    losses = train_a_little(decoder, adapter.parameters)
    ours = {id(parameter) for parameter in adapter.parameters.values()}
    assert losses[-1] < losses[0]
    for name, parameter in held.items():
        if id(parameter) not in ours:
            assert torch.equal(parameter, before[name]), name
            assert parameter.grad is None, name
    for name, parameter in adapter.parameters.items():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is not None and parameter.grad.any(), name
        assert not torch.equal(parameter, fresh[name]), name


@every_kind
def test_its_parameters_are_the_ones_that_the_decoder_trains(kind: str):
    decoder = tiny_decoder()
    adapter = attach(decoder, kind)
    trained = [id(parameter) for parameter in decoder.parameters() if parameter.requires_grad]
    assert sorted(trained) == sorted(id(parameter) for parameter in adapter.parameters.values())


@every_kind
def test_the_names_are_the_originals_and_every_module_has_its_tensors(kind: str):
    adapter = attach(tiny_decoder(), kind)
    owners = {module: [n for n in adapter.parameters if n.startswith(f"{module}.")] for module in adapter.modules}
    assert all(owners.values())
    others = set(adapter.parameters) - {name for names in owners.values() for name in names}
    assert all(name.endswith(".bias") for name in others)
    assert bool(others) == (kind == "lora with all biases")
    assert not any("default" in name or "to_q" in name or "to_out" in name for name in adapter.parameters)


@every_kind
def test_what_is_written_gives_a_fresh_decoder_the_same_output(tmp_path: Path, kind: str):
    decoder, fresh = tiny_decoder(), tiny_decoder()
    adapter = attach(decoder, kind)
    train_a_little(decoder, adapter.parameters)
    adapter.write(tmp_path, current_values(adapter), about={"sidestep": "{}"})
    trained = output(decoder)
    other = attach(fresh, kind, seed=9)
    assert (output(fresh) - trained).abs().max() > 0.05
    other.read(tmp_path)
    torch.testing.assert_close(output(fresh), trained, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_modules_with_ranks_of_their_own_are_written_at_the_strength_they_were_trained_at(
    tmp_path: Path, use_dora: bool, use_rslora: bool
):
    ranks = {"layers.0.self_attn.q_proj": 1, "layers.1.cross_attn.k_proj": 3, "layers.1.mlp.up_proj": 6}
    decoder, fresh = tiny_decoder(), tiny_decoder()
    adapter = attach_lora(
        decoder, list(ranks), rank=6, alpha=9, dropout=0.0, ranks=ranks, use_dora=use_dora, use_rslora=use_rslora
    )
    train_a_little(decoder, adapter.parameters)
    adapter.write(tmp_path, current_values(adapter), about={})
    attach_lora(fresh, list(ranks), rank=6, alpha=1, dropout=0.0, use_dora=use_dora).read(tmp_path)
    torch.testing.assert_close(output(fresh), output(decoder), atol=2e-5, rtol=1e-4)


@every_kind
def test_any_values_can_be_written_not_just_those_in_use(tmp_path: Path, kind: str):
    decoder, fresh = tiny_decoder(), tiny_decoder()
    adapter = attach(decoder, kind)
    early = current_values(adapter)
    train_a_little(decoder, adapter.parameters)
    averaged = {name: early[name].lerp(value, 0.7) for name, value in current_values(adapter).items()}
    trained = current_values(adapter)
    adapter.write(tmp_path, averaged, about={})
    assert all(torch.equal(value, trained[name]) for name, value in current_values(adapter).items())
    load_values(adapter, averaged, source="The average")
    attach(fresh, kind, seed=9).read(tmp_path)
    torch.testing.assert_close(output(fresh), output(decoder), atol=2e-5, rtol=1e-4)


@every_kind
def test_raw_values_bring_back_the_same_adapter_bit_for_bit(kind: str):
    decoder, fresh = tiny_decoder(), tiny_decoder()
    adapter = attach(decoder, kind)
    train_a_little(decoder, adapter.parameters)
    other = attach(fresh, kind, seed=9)
    load_values(other, current_values(adapter), source="The checkpoint")
    assert torch.equal(output(fresh), output(decoder))


@every_kind
def test_a_run_with_another_alpha_takes_over_the_same_effect(tmp_path: Path, kind: str):
    decoder, fresh = tiny_decoder(), tiny_decoder()
    adapter = attach(decoder, kind)
    train_a_little(decoder, adapter.parameters)
    adapter.write(tmp_path, current_values(adapter), about={})
    attach(fresh, kind, alpha=1.5).read(tmp_path)
    torch.testing.assert_close(output(fresh), output(decoder), atol=2e-5, rtol=1e-4)


@every_kind
def test_dropout_is_drawn_while_training_and_off_otherwise(kind: str):
    decoder, without = tiny_decoder(), tiny_decoder()
    adapter = attach(decoder, kind, dropout=0.5)
    train_a_little(decoder, adapter.parameters)
    load_values(attach(without, kind), current_values(adapter), source="The other")
    assert torch.equal(output(decoder), output(without))
    decoder.train()
    drawn = [loss_of(decoder).item() for _ in range(4)]
    assert len(set(drawn)) == 4
    without.train()
    assert len({loss_of(without).item() for _ in range(2)}) == 1


@every_kind
def test_recomputed_activations_see_the_same_dropout(kind: str):
    gradients = []
    for recompute in (False, True):
        decoder = tiny_decoder()
        adapter = attach(decoder, kind, dropout=0.3)
        torch.manual_seed(5)
        train_a_little(decoder, adapter.parameters)
        if recompute:
            decoder.enable_gradient_checkpointing()
        for parameter in adapter.parameters.values():
            parameter.grad = None
        torch.manual_seed(6)
        loss_of(decoder).backward()
        gradients.append([parameter.grad for parameter in adapter.parameters.values()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-5)


@every_kind
def test_in_bfloat16_it_starts_without_effect_and_trains_in_float32(kind: str):
    decoder = tiny_decoder(dtype=torch.bfloat16)
    tensors = inputs(dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = decoder(**tensors).sample.float()
    adapter = attach(decoder, kind)
    decoder.train()
    with torch.autocast("cpu", torch.bfloat16):
        velocity = decoder(**tensors).sample.float()
        (velocity - 1).square().mean().backward()
    assert (velocity - before).norm() / before.norm() < 1e-3
    gradients = [parameter.grad for parameter in adapter.parameters.values()]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
    assert any(gradient.any() for gradient in gradients if gradient is not None)


@every_kind
def test_a_compiler_makes_one_graph_for_all_layers(kind: str):
    torch._dynamo.reset()
    decoder = tiny_decoder()
    adapter = attach(decoder, kind)
    train_a_little(decoder, adapter.parameters)
    parts, x = [layer.mlp for layer in decoder.eval().layers], torch.randn(1, 3, 48)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda part, x: part(x), backend=counter, fullgraph=True)
    for part in parts:
        torch.testing.assert_close(compiled(part, x), part(x))
    assert counter.frame_count == 1


def scaled_change(factors: nn.Module, kind: str) -> Tensor:
    """Give dW in float64 as LyCORIS defines it; 3 is alpha / rank."""
    own = {name: value.detach().double() for name, value in factors.named_parameters()}
    if kind == "loha":
        return 3 * (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
    return 3 * torch.kron(own["lokr_w1"], own["lokr_w2_a"] @ own["lokr_w2_b"])


@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_a_change_below_the_last_bit_of_a_bfloat16_weight_still_counts(kind: str):
    decoder = tiny_decoder(dtype=torch.bfloat16)
    attach(decoder, kind)
    linear = decoder.layers[0].self_attn.to_q
    with torch.no_grad():
        for name, parameter in linear.change.factors.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    change = scaled_change(linear.change.factors, kind)
    assert change.abs().max() < 2**-9 * linear.weight.abs().mean()
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = linear.change(x, linear.weight).double()
    assert (found - x.double() @ change.T).norm() / found.norm() < 0.02


def test_the_magnitudes_of_an_untrained_dora_are_the_norms_of_bfloat16_rows_in_float32():
    decoder = tiny_decoder(dtype=torch.bfloat16)
    norms = decoder.layers[0].self_attn.to_q.weight.float().norm(dim=1)
    adapter = attach(decoder, "dora")
    magnitudes = adapter.parameters["layers.0.self_attn.q_proj.lora_magnitude_vector"]
    torch.testing.assert_close(magnitudes.detach(), norms)


SIZES = {
    "2B": {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_hidden_layers": 24},
    "XL": {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_hidden_layers": 32},
}
XL_ENCODER = {
    "encoder_hidden_size": 2048,
    "encoder_intermediate_size": 6144,
    "encoder_num_attention_heads": 16,
    "encoder_num_key_value_heads": 8,
}


def attach_any(decoder: nn.Module, modules: list[str], kind: str):
    attach_kind = {"lora": attach_lora, "lokr": attach_lokr, "loha": attach_loha}[kind]
    return attach_kind(decoder, modules, rank=64, alpha=128.0, dropout=0.1)


@pytest.mark.parametrize("kind", ["lora", "lokr", "loha"])
@pytest.mark.parametrize(
    ("size", "attention_type", "targets", "count"),
    [
        ("2B", "both", ATTENTION_PROJECTIONS, 192),
        ("2B", "self", ATTENTION_PROJECTIONS, 96),
        ("2B", "cross", ATTENTION_PROJECTIONS, 96),
        ("2B", "both", PROJECTIONS, 264),
        ("XL", "both", ATTENTION_PROJECTIONS, 256),
        ("XL", "self", ATTENTION_PROJECTIONS, 128),
        ("XL", "cross", ATTENTION_PROJECTIONS, 128),
        ("XL", "both", PROJECTIONS, 352),
        ("XL", "both", ("q_proj", "down_proj"), 96),
    ],
)
def test_as_many_modules_are_adapted_as_promised(kind: str, size: str, attention_type: str, targets, count: int):
    config = {**SIZES[size], "num_key_value_heads": 8, **(XL_ENCODER if size == "XL" else {})}
    with torch.device("meta"):
        decoder = AceStepTransformer1DModel(**architecture.decoder_arguments(config))
        modules = target_names(len(decoder.layers), attention_type=attention_type, target_modules=targets)
        adapter = attach_any(decoder, modules, kind)
    adapted = [name for name, part in decoder.named_modules() if hasattr(part, "change") or hasattr(part, "lora_A")]
    assert len(adapter.modules) == len(set(adapter.modules)) == len(adapted) == count


def test_the_suffixes_of_a_config_file_name_exactly_the_targets():
    decoder = tiny_decoder()

    def suffixes(attention_type: str, *targets: str) -> list[str]:
        return target_suffixes(target_names(2, attention_type=attention_type, target_modules=targets), decoder)

    assert suffixes("both", "v_proj", "q_proj", "down_proj") == ["down_proj", "q_proj", "v_proj"]
    assert suffixes("self", "q_proj", "down_proj") == ["down_proj", "self_attn.q_proj"]
    assert target_suffixes(["layers.1.mlp.up_proj", "layers.0.cross_attn.o_proj"], decoder) == [
        "layers.0.cross_attn.o_proj",
        "layers.1.mlp.up_proj",
    ]
    everywhere = target_names(2, attention_type="both", target_modules=("q_proj",))
    assert target_suffixes([*everywhere, "layers.1.mlp.up_proj"], decoder) == ["layers.1.mlp.up_proj", "q_proj"]


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("lora", {}, []),
        ("lora", {"targets": ("gate_proj", "down_proj")}, ["diffusers will not load this adapter"]),
        ("lora", {"targets": ("v_proj", "o_proj")}, ["diffusers will not load this adapter"]),
        ("lora", {"bias": "lora_only"}, ["--bias lora_only has no effect"]),
        ("lora", {"bias": "all"}, ["9 biases of the model are trained too"]),
        ("dora", {}, ["ComfyUI and acestep.cpp ignore DoRA's magnitudes"]),
        ("lokr", {}, ["diffusers does not load LoKr"]),
        ("lokr of whole factors", {}, ["diffusers does not load LoKr", "At rank 64 both Kronecker factors are whole"]),
        (
            "lokr",
            {"lokr_decompose_both": True, "lokr_factor": 2},
            ["diffusers does not load LoKr", "--lokr-decompose-both has no effect: at rank"],
        ),
        (
            "lokr with everything",
            {"lokr_use_tucker": True},
            [
                "diffusers does not load LoKr",
                "acestep.cpp does not load LoKr whose first factor is decomposed",
                "ComfyUI takes the magnitudes",
                "--lokr-use-tucker has no effect",
            ],
        ),
        ("loha", {}, ["ACE-Step's app, diffusers and acestep.cpp do not load LoHa"]),
    ],
)
def test_it_says_what_will_not_load_it_and_what_has_no_effect(kind: str, options, said: list[str]):
    remarks = attach(tiny_decoder(), kind, **options).remarks
    assert [remark[: len(start)] for remark, start in zip(remarks, said, strict=True)] == said
    assert all(remark.endswith(".") for remark in remarks)


def test_lycoris_keeps_quiet(capfd: pytest.CaptureFixture[str]):
    for kind in KINDS:
        attach(tiny_decoder(), kind, dropout=0.2)
    assert capfd.readouterr() == ("", "")
