"""Which adapters a run can start from, and how those that do not fit are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris import create_lycoris
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sidestep.config.runs import RUN_CONFIG
from sidestep.errors import ModelError
from sidestep.training.adapters.base import ATTENTION_PROJECTIONS, Adapter, current_values
from tests.torch.tiny_adapters import (
    PROJECTIONS,
    assert_same_layers,
    attach,
    header_of,
    original_decoder,
    output,
    tiny_decoder,
    train_and_write,
)

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture
def official_lokr(tmp_path: Path, request: pytest.FixtureRequest):
    """Write a LoKr as the official trainer does: a network on every layer, of which only the attention is trained."""
    decompose = getattr(request, "param", False)
    decoder = original_decoder()
    torch.manual_seed(4)
    settings = {"linear_dim": 2, "linear_alpha": 6, "factor": -1, "decompose_both": True}
    network = create_lycoris(decoder, 1.0, algo="lokr", dora_wd=decompose, **settings)
    with torch.no_grad():
        for lora in network.loras:
            if lora.lora_name.endswith(tuple(ATTENTION_PROJECTIONS)):
                nn.init.normal_(lora.lokr_w2_b, std=0.3)
                if decompose:
                    lora.dora_scale.mul_(1.2)
    network.apply_to()
    path = tmp_path / "lokr_weights.safetensors"
    config = json.dumps({**settings, "weight_decompose": decompose})
    network.save_weights(str(path), torch.float32, {"algo": "lokr", "format": "lycoris", "lokr_config": config})
    return decoder, path


@pytest.mark.parametrize("official_lokr", [False, True], indirect=True, ids=["plain", "with magnitudes"])
def test_an_official_lokr_is_taken_over_from_all_the_layers_it_wraps(official_lokr):
    decoder, path = official_lokr
    ours = tiny_decoder()
    decompose = "lycoris_condition_embedder.dora_scale" in load_file(path)
    options = {"lokr_weight_decompose": decompose}
    adapter = attach(ours, "lokr, both factors decomposed", targets=ATTENTION_PROJECTIONS, **options)
    adapter.read(path)
    assert_same_layers(decoder, ours)
    assert len({name.split(".")[0] for name in load_file(path)}) > len(adapter.modules)


def test_a_module_that_was_trained_there_and_is_not_here_is_named(official_lokr):
    _, path = official_lokr
    adapter = attach(tiny_decoder(), "lokr, both factors decomposed", targets=("q_proj", "k_proj", "o_proj"))
    before = current_values(adapter)
    with pytest.raises(
        ModelError, match=r"changes layers\.0\.(self|cross)_attn\.v_proj, which .* \(4 such modules\)"
    ) as caught:
        adapter.read(path)
    assert "--target-modules" in caught.value.hint
    assert_unchanged(adapter, before)


@pytest.mark.parametrize("official_lokr", [True], indirect=True)
def test_a_trained_magnitude_alone_is_a_change_too(official_lokr):
    _, path = official_lokr
    header, tensors = header_of(path), load_file(path)
    tensors["lycoris_condition_embedder.dora_scale"] *= 1.01
    save_file(tensors, path, metadata=header)
    adapter = attach(
        tiny_decoder(), "lokr, both factors decomposed", targets=ATTENTION_PROJECTIONS, lokr_weight_decompose=True
    )
    with pytest.raises(ModelError, match=r"changes condition_embedder, which"):
        adapter.read(path)


@pytest.mark.parametrize("options", [{"rank": 3}, {"lokr_factor": 4}, {"lokr_decompose_both": False}])
def test_other_settings_are_refused_with_those_of_the_file(official_lokr, options):
    _, path = official_lokr
    adapter = attach(tiny_decoder(), "lokr, both factors decomposed", targets=ATTENTION_PROJECTIONS, **options)
    with pytest.raises(ModelError, match="does not fit: layers") as caught:
        adapter.read(path)
    assert "(linear_dim 2, linear_alpha 6, factor -1, decompose_both on, weight_decompose off)" in caught.value.hint


def test_a_rank_stabilised_lora_keeps_its_effect(tmp_path: Path):
    decoder, _ = train_and_write(tmp_path, "lora", targets=ATTENTION_PROJECTIONS, rank=3)
    path = tmp_path / "adapter_model.safetensors"
    scale, tensors = 5 / 3**0.5, load_file(path)
    save_file({name: value / scale if "lora_B" in name else value for name, value in tensors.items()}, path)
    write_config(tmp_path, lora_alpha=5, use_rslora=True)
    fresh = tiny_decoder()
    attach(fresh, "lora", targets=ATTENTION_PROJECTIONS, rank=3).read(tmp_path)
    torch.testing.assert_close(output(fresh), output(decoder), **TOLERANCE)


@pytest.mark.parametrize("query", ["q_proj", "to_q"])
def test_a_lora_of_smaller_and_patterned_ranks_keeps_its_effect(tmp_path: Path, query: str):
    decoder, adapter = train_and_write(tmp_path, "lora", targets=ATTENTION_PROJECTIONS)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    shrunk = "base_model.model.layers.1.self_attn.q_proj.lora_"
    tensors[f"{shrunk}A.weight"] = tensors[f"{shrunk}A.weight"][:1].contiguous()
    tensors[f"{shrunk}B.weight"] = tensors[f"{shrunk}B.weight"][:, :1].contiguous() / 3
    save_file(tensors, path)
    rank_pattern, alpha_pattern = {f"layers.1.self_attn.{query}": 1}, {f"1.self_attn.{query}": 3}
    write_config(tmp_path, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    fresh = tiny_decoder()
    attach(fresh, "lora", targets=PROJECTIONS, rank=5).read(tmp_path)
    with torch.no_grad():
        adapter.parameters["layers.1.self_attn.q_proj.lora_B.weight"][:, 1] = 0
    torch.testing.assert_close(output(fresh), output(decoder), **TOLERANCE)


def test_a_lora_in_the_official_trainers_folder_is_found(tmp_path: Path):
    decoder, _ = train_and_write(tmp_path / "adapter", "lora")
    for path in (tmp_path, tmp_path / "adapter", tmp_path / "adapter" / "adapter_model.safetensors"):
        fresh = tiny_decoder()
        attach(fresh, "lora").read(path)
        torch.testing.assert_close(output(fresh), output(decoder), **TOLERANCE)


@pytest.mark.parametrize("kind", ["lora", "lokr", "loha"])
def test_the_folder_of_a_run_means_its_final_adapter(tmp_path: Path, kind: str):
    train_and_write(tmp_path / "mine_best", kind, seed=2)
    decoder, _ = train_and_write(tmp_path / "mine", kind)
    (tmp_path / RUN_CONFIG).write_text('{"settings": {"run_name": "mine"}}')
    fresh = tiny_decoder()
    attach(fresh, kind).read(tmp_path)
    torch.testing.assert_close(output(fresh), output(decoder), **TOLERANCE)
    other = "loha" if kind == "lokr" else "lokr"
    with pytest.raises(ModelError, match=r"holds a Lo\w\w, not a Lo"):
        attach(tiny_decoder(), other).read(tmp_path)


@pytest.mark.parametrize("kind", ["lora", "lokr", "loha"])
def test_an_adapter_of_another_kind_is_named(tmp_path: Path, kind: str):
    train_and_write(tmp_path, kind)
    labels = {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa"}
    for other, label in labels.items():
        if other != kind:
            with pytest.raises(ModelError, match=f"holds a {labels[kind]}, not a {label}") as caught:
                attach(tiny_decoder(), other).read(tmp_path)
            assert f"--adapter-type {kind}" in caught.value.hint


@pytest.mark.parametrize(("kind", "name"), [("lora", "comfy.safetensors"), ("lora", "old.pt"), ("lokr", "old.bin")])
def test_an_adapter_beside_the_file_that_was_named_is_not_taken_for_it(tmp_path: Path, kind: str, name: str):
    train_and_write(tmp_path, kind)
    (tmp_path / name).write_bytes(b"another adapter")
    adapter = attach(tiny_decoder(), kind)
    with pytest.raises(ModelError, match=r"is not read: a Lo.* is read from .*safetensors"):
        adapter.read(tmp_path / name)


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_where_there_is_no_adapter_the_error_says_what_is_looked_for(tmp_path: Path, kind: str):
    adapter = attach(tiny_decoder(), kind)
    with pytest.raises(ModelError, match="no such file or folder"):
        adapter.read(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="There is no Lo") as caught:
        adapter.read(tmp_path)
    assert ".safetensors" in caught.value.hint


def test_a_lora_is_no_dora(tmp_path: Path):
    for kind, other in (("lora", "dora"), ("dora", "lora")):
        train_and_write(tmp_path / kind, kind)
        with pytest.raises(ModelError, match=rf"holds a \w+, not a {'DoRA' if other == 'dora' else 'LoRA'}"):
            attach(tiny_decoder(), other).read(tmp_path / kind)


def drop_a_matrix(tensors: dict[str, Tensor]) -> None:
    tensors.pop(next(name for name in sorted(tensors) if name.endswith("B.weight")))


def add_a_module(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.condition_embedder.lora_A.weight"] = torch.zeros(2, 48)


def spoil_a_number(tensors: dict[str, Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def widen(tensors: dict[str, Tensor]) -> None:
    name = "base_model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[name] = torch.zeros(2, 64)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (drop_a_matrix, r"is incomplete: layers\.0\.cross_attn\.k_proj\.lora_B\.weight is missing"),
        (add_a_module, r"holds condition_embedder\.lora_A\.weight, which this run does not train"),
        (spoil_a_number, "not finite"),
        (widen, r"q_proj\.lora_A\.weight is \[2, 64\] in that adapter and \[2, 48\] here"),
        (dict.clear, "every tensor is missing"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_and_nothing_is_changed(tmp_path: Path, spoil, said: str):
    train_and_write(tmp_path, "lora", targets=ATTENTION_PROJECTIONS)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path)
    adapter = attach(tiny_decoder(), "lora", targets=ATTENTION_PROJECTIONS)
    before = current_values(adapter)
    with pytest.raises(ModelError, match=said):
        adapter.read(tmp_path)
    assert_unchanged(adapter, before)


def test_a_lora_with_other_modules_points_to_the_settings_and_the_rank_map_that_chose_them(tmp_path: Path):
    train_and_write(tmp_path, "lora", targets=ATTENTION_PROJECTIONS)
    with pytest.raises(ModelError, match="which this run does not train") as caught:
        attach(tiny_decoder(), "lora", targets=("q_proj",)).read(tmp_path)
    assert "--target-modules" in caught.value.hint
    assert "--rank-map" in caught.value.hint


def test_a_larger_rank_is_refused(tmp_path: Path):
    train_and_write(tmp_path, "lora", rank=4)
    with pytest.raises(ModelError, match="in that adapter") as caught:
        attach(tiny_decoder(), "lora").read(tmp_path)
    assert "--rank" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": "four"}, "must be numbers above 0"),
        ({"lora_alpha": 0}, "must be numbers above 0"),
        ({"alpha_pattern": {"q_proj": None}}, "must be numbers above 0"),
        ({"rank_pattern": ["q_proj"]}, "must be numbers above 0"),
        ({"rank_pattern": {"q_proj(": 1}}, "is no pattern"),
        ({"peft_type": "OFT"}, "does not describe a LoRA"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(tmp_path: Path, changes, said: str):
    train_and_write(tmp_path, "lora")
    write_config(tmp_path, **changes)
    with pytest.raises(ModelError, match=said):
        attach(tiny_decoder(), "lora").read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes):
    train_and_write(tmp_path, "lora")
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        attach(tiny_decoder(), "lora").read(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match="without it the adapter's strength is unknown"):
        attach(tiny_decoder(), "lora").read(tmp_path)


@pytest.mark.parametrize("kind", ["lora", "lokr", "loha"])
def test_a_damaged_file_is_refused(tmp_path: Path, kind: str):
    train_and_write(tmp_path, kind)
    (path,) = tmp_path.glob("*.safetensors")
    for content in (path.read_bytes()[:-100], b"", b"not tensors at all"):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="is damaged"):
            attach(tiny_decoder(), kind).read(tmp_path)


def test_a_lycoris_file_of_something_else_is_refused(tmp_path: Path):
    path = tmp_path / "other.safetensors"
    adapter = attach(tiny_decoder(), "lokr")
    save_file({"lora_unet_block.lora_up.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ModelError, match="holds no lokr of LyCORIS"):
        adapter.read(path)
    save_file({"lycoris_elsewhere.lokr_w1": torch.zeros(2, 2), "lycoris_elsewhere.lokr_w2": torch.zeros(2, 2)}, path)
    with pytest.raises(ModelError, match="changes none of the modules that this run adapts"):
        adapter.read(path)


def write_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def assert_unchanged(adapter: Adapter, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(parameter, before[name]) for name, parameter in adapter.parameters.items())
