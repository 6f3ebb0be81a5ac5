"""Tests of finding checkpoints and of the messages about what is wrong with them, without torch."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sidestep.errors import ConfigError, ModelError
from sidestep.model.checkpoint import (
    Checkpoint,
    check_encoders,
    decoder_tensors,
    encoder_fingerprint,
    find_checkpoint,
    list_models,
    null_condition_tensor,
)

SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
XL_SIZES = SIZES | {"hidden_size": 12, "encoder_hidden_size": 8, "encoder_num_attention_heads": 1}
TENSORS = {
    "decoder.layers.0.self_attn.q_proj.weight": np.ones((4, 8), np.float32),
    "decoder.proj_in.1.bias": np.zeros(8, np.float32),
    "encoder.text_projector.weight": np.full((8, 4), 0.3, np.float32),
    "null_condition_emb": np.zeros((1, 1, 8), np.float32),
    "tokenizer.quantizer.project_in.bias": np.zeros(6, np.float32),
    "detokenizer.norm.weight": np.zeros(8, np.float32),
}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def make_model(root: Path, folder: str, **config: Any) -> Path:
    """Write a model folder in the original layout with a few tensors."""
    write_json(root / folder / "config.json", {"model_type": "acestep", "num_hidden_layers": 2, **SIZES, **config})
    save_file(TENSORS, root / folder / "model.safetensors")
    return root / folder


def make_shards(root: Path, folder: str) -> Path:
    path = make_model(root, folder, **XL_SIZES)
    (path / "model.safetensors").unlink()
    weight_map = {}
    for number, name in enumerate(TENSORS):
        file = f"model-{number + 1:05d}-of-{len(TENSORS):05d}.safetensors"
        save_file({name: TENSORS[name]}, path / file)
        weight_map[name] = file
    write_json(path / "model.safetensors.index.json", {"weight_map": weight_map})
    return path


def make_pipeline(folder: Path, **config: Any) -> Path:
    """Write a folder in diffusers' layout with a few tensors."""
    write_json(folder / "model_index.json", {"_class_name": "AceStepPipeline"})
    write_json(folder / "transformer/config.json", {"num_hidden_layers": 2, **SIZES, **config})
    save_file(
        {"layers.0.self_attn.to_q.weight": TENSORS["decoder.layers.0.self_attn.q_proj.weight"]},
        folder / "transformer/diffusion_pytorch_model.safetensors",
    )
    (folder / "condition_encoder").mkdir()
    encoder = {
        "text_projector.weight": TENSORS["encoder.text_projector.weight"],
        "null_condition_emb": TENSORS["null_condition_emb"],
        "silence_latent": np.zeros((1, 15000, 4), np.float32),
    }
    save_file(encoder, folder / "condition_encoder/diffusion_pytorch_model.safetensors")
    return folder


def make_encoders(root: Path) -> None:
    """Write the VAE, the text encoder and the silence latents, as far as they are looked at without torch."""
    for folder, stem in (("vae", "diffusion_pytorch_model"), ("Qwen3-Embedding-0.6B", "model")):
        write_json(root / folder / "config.json", {"model_type": "qwen3"})
        save_file({"weight": np.zeros(2, np.float32)}, root / folder / f"{stem}.safetensors")
    write_json(root / "Qwen3-Embedding-0.6B/tokenizer.json", {})
    for model in root.glob("acestep-v15-*"):
        (model / "silence_latent.pt").write_bytes(b"PK")


@pytest.mark.parametrize(
    ("variant", "config", "family", "is_xl"),
    [
        ("turbo", {"is_turbo": True, "model_version": "turbo"}, "turbo", False),
        ("base", {"is_turbo": False}, "base", False),
        ("sft", {}, "sft", False),
        ("xl-turbo", {"is_turbo": True, **XL_SIZES}, "turbo", True),
        ("xl-base", XL_SIZES, "base", True),
        ("xl-sft", {**XL_SIZES, "is_turbo": False}, "sft", True),
    ],
)
def test_each_variant_is_found_in_its_folder(tmp_path: Path, variant: str, config: dict, family: str, is_xl: bool):
    folder = make_model(tmp_path, f"acestep-v15-{variant}", **config)
    checkpoint = find_checkpoint(tmp_path, variant)
    assert (checkpoint.folder, checkpoint.layout, checkpoint.variant) == (folder, "original", variant)
    assert (checkpoint.family, checkpoint.is_xl, checkpoint.is_turbo) == (family, is_xl, family == "turbo")
    assert checkpoint.encoder_width == 8
    assert checkpoint.vae == tmp_path / "vae"
    assert checkpoint.text_encoder == checkpoint.tokenizer == tmp_path / "Qwen3-Embedding-0.6B"


