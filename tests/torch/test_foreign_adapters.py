"""Adapters that other programs wrote are read as those programs mean them, or refused with a reason."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.lokr import LokrModule
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sidestep.errors import ConfigError, ModelError
from sidestep.exports.base import BaseWeights
from sidestep.exports.find import origin_of
from sidestep.exports.peft import Peft
from sidestep.exports.run import export
from sidestep.exports.source import read_adapter
from sidestep.exports.target import Content
from sidestep.model.checkpoint import Checkpoint
from sidestep.model.loading import load_decoder
from sidestep.model.names import to_original
from tests.torch.test_exports import SETTINGS, assert_same, changes_of, trained
from tests.torch.tiny_adapters import attach, tiny_decoder

MODULE = "layers.0.self_attn.q_proj"
QUERY, OTHER_QUERY = "layers.0.self_attn.to_q", "layers.1.self_attn.to_q"


def saved_by_peft(folder: Path, model: nn.Module, config: PeftConfig) -> dict[str, Tensor]:
    """Let PEFT save a random adapter on a model; give what it does to each weight, by the original's names."""
    before = {name: weight.double() for name, weight in model.state_dict().items()}
    wrapped: Any = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(str(folder))
    after = wrapped.merge_and_unload().state_dict()
    changed = {name: after[name].double() - weight for name, weight in before.items()}
    return {to_original(name).removesuffix(".weight"): change for name, change in changed.items() if change.any()}


def original_layers(base: Checkpoint) -> nn.Module:
    """The decoder's layers with their weights, under the original's names."""
    weights = BaseWeights(base)
    root = weights.skeleton()
    for name, module in root.named_modules():
        for own, _ in list(module.named_parameters(recurse=False)):
            value = weights.tensor(f"{name}.{own}").float()
            setattr(module, own, nn.Parameter(value))
    return root


@pytest.mark.parametrize(
    "config",
    [
        LoKrConfig(r=4, alpha=12, target_modules=["q_proj"]),
        LoKrConfig(r=64, alpha=128, target_modules=["q_proj"]),
        LoKrConfig(r=4, alpha=12, target_modules=["q_proj"], rank_pattern={MODULE: 2}, alpha_pattern={MODULE: 3}),
        LoHaConfig(r=4, alpha=12, target_modules=["q_proj"]),
    ],
    ids=["lokr", "lokr of whole factors", "lokr of several ranks", "loha"],
)
def test_lokr_and_loha_of_peft_are_read_at_the_strength_that_their_config_states(
    tmp_path: Path, base: Checkpoint, config: PeftConfig
):
    wanted = saved_by_peft(tmp_path / "theirs", original_layers(base), config)
    assert_same(changes_of(tmp_path / "theirs", base), wanted)


@pytest.mark.parametrize("rank", [2, 64])
def test_a_lokr_of_a_convolution_is_read_as_lycoris_means_it(tmp_path: Path, base: Checkpoint, rank: int):
    layer: Any = original_layers(base).get_submodule("proj_in.1")
    theirs = LokrModule("lycoris_proj_in_1", layer, lora_dim=rank, alpha=6)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    wanted = theirs.get_weight(layer.weight.shape).detach().double()
    save_file(
        {f"lycoris_proj_in_1.{name}": value for name, value in theirs.state_dict().items()}, tmp_path / "x.safetensors"
    )
    assert_same(changes_of(tmp_path / "x.safetensors", base), {"proj_in.1": wanted})


