"""What is written is loaded by the programs it is meant for, and means the same there."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import AceStepPipeline
from lycoris import create_lycoris
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from sidestep.training.adapters.base import ATTENTION_PROJECTIONS
from tests.torch.tiny_adapters import (
    KINDS,
    PROJECTIONS,
    assert_same_layers,
    header_of,
    original_decoder,
    output,
    tiny_decoder,
    train_and_write,
)

PEFT_KINDS = [kind for kind in KINDS if KINDS[kind]["adapter_type"] in ("lora", "dora")]
LYCORIS_KINDS = [kind for kind in KINDS if kind not in PEFT_KINDS]
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


# PEFT


@pytest.mark.parametrize("kind", PEFT_KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"attention_type": "self", "targets": ATTENTION_PROJECTIONS}], ids=["all", "self"]
)
def test_peft_loads_the_folder_onto_the_original_model(tmp_path: Path, kind: str, options):
    folder = tmp_path / "adapter"
    decoder, _ = train_and_write(folder, kind, dropout=0.1, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys")
        loaded = PeftModel.from_pretrained(original_decoder(), folder).eval()
    assert_same_layers(loaded.base_model.model, decoder)
    ours = {name: part for name, part in loaded.named_modules() if hasattr(part, "scaling")}
    assert {scaling for part in ours.values() for scaling in part.scaling.values()} == {1.0}


def test_the_biases_of_the_whole_model_reach_peft(tmp_path: Path):
    _, adapter = train_and_write(tmp_path, "lora with all biases")
    loaded = PeftModel.from_pretrained(original_decoder(), tmp_path)
    names = [name for name in adapter.parameters if name.endswith(".bias")]
    for name in names:
        assert torch.equal(loaded.base_model.model.get_parameter(name), adapter.parameters[name]), name
    assert len(names) == 9


@pytest.mark.parametrize("kind", [kind for kind in PEFT_KINDS if "bias" not in kind])
def test_diffusers_loads_the_folder_and_renders_the_same(tmp_path: Path, kind: str):
    decoder, _ = train_and_write(tmp_path, kind)
    fresh = tiny_decoder()
    pipeline_with(fresh).load_lora_weights(tmp_path)
    error = (output(fresh) - output(decoder)).abs().max().item()
    print(f"largest error {error:.2g}")
    torch.testing.assert_close(output(fresh), output(decoder), **TOLERANCE)


def test_diffusers_refuses_biases_and_passes_over_an_mlp_adapter_as_the_remarks_say(tmp_path: Path):
    train_and_write(tmp_path / "biases", "lora with all biases")
    with pytest.raises(ValueError, match="Invalid LoRA"):
        pipeline_with(tiny_decoder()).load_lora_weights(tmp_path / "biases")
    train_and_write(tmp_path / "mlp", "lora", targets=("gate_proj", "v_proj"))
    fresh = tiny_decoder()
    before = output(fresh)
    pipeline_with(fresh).load_lora_weights(tmp_path / "mlp")
    assert torch.equal(output(fresh), before)


def pipeline_with(decoder: nn.Module) -> AceStepPipeline:
    """Give diffusers' pipeline with nothing but the decoder in it."""
    others = ("vae", "text_encoder", "tokenizer", "condition_encoder", "scheduler")
    return AceStepPipeline(transformer=decoder, **dict.fromkeys(others))


def test_the_lora_file_is_what_every_reader_expects(tmp_path: Path):
    train_and_write(tmp_path, "lora", attention_type="cross", targets=ATTENTION_PROJECTIONS)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["lora_alpha"] == config["r"] == 2
    assert config["target_modules"] == [f"cross_attn.{name}" for name in ("k_proj", "o_proj", "q_proj", "v_proj")]
    assert config["base_model_name_or_path"] == "" and config["bias"] == "none" and config["use_rslora"] is False
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 4 * 2
    assert tensors["base_model.model.layers.1.cross_attn.o_proj.lora_A.weight"].shape == (2, 64)
    assert tensors["base_model.model.layers.1.cross_attn.o_proj.lora_B.weight"].shape == (48, 2)
    assert header_of(tmp_path / "adapter_model.safetensors") == {"format": "pt", "sidestep": '{"version": "0"}'}