def test_the_timestep_distribution_is_that_of_config_json_or_the_original_default(tmp_path: Path):
    make_model(tmp_path, "acestep-v15-turbo", timestep_mu=0.2, timestep_sigma=0.8)
    make_model(tmp_path, "acestep-v15-base")
    turbo, base = find_checkpoint(tmp_path, "turbo"), find_checkpoint(tmp_path, "base")
    assert (turbo.timestep_mu, turbo.timestep_sigma) == (0.2, 0.8)
    assert (base.timestep_mu, base.timestep_sigma) == (-0.4, 1.0)


def test_the_full_folder_name_finds_the_same_model_as_the_variant(tmp_path: Path):
    make_model(tmp_path, "acestep-v15-base")
    assert find_checkpoint(tmp_path, "acestep-v15-base") == find_checkpoint(tmp_path, "base")


def test_the_decoder_is_xl_by_its_sizes_whatever_the_folder_is_called(tmp_path: Path):
    make_model(tmp_path, "my-xl-base")
    make_model(tmp_path, "my-base", hidden_size=2560)
    assert not find_checkpoint(tmp_path, "my-xl-base").is_xl
    assert find_checkpoint(tmp_path, "my-base").is_xl


@pytest.mark.parametrize(
    ("folder", "config", "base_model", "family"),
    [
        ("tune", {"is_turbo": True}, None, "turbo"),
        ("tune", {"model_version": "xl_sft"}, None, "sft"),
        ("my_turbo_tune", {}, None, "turbo"),
        ("tune", {}, "base", "base"),
        ("merge", {"is_turbo": True}, "sft", "sft"),
        ("acestep-v15-turbo-shift3", {"is_turbo": False}, None, "turbo"),
    ],
)
def test_a_custom_folder_tells_its_family_or_the_user_does(
    tmp_path: Path, folder: str, config: dict, base_model: str | None, family: str
):
    make_model(tmp_path, folder, **config)
    checkpoint = find_checkpoint(tmp_path, folder, base_model=base_model)
    assert (checkpoint.family, checkpoint.variant) == (family, folder)


@pytest.mark.parametrize(
    ("folder", "config"), [("tune", {}), ("turbo-base-merge", {}), ("my-turbo", {"is_turbo": False}), ("baseline", {})]
)
def test_a_custom_folder_that_does_not_tell_needs_base_model(tmp_path: Path, folder: str, config: dict):
    make_model(tmp_path, folder, **config)
    with pytest.raises(ModelError, match="which model it descends from") as caught:
        find_checkpoint(tmp_path, folder)
    assert "--base-model" in caught.value.hint


def test_base_model_cannot_contradict_an_official_folder_or_the_size(tmp_path: Path):
    make_model(tmp_path, "acestep-v15-base")
    make_model(tmp_path, "tune")
    with pytest.raises(ConfigError, match="is a base model, not turbo"):
        find_checkpoint(tmp_path, "base", base_model="turbo")
    with pytest.raises(ModelError, match="2B size"):
        find_checkpoint(tmp_path, "tune", base_model="xl-base")
    with pytest.raises(ConfigError, match="not known"):
        find_checkpoint(tmp_path, "tune", base_model="huge")


@pytest.mark.parametrize("variant", ["..", "../other", "/etc", "C:\\models", "a/../../b", "", "\\\\host\\share"])
def test_a_variant_cannot_leave_the_checkpoint_folder(tmp_path: Path, variant: str):
    with pytest.raises(ModelError, match="does not name a folder inside"):
        find_checkpoint(tmp_path, variant)