def test_patterns_of_an_adapter_trained_on_diffusers_model_count(tmp_path: Path, base: Checkpoint):
    decoder = load_decoder(base, device=torch.device("cpu"), dtype=torch.float32)
    patterns = {"rank_pattern": {OTHER_QUERY: 7}, "alpha_pattern": {QUERY: 20}}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k"], **patterns)
    wanted = saved_by_peft(tmp_path / "theirs", decoder, config)
    assert_same(changes_of(tmp_path / "theirs", base), wanted)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_rank_stabilised_adapter_of_several_ranks_is_read_at_its_strength(
    tmp_path: Path, base: Checkpoint, use_dora: bool
):
    patterns = {"rank_pattern": {MODULE: 2, "cross_attn.q_proj": 9}, "alpha_pattern": {MODULE: 3, "layers.1.*": 5}}
    config = LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, use_dora=use_dora, target_modules=["q_proj", "down_proj"], **patterns
    )
    wanted = saved_by_peft(tmp_path / "theirs", original_layers(base), config)
    assert_same(changes_of(tmp_path / "theirs", base), wanted)


def test_the_bias_of_an_adapted_module_is_read_and_written_as_peft_does(tmp_path: Path, base: Checkpoint):
    config = LoraConfig(r=4, lora_alpha=8, bias="lora_only", target_modules=["condition_embedder", "q_proj"])
    saved_by_peft(tmp_path / "theirs", original_layers(base), config)
    found = read_adapter(tmp_path / "theirs", BaseWeights(base))
    assert list(found.biases) == ["condition_embedder.bias"]
    export(tmp_path / "theirs", base, target_name="peft", output=tmp_path / "ours")
    again = read_adapter(tmp_path / "ours", BaseWeights(base))
    torch.testing.assert_close(again.biases, found.biases)


@pytest.mark.parametrize("kind", ["dora", "lokr dora"])
def test_magnitudes_that_were_exported_for_comfyui_are_read_back(tmp_path: Path, base: Checkpoint, kind: str):
    wanted = trained(tmp_path / "run", base, **SETTINGS[kind])
    export(tmp_path / "run", base, target_name="comfyui", output=tmp_path / "theirs")
    assert_same(changes_of(tmp_path / "theirs", base), wanted)


def test_a_file_of_8_bit_numbers_is_read(tmp_path: Path, base: Checkpoint):
    down, up = (torch.randn(shape).to(torch.float8_e4m3fn) for shape in ((4, 48), (64, 4)))
    save_file({f"{MODULE}.lora_A.weight": down, f"{MODULE}.lora_B.weight": up}, tmp_path / "small.safetensors")
    assert_same(changes_of(tmp_path / "small.safetensors", base), {MODULE: up.double() @ down.double()})


def lora(rank: int = 4, **others: Tensor) -> dict[str, Tensor]:
    return {"lora_down.weight": torch.ones(rank, 48), "lora_up.weight": torch.ones(64, rank), **others}