def test_a_dora_file_holds_a_magnitude_for_every_row(tmp_path: Path):
    train_and_write(tmp_path, "dora", targets=("k_proj",))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.layers.0.self_attn.k_proj.lora_magnitude_vector"].shape == (32,)
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["use_dora"] is True


# LyCORIS


def load_with_lycoris(decoder: nn.Module, path: Path) -> None:
    """Load a file as the official app does: a network on every layer, from the settings in the header."""
    header = header_of(path)
    config = json.loads(header[f"{header['algo']}_config"])
    names = ("linear_dim", "linear_alpha", "factor", "decompose_both", "use_tucker", "use_scalar", "full_matrix")
    known = {name: config[name] for name in names if name in config}
    decompose = config.get("weight_decompose", False)
    network = create_lycoris(decoder, 1.0, algo=header["algo"], **known, dora_wd=decompose, bypass_mode=False)
    network.apply_to()
    report = network.load_weights(str(path))
    assert "unexpected keys" not in report
    network.eval()


@pytest.mark.parametrize("kind", LYCORIS_KINDS)
@pytest.mark.parametrize("targets", [ATTENTION_PROJECTIONS, PROJECTIONS], ids=["attention", "all"])
def test_lycoris_loads_the_file_onto_the_original_model(tmp_path: Path, kind: str, targets):
    decoder, adapter = train_and_write(tmp_path, kind, targets=targets)
    (path,) = tmp_path.glob("*.safetensors")
    original = original_decoder()
    load_with_lycoris(original, path)
    assert_same_layers(original, decoder)
    assert len({name.split(".")[0] for name in load_file(path)}) == len(adapter.modules)


def test_the_lokr_file_is_what_the_official_app_expects(tmp_path: Path):
    train_and_write(tmp_path, "lokr with scalars", attention_type="self", targets=ATTENTION_PROJECTIONS)
    path = tmp_path / "lokr_weights.safetensors"
    header = header_of(path)
    assert (header["algo"], header["format"], header["sidestep"]) == ("lokr", "lycoris", '{"version": "0"}')
    assert json.loads(header["lokr_config"]) == {
        "linear_dim": 2,
        "linear_alpha": 6,
        "factor": -1,
        "decompose_both": False,
        "use_tucker": True,
        "use_scalar": False,
        "weight_decompose": False,
        "target_modules": [f"self_attn.{name}" for name in ("k_proj", "o_proj", "q_proj", "v_proj")],
        "full_matrix": False,
        "bypass_mode": False,
        "rs_lora": False,
        "unbalanced_factorization": False,
    }
    tensors = load_file(path)
    assert {name.split(".")[1] for name in tensors} == {"alpha", "lokr_w1", "lokr_w2_a", "lokr_w2_b"}
    assert tensors["lycoris_layers_0_self_attn_q_proj.alpha"] == 6 and len(tensors) == 2 * 4 * 4


def test_whole_factors_carry_an_alpha_that_scales_by_one(tmp_path: Path):
    train_and_write(tmp_path, "lokr of whole factors", alpha=128.0)
    tensors = load_file(tmp_path / "lokr_weights.safetensors")
    assert {float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")} == {64.0}


def test_a_loha_file_says_so_and_does_not_pass_for_a_lokr(tmp_path: Path):
    train_and_write(tmp_path, "loha", targets=("q_proj",))
    header = header_of(tmp_path / "loha_weights.safetensors")
    assert header["algo"] == "loha" and "lokr_config" not in header
    assert json.loads(header["loha_config"])["target_modules"] == ["q_proj"]