def test_models_are_listed_by_what_model_variant_takes(tmp_path: Path):
    for name in (
        "my-tune",
        "acestep-v15-xl-base",
        "acestep-v15-turbo",
        "Qwen3-Embedding-0.6B",
        "vae",
        "acestep-5Hz-lm",
    ):
        make_model(tmp_path, name)
    (tmp_path / "notes").mkdir()
    write_json(tmp_path / "other/config.json", {"hello": 1})
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/config.json").write_text("{", encoding="utf-8")
    assert list_models(tmp_path) == ["turbo", "xl-base", "damaged", "my-tune"]
    assert list_models(tmp_path / "nowhere") == []


def test_an_unknown_variant_is_told_what_is_there(tmp_path: Path):
    make_model(tmp_path, "acestep-v15-base")
    with pytest.raises(ModelError, match="no model 'turbo'") as caught:
        find_checkpoint(tmp_path, "turbo")
    assert "It has base" in caught.value.hint


def test_the_folder_of_a_model_itself_is_recognised(tmp_path: Path):
    folder = make_model(tmp_path, "acestep-v15-base")
    with pytest.raises(ModelError) as caught:
        find_checkpoint(folder, "base")
    assert f"--checkpoint-dir {tmp_path.resolve()}" in caught.value.hint


def test_a_missing_and_an_empty_checkpoint_folder_say_what_belongs_there(tmp_path: Path):
    for root in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ModelError) as caught:
            find_checkpoint(root, "turbo")
        assert "acestep-v15-turbo/" in caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "does not hold a JSON object"),
        ("{}", "hidden_size is missing"),
        ('{"hidden_size": "wide"}', "'wide', not a number"),
        (json.dumps({**SIZES, "num_hidden_layers": 2, "timestep_mu": math.nan}), "timestep_mu is nan, not a number"),
        (json.dumps({**SIZES, "num_hidden_layers": 2, "layer_types": ["other", "full_attention"]}), "layer_types"),
        (json.dumps({**SIZES, "num_hidden_layers": 2, "layer_types": ["full_attention"]}), "layer_types"),
    ],
)
def test_a_malformed_config_is_named(tmp_path: Path, content: str, message: str):
    (make_model(tmp_path, "acestep-v15-base") / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=message) as caught:
        find_checkpoint(tmp_path, "base")
    assert "config.json" in caught.value.message


def test_a_missing_config_is_named(tmp_path: Path):
    (make_model(tmp_path, "acestep-v15-base") / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        find_checkpoint(tmp_path, "base")


def test_missing_weights_are_named(tmp_path: Path):
    (make_model(tmp_path, "acestep-v15-base") / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        find_checkpoint(tmp_path, "base")


@pytest.mark.parametrize("kept", [0, 4, 60, -1])
def test_truncated_weights_are_recognised_by_the_header(tmp_path: Path, kept: int):
    weights = make_model(tmp_path, "acestep-v15-base") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated"):
        find_checkpoint(tmp_path, "base")


def test_weights_with_bytes_to_spare_are_damaged(tmp_path: Path):
    weights = make_model(tmp_path, "acestep-v15-base") / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"more")
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        find_checkpoint(tmp_path, "base")


@pytest.mark.parametrize("header", [b"[1]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b"{{{"])
def test_a_strange_header_is_recognised(tmp_path: Path, header: bytes):
    weights = make_model(tmp_path, "acestep-v15-base") / "model.safetensors"
    weights.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError, match="safetensors"):
        find_checkpoint(tmp_path, "base")


def test_a_pointer_of_git_lfs_is_recognised(tmp_path: Path):
    weights = make_model(tmp_path, "acestep-v15-base") / "model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", encoding="utf-8")
    with pytest.raises(ModelError, match="Git LFS pointer"):
        find_checkpoint(tmp_path, "base")


def test_shards_are_read_like_one_file(tmp_path: Path):
    make_model(tmp_path, "acestep-v15-base")
    make_shards(tmp_path, "acestep-v15-xl-base")
    whole, sharded = (decoder_tensors(find_checkpoint(tmp_path, name)) for name in ("base", "xl-base"))
    assert sharded.keys() == whole.keys() == {"layers.0.self_attn.to_q.weight", "proj_in_conv.bias"}
    assert {name: tensor.shape for name, tensor in sharded.items()} == {name: t.shape for name, t in whole.items()}


def test_a_missing_shard_is_named(tmp_path: Path):
    folder = make_shards(tmp_path, "acestep-v15-xl-base")
    (folder / "model-00002-of-00006.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks 1 of 6 weight files: model-00002-of-00006"):
        find_checkpoint(tmp_path, "xl-base")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"decoder.a": "../../secret.safetensors"}}, "outside its folder"),
        ({"weight_map": {"decoder.a": "model-00001-of-00006.safetensors"}}, "do not hold: decoder.a"),
        ({"weight_map": {"decoder.a": 3}}, "weight_map"),
        ({}, "weight_map"),
    ],
)
def test_an_index_that_does_not_fit_is_named(tmp_path: Path, index: dict, message: str):
    folder = make_shards(tmp_path, "acestep-v15-xl-base")
    write_json(folder / "model.safetensors.index.json", index)
    with pytest.raises(ModelError, match=message):
        find_checkpoint(tmp_path, "xl-base")