@pytest.mark.parametrize(
    "parts",
    [
        lora(alpha=torch.ones(2)),
        lora(rank=0),
        {"lora_down.weight": torch.ones(4, 48), "lora_up.weight": torch.ones(64, 5)},
        {"lora_down.weight": torch.ones(()), "lora_up.weight": torch.ones(64, 5)},
        {"lokr_w1": torch.ones(4), "lokr_w2": torch.ones(16, 12)},
        {"lokr_w1": torch.ones(4, 4), "lokr_w2_a": torch.ones(16, 3), "lokr_w2_b": torch.ones(2, 12)},
        {f"hada_{name}": torch.ones(64 if name.endswith("a") else 3, 48) for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
    ],
)
def test_factors_that_do_not_fit_each_other_are_refused(tmp_path: Path, base: Checkpoint, parts: dict[str, Tensor]):
    path = tmp_path / "broken.safetensors"
    save_file({f"{MODULE}.{part}": tensor for part, tensor in parts.items()}, path)
    with pytest.raises(ModelError, match=f"factors of {MODULE} that do not fit each other"):
        read_adapter(path, BaseWeights(base))


def test_a_bias_of_another_model_is_refused(tmp_path: Path, base: Checkpoint):
    for name in ("bias", "diff_b"):
        save_file({f"condition_embedder.{name}": torch.ones(64)}, tmp_path / f"{name}.safetensors")
        with pytest.raises(ModelError, match=r"condition_embedder\.bias is \[48\] there"):
            read_adapter(tmp_path / f"{name}.safetensors", BaseWeights(base))


def test_biases_alone_are_no_adapter_for_peft(tmp_path: Path, base: Checkpoint):
    save_file({"condition_embedder.diff_b": torch.ones(48)}, tmp_path / "bias.safetensors")
    with pytest.raises(ModelError, match="biases alone"):
        export(tmp_path / "bias.safetensors", base, target_name="peft", output=tmp_path / "out")
    export(tmp_path / "bias.safetensors", base, target_name="comfyui", output=tmp_path / "out")


def test_one_module_under_two_names_is_refused(tmp_path: Path, base: Checkpoint):
    stems = (f"base_model.model.{MODULE}", f"diffusion_model.decoder.{MODULE}")
    save_file({f"{stem}.{name}": part for stem in stems for name, part in lora().items()}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="more than one adapter"):
        read_adapter(tmp_path / "a.safetensors", BaseWeights(base))


@pytest.mark.parametrize("stated", [0, -4, "8", None])
def test_a_rank_of_peft_that_cannot_be_meant_is_named(tmp_path: Path, base: Checkpoint, stated: Any):
    saved_by_peft(tmp_path / "a", original_layers(base), LoKrConfig(r=4, alpha=12, target_modules=["q_proj"]))
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": stated}))
    with pytest.raises(ModelError, match=r"adapter_config\.json states .* as the (r|rank) of "):
        read_adapter(tmp_path / "a", BaseWeights(base))


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"[" * 200_000, "cannot be read as safetensors"),
        (b'{"__metadata__": {"sidestep": 5}}', None),
        (b'{"__metadata__": {"sidestep": "' + b"[" * 200_000 + b'"}}', None),
    ],
)
def test_a_header_that_is_no_header_of_ours_says_nothing_or_is_refused(tmp_path: Path, header: bytes, said: str | None):
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    if said is None:
        assert origin_of(path) == {}
        return
    with pytest.raises(ModelError, match=said) as caught:
        origin_of(path)
    assert "copy or download it again" in caught.value.hint


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_of_weights_that_peft_made_of_the_models_is_refused(tmp_path: Path, base: Checkpoint, start: Any):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=start)
    saved_by_peft(tmp_path / "theirs", original_layers(base), config)
    with pytest.raises(ModelError, match=f"init_lora_weights '{start}'"):
        read_adapter(tmp_path / "theirs", BaseWeights(base))
    with pytest.raises(ModelError, match=f"init_lora_weights '{start}'"):
        attach(tiny_decoder(), "lora").read(tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.init_lora_weights": start})}
    save_file(tensors, tmp_path / "diffusers.safetensors", metadata=header)
    with pytest.raises(ModelError, match=f"init_lora_weights '{start}'"):
        read_adapter(tmp_path / "diffusers.safetensors", BaseWeights(base))


def test_other_starts_are_read(tmp_path: Path, base: Checkpoint):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="orthogonal")
    wanted = saved_by_peft(tmp_path / "theirs", original_layers(base), config)
    assert_same(changes_of(tmp_path / "theirs", base), wanted)