def test_tensors_of_no_known_part_are_an_error(tmp_path: Path):
    folder = make_model(tmp_path, "acestep-v15-base")
    save_file(TENSORS | {"model.head.weight": np.zeros(2, np.float32)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"no known part: model\.head\.weight"):
        find_checkpoint(tmp_path, "base")


def test_a_pipeline_in_the_root_is_asked_for_by_the_variant_it_is(tmp_path: Path):
    root = make_pipeline(tmp_path / "downloaded", is_turbo=True)
    checkpoint = find_checkpoint(root, "turbo")
    assert (checkpoint.layout, checkpoint.folder, checkpoint.variant) == ("diffusers", root, "turbo")
    assert checkpoint.text_encoder == root / "text_encoder"
    assert checkpoint.tokenizer == root / "tokenizer"
    assert find_checkpoint(root, "downloaded").variant == "downloaded"
    with pytest.raises(ModelError, match="holds the turbo model, not base") as caught:
        find_checkpoint(root, "base")
    assert "--model-variant turbo" in caught.value.hint
    with pytest.raises(ModelError, match="holds no 'mine'"):
        find_checkpoint(root, "mine")


def test_a_pipeline_below_the_root_is_one_model_among_others(tmp_path: Path):
    make_model(tmp_path, "acestep-v15-base")
    make_pipeline(tmp_path / "acestep-v15-xl-turbo-diffusers", **XL_SIZES)
    assert list_models(tmp_path) == ["base", "acestep-v15-xl-turbo-diffusers"]
    checkpoint = find_checkpoint(tmp_path, "acestep-v15-xl-turbo-diffusers")
    assert (checkpoint.layout, checkpoint.family, checkpoint.is_xl) == ("diffusers", "turbo", True)
    assert checkpoint.vae == checkpoint.folder / "vae"


def test_the_encoders_of_a_complete_checkpoint_pass(tmp_path: Path):
    make_model(tmp_path, "acestep-v15-base")
    make_encoders(tmp_path)
    check_encoders(find_checkpoint(tmp_path, "base"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("vae", "The VAE is missing"),
        ("vae/diffusion_pytorch_model.safetensors", "holds no weights"),
        ("Qwen3-Embedding-0.6B", "The text encoder is missing"),
        ("Qwen3-Embedding-0.6B/tokenizer.json", "tokenizer.json is missing"),
        ("acestep-v15-base/silence_latent.pt", "silence_latent.pt is missing"),
    ],
)
def test_what_preprocessing_lacks_is_named_and_training_does_not_miss_it(tmp_path: Path, path: str, message: str):
    make_model(tmp_path, "acestep-v15-base")
    make_encoders(tmp_path)
    missing = tmp_path / path
    missing.rename(tmp_path / "elsewhere")
    checkpoint = find_checkpoint(tmp_path, "base")
    with pytest.raises(ModelError, match=message) as caught:
        check_encoders(checkpoint)
    assert caught.value.hint


def fingerprint_of(root: Path, tensors: dict[str, np.ndarray]) -> str:
    save_file(tensors, make_model(root, "acestep-v15-base") / "model.safetensors")
    return encoder_fingerprint(find_checkpoint(root, "base"))


def test_the_fingerprint_knows_a_changed_encoder_and_ignores_the_decoder(tmp_path: Path):
    before = fingerprint_of(tmp_path, TENSORS)
    assert before.startswith("sha256:")
    other_decoder = TENSORS | {"decoder.proj_in.1.bias": np.ones(8, np.float32)}
    assert fingerprint_of(tmp_path, other_decoder) == before
    tuned = TENSORS | {"encoder.text_projector.weight": np.full((8, 4), 0.31, np.float32)}
    assert fingerprint_of(tmp_path, tuned) != before
    reshaped = TENSORS | {"encoder.text_projector.weight": np.full((4, 8), 0.3, np.float32)}
    assert fingerprint_of(tmp_path, reshaped) != before


def test_the_fingerprint_is_the_same_in_shards_and_in_diffusers_layout(tmp_path: Path):
    whole = fingerprint_of(tmp_path, TENSORS)
    make_shards(tmp_path, "acestep-v15-xl-base")
    pipeline = make_pipeline(tmp_path / "pipeline", is_turbo=True)
    assert encoder_fingerprint(find_checkpoint(tmp_path, "xl-base")) == whole
    assert encoder_fingerprint(find_checkpoint(pipeline, "turbo")) == whole


def test_the_null_condition_is_found_in_both_layouts(tmp_path: Path):
    make_model(tmp_path, "acestep-v15-base")
    make_pipeline(tmp_path / "pipeline", is_turbo=True)
    found: list[Checkpoint] = [find_checkpoint(tmp_path, "base"), find_checkpoint(tmp_path / "pipeline", "turbo")]
    assert [null_condition_tensor(checkpoint)["null_condition_emb"].shape for checkpoint in found] == [(1, 1, 8)] * 2


def test_finding_a_checkpoint_loads_no_torch():
    code = "import sys, sidestep.model.checkpoint, sidestep.model.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