def test_a_merged_model_without_a_module_of_the_adapter_is_refused(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    from sidestep.exports import merged

    trained(tmp_path / "run", base, **SETTINGS["lora"])
    merge = merged._merge

    def forgetful(tensors: dict[str, Tensor], content: Content) -> None:
        merge(tensors, replace(content, changes={name: c for name, c in content.changes.items() if name != MODULE}))

    monkeypatch.setattr(merged, "_merge", forgetful)
    with pytest.raises(ModelError, match=f"merged does not read 1 of the adapter's modules, {MODULE} for one"):
        export(tmp_path / "run", base, target_name="merged", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_change_that_rounds_to_nothing_is_no_lost_one(tmp_path: Path, base: Checkpoint):
    weight = BaseWeights(base).weight(MODULE)
    factors = torch.full((1, weight.shape[1]), 1e-20), torch.full((weight.shape[0], 1), 1e-20)
    names = [f"base_model.model.{MODULE}.lora_{part}.weight" for part in "AB"]
    save_file(dict(zip(names, factors, strict=True)), tmp_path / "tiny.safetensors")
    done = export(tmp_path / "tiny.safetensors", base, target_name="merged", output=tmp_path / "out")
    assert done.modules == 1 and done.error == 0


def test_of_two_exports_into_one_folder_the_later_is_refused(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    trained(tmp_path / "run", base, **SETTINGS["lora"])
    write = Peft.write

    def meet_another(self: Peft, folder: Path, content: Content, weights: BaseWeights) -> None:
        monkeypatch.setattr(Peft, "write", write)
        write(self, folder, content, weights)
        export(tmp_path / "run", base, target_name="comfyui", output=tmp_path / "out")

    monkeypatch.setattr(Peft, "write", meet_another)
    with pytest.raises(ConfigError, match="holds something already"):
        export(tmp_path / "run", base, target_name="peft", output=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["out.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (f"unet.{MODULE}.lora_A.weight", f"unet.{MODULE}.lora_B.weight"),
        (f"model.decoder.{MODULE}.lora_A.weight", f"model.decoder.{MODULE}.lora_B.weight"),
        (f"{MODULE}.lora.down.weight", f"{MODULE}.lora.up.weight"),
        (f"{MODULE}.lora_A", f"{MODULE}.lora_B"),
        tuple(f"lycoris_decoder_{MODULE.replace('.', '_')}.lora_{part}.weight" for part in ("down", "up")),
    ],
    ids=["unet", "model.decoder", "lora.up", "bare", "lycoris_decoder"],
)
def test_other_spellings_of_a_lora_are_read(tmp_path: Path, base: Checkpoint, down: str, up: str):
    out, into = BaseWeights(base).shapes[MODULE]
    factors = {down: torch.randn(4, into), up: torch.randn(out, 4)}
    save_file(factors, tmp_path / "theirs.safetensors")
    found = read_adapter(tmp_path / "theirs.safetensors", BaseWeights(base))
    assert_same(
        {name: change.product() for name, change in found.changes.items()}, {MODULE: factors[up] @ factors[down]}
    )


@pytest.mark.parametrize(
    ("module", "hint"),
    [
        ("layers.99.self_attn.q_proj", "Is --model-variant the model"),
        ("lora_unet_layers_99_self_attn_q_proj", "Is --model-variant the model"),
        ("transformer_blocks.0.attn.to_q", "Names are read as PEFT"),
        ("lora_te_text_model_layers_0_q_proj", "Names are read as PEFT"),
    ],
)
def test_a_module_that_is_not_there_is_refused_with_the_likely_reason(
    tmp_path: Path, base: Checkpoint, module: str, hint: str
):
    save_file({f"{module}.lora_{part}.weight": torch.randn(4, 4) for part in "AB"}, tmp_path / "theirs.safetensors")
    with pytest.raises(ModelError, match="which the base model does not have") as raised:
        read_adapter(tmp_path / "theirs.safetensors", BaseWeights(base))
    assert raised.value.hint.startswith(hint)


def test_an_export_that_diffusers_will_not_load_says_so(tmp_path: Path, base: Checkpoint):
    for kind, said in (("mlp only", "diffusers will not load this adapter"), ("lora", "")):
        trained(tmp_path / kind, base, **SETTINGS[kind])
        done = export(tmp_path / kind, base, target_name="peft", output=tmp_path / f"{kind} out")
        assert done.remark.startswith(said) and bool(done.remark) == bool(said)
    assert export(tmp_path / "mlp only", base, target_name="diffusers", output=tmp_path / "out").remark == ""
