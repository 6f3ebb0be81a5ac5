"""Tests of loading each part of a checkpoint: strictly, alone, and equal in both layouts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepTimbreEncoder
from safetensors.torch import load_file, save_file
from torch import Tensor

from sidestep.demo.checkpoint import build_toy_checkpoint
from sidestep.errors import ModelError
from sidestep.model import loading
from sidestep.model.checkpoint import Checkpoint, encoder_fingerprint, find_checkpoint
from sidestep.model.loading import (
    TimbreEncoder,
    load_condition_encoder,
    load_decoder,
    load_null_condition,
    load_silence_latent,
    load_text_encoder,
    load_vae,
)

CPU = torch.device("cpu")
PARTS: list[Callable[..., Any]] = [
    load_decoder,
    load_condition_encoder,
    load_vae,
    lambda *a, **k: load_text_encoder(*a, **k)[1],
]


@pytest.fixture(scope="module", params=["base", "xl-turbo"])
def both_layouts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    """The same weights in the original layout and in diffusers'."""
    folder = tmp_path_factory.mktemp(request.param)
    roots = [
        build_toy_checkpoint(folder / kind, variant=request.param, layout=kind) for kind in ("original", "diffusers")
    ]
    return [find_checkpoint(root, request.param) for root in roots]


@pytest.fixture
def toy(tmp_path: Path) -> Checkpoint:
    return find_checkpoint(build_toy_checkpoint(tmp_path), "base")


def change_weights(checkpoint: Checkpoint, change: Callable[[dict[str, Tensor]], Any], file: str = "") -> None:
    path = checkpoint.root / file if file else checkpoint.folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)


@pytest.mark.parametrize("load", PARTS)
def test_both_layouts_give_the_same_weights(both_layouts: list[Checkpoint], load: Callable[..., Any]):
    original, diffusers = (load(checkpoint, device=CPU, dtype=torch.float32) for checkpoint in both_layouts)
    assert original.state_dict().keys() == diffusers.state_dict().keys()
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, diffusers.state_dict()[name]), name


def test_both_layouts_give_the_same_null_condition_silence_tokens_and_fingerprint(both_layouts: list[Checkpoint]):
    original, diffusers = both_layouts
    null = [load_null_condition(checkpoint, device=CPU, dtype=torch.float32) for checkpoint in both_layouts]
    assert null[0].shape == (1, 1, original.encoder_width)
    assert torch.equal(*null)
    assert torch.equal(load_silence_latent(original), load_silence_latent(diffusers))
    tokenizers = [load_text_encoder(checkpoint, device=CPU, dtype=torch.float32)[0] for checkpoint in both_layouts]
    assert tokenizers[0]("# Caption\nmañana").input_ids == tokenizers[1]("# Caption\nmañana").input_ids
    assert encoder_fingerprint(original) == encoder_fingerprint(diffusers)


@pytest.mark.parametrize("load", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_comes_frozen_in_evaluation_mode_and_in_the_wanted_dtype(
    toy: Checkpoint, load: Callable[..., Any], dtype: torch.dtype
):
    part = load(toy, device=CPU, dtype=dtype)
    assert not part.training
    assert not any(parameter.requires_grad for parameter in part.parameters())
    assert {parameter.dtype for parameter in part.parameters()} == {dtype}
    assert not any(tensor.is_meta for tensor in (*part.parameters(), *part.buffers()))


def test_training_reads_the_decoder_and_the_null_condition_and_nothing_else(
    toy: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    read: list[str] = []
    real = loading._read

    def spy(stored: dict, **where: Any) -> dict[str, Tensor]:
        read.extend(tensor.name for tensor in stored.values())
        return real(stored, **where)

    monkeypatch.setattr(loading, "_read", spy)
    load_decoder(toy, device=CPU, dtype=torch.float32)
    load_null_condition(toy, device=CPU, dtype=torch.float32)
    in_file = load_file(toy.folder / "model.safetensors")
    assert sorted(read) == sorted(
        name for name in in_file if name.startswith("decoder.") or name == "null_condition_emb"
    )


def test_the_rotary_frequencies_of_the_text_encoder_stay_in_float32(toy: Checkpoint):
    _, encoder = load_text_encoder(toy, device=CPU, dtype=torch.bfloat16)
    expected = 1_000_000.0 ** (-torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(encoder.rotary_emb.inv_freq, expected)


def test_the_text_encoder_of_a_causal_model_is_read_under_its_prefix(toy: Checkpoint):
    _, before = load_text_encoder(toy, device=CPU, dtype=torch.float32)
    path = toy.text_encoder / "model.safetensors"
    prefixed = {f"model.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(prefixed | {"lm_head.weight": torch.zeros(400, 32)}, path)
    _, after = load_text_encoder(toy, device=CPU, dtype=torch.float32)
    assert all(torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items())


Q = "decoder.layers.0.self_attn.q_proj.weight"
TEXT = "encoder.text_projector.weight"


@pytest.mark.parametrize(
    ("change", "load", "message"),
    [
        (lambda t: t.pop(Q), load_decoder, rf"decoder .* 1 missing: {Q}"),
        (lambda t: t.update({"decoder.extra.weight": torch.zeros(1)}), load_decoder, "1 surplus: decoder.extra.weight"),
        (lambda t: t.update({Q: torch.zeros(3, 3)}), load_decoder, rf"{Q} \(stored \[3, 3\], wanted \[64, 48\]\)"),
        (lambda t: t.update({Q: t[Q].to(torch.int8)}), load_decoder, rf"{Q} \(I8\)"),
        (lambda t: t.pop(TEXT), load_condition_encoder, rf"condition encoder .* 1 missing: {TEXT}"),
        (lambda t: t.update({"encoder.x": torch.zeros(1)}), load_condition_encoder, "1 surplus: encoder.x"),
        (lambda t: t.pop("null_condition_emb"), load_null_condition, "1 missing: null_condition_emb"),
        (lambda t: t.pop("null_condition_emb"), load_condition_encoder, "1 missing: null_condition_emb"),
    ],
)
def test_a_missing_surplus_or_misshapen_tensor_is_named(
    toy: Checkpoint, change: Callable[[dict[str, Tensor]], Any], load: Callable[..., Any], message: str
):
    change_weights(toy, change)
    with pytest.raises(ModelError, match=message) as caught:
        load(toy, device=CPU, dtype=torch.float32)
    assert caught.value.hint


def test_many_missing_tensors_are_counted_and_the_first_are_named(toy: Checkpoint):
    change_weights(
        toy, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".mlp." in name and "decoder" in name]
    )
    with pytest.raises(ModelError, match=r"12 missing: decoder\.layers\.0\.mlp\.down_proj\.weight, .* and 7 more"):
        load_decoder(toy, device=CPU, dtype=torch.float32)


def test_a_file_whose_header_safetensors_refuses_is_named(toy: Checkpoint):
    weights = toy.folder / "model.safetensors"
    content = weights.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[Q]["data_offsets"] = header["null_condition_emb"]["data_offsets"]
    changed = json.dumps(header).encode().ljust(length + 1000)
    weights.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        load_decoder(toy, device=CPU, dtype=torch.float32)


def test_damaged_encoder_tensors_do_not_keep_training_from_its_decoder(toy: Checkpoint):
    change_weights(toy, lambda tensors: tensors.pop(TEXT))
    assert load_decoder(toy, device=CPU, dtype=torch.float32).config.hidden_size == 48


@pytest.mark.parametrize(
    ("file", "load", "message"),
    [
        ("vae/diffusion_pytorch_model.safetensors", load_vae, "VAE .* 1 missing: encoder.conv1.bias"),
        ("Qwen3-Embedding-0.6B/model.safetensors", load_text_encoder, "text encoder .* 1 missing: embed_tokens.weight"),
    ],
)
def test_a_missing_tensor_of_the_other_folders_is_named(toy: Checkpoint, file: str, load: Callable, message: str):
    name = message.rsplit(" ", 1)[1]
    change_weights(toy, lambda tensors: tensors.pop(name), file)
    with pytest.raises(ModelError, match=message):
        load(toy, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize(
    ("folder", "change", "load", "message"),
    [
        ("vae", {"sampling_rate": None}, load_vae, "lacks sampling_rate"),
        ("vae", {"downsampling_ratios": "ten"}, load_vae, "config.json describes no AutoencoderOobleck"),
        ("Qwen3-Embedding-0.6B", {"model_type": "llama"}, load_text_encoder, "'llama', not qwen3"),
        ("Qwen3-Embedding-0.6B", {"hidden_size": "wide"}, load_text_encoder, "config.json describes no Qwen3 model"),
        ("Qwen3-Embedding-0.6B", {"num_attention_heads": 0}, load_text_encoder, "config.json describes no Qwen3 model"),
    ],
)
def test_a_folder_of_another_model_is_named(toy: Checkpoint, folder: str, change: dict, load: Callable, message: str):
    path = toy.root / folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | change
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        load(toy, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("content", ["{}", '{"model": {}, "added_tokens": []}', '{"added_tokens": 3}'])
def test_a_tokenizer_file_that_describes_none_is_named(toy: Checkpoint, content: str):
    (toy.tokenizer / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=r"tokenizer\.json, or a file beside it, describes no tokenizer") as caught:
        load_text_encoder(toy, device=CPU, dtype=torch.float32)
    assert caught.value.hint


@pytest.mark.parametrize("folder", ["vae", "Qwen3-Embedding-0.6B"])
def test_a_missing_folder_is_named(toy: Checkpoint, folder: str):
    (toy.root / folder).rename(toy.root / "elsewhere")
    load = load_vae if folder == "vae" else load_text_encoder
    with pytest.raises(ModelError, match=f"is missing: there is no folder .*{folder}"):
        load(toy, device=CPU, dtype=torch.float32)


def test_the_silence_latent_is_read_as_rows_of_frames_and_starts_again_at_its_end(toy: Checkpoint):
    stored = torch.load(toy.folder / "silence_latent.pt", weights_only=True)
    silence = load_silence_latent(toy)
    assert silence.shape == (1, 15000, 64)
    assert silence.dtype == torch.float32
    assert torch.equal(silence, stored.transpose(1, 2))
    assert torch.equal(load_silence_latent(toy, frames=750), silence[:, :750])
    longer = load_silence_latent(toy, frames=15010)
    assert torch.equal(longer[:, 15000:], silence[:, :10])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(1, 15000, 64), r"holds \[1, 15000, 64\], not a tensor \[1, 64, 15000\]"),
        ({"silence": torch.zeros(1)}, "holds dict"),
        (b"not a tensor", "cannot be read"),
        (b"I am no pickle", "cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\n", "cannot be read"),
        (b"<!DOCTYPE html>", "cannot be read"),
        (b"", "cannot be read"),
        (None, "is missing"),
    ],
)
def test_a_wrong_silence_latent_is_named(toy: Checkpoint, content: Any, message: str):
    path = toy.folder / "silence_latent.pt"
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ModelError, match=message) as caught:
        load_silence_latent(toy)
    assert "Copy silence_latent.pt" in caught.value.hint


def test_a_pickle_with_code_in_the_silence_latent_is_not_run(toy: Checkpoint, tmp_path: Path):
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    torch.save(Trap(), toy.folder / "silence_latent.pt")
    with pytest.raises(ModelError, match="cannot be read"):
        load_silence_latent(toy)
    assert not (tmp_path / "sprung").exists()


def test_the_fingerprint_is_the_same_when_the_weights_are_stored_in_bfloat16(toy: Checkpoint):
    name = "encoder.text_projector.weight"
    # Half-way between two bfloat16 numbers, which go to the even one: 1 is even, the next one is odd.
    halves = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])
    change_weights(toy, lambda tensors: tensors[name].view(-1)[:2].copy_(halves))
    before = encoder_fingerprint(toy)
    change_weights(toy, lambda tensors: tensors.update({name: t.to(torch.bfloat16) for name, t in tensors.items()}))
    assert encoder_fingerprint(toy) == before


def plain_timbre(sequence: Tensor, encoder: AceStepTimbreEncoder, *, window: int) -> Tensor:
    """The first position of what the timbre encoder's layers make of [N, S, D], by hand in float64."""

    def weight(name: str) -> Tensor:
        return encoder.state_dict()[name].double()

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight(name)

    def rotate(x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2]).double()[:, None] * 1_000_000.0 ** (-torch.arange(0, 16, 2).double() / 16)
        first, second = x.chunk(2, dim=-1)
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1
        )

    count, length, _ = sequence.shape
    far = (torch.arange(length)[:, None] - torch.arange(length)[None]).abs() > window
    for number in range(2):
        layer = f"layers.{number}."
        x = norm(sequence, layer + "input_layernorm.weight")
        q, k, v = (
            (x @ weight(f"{layer}self_attn.to_{name}.weight").T).view(count, length, -1, 16).transpose(1, 2)
            for name in "qkv"
        )
        q = rotate(norm(q, layer + "self_attn.norm_q.weight"))
        k = rotate(norm(k, layer + "self_attn.norm_k.weight")).repeat_interleave(2, dim=1)
        scores = q @ k.transpose(-1, -2) / 4
        if number == 0:
            scores = scores.masked_fill(far, float("-inf"))
        mixed = (scores.softmax(-1) @ v.repeat_interleave(2, dim=1)).transpose(1, 2).reshape(count, length, -1)
        sequence = sequence + mixed @ weight(layer + "self_attn.to_out.0.weight").T
        x = norm(sequence, layer + "post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(x @ weight(layer + "mlp.gate_proj.weight").T)
        sequence = (
            sequence + (gate * (x @ weight(layer + "mlp.up_proj.weight").T)) @ weight(layer + "mlp.down_proj.weight").T
        )
    return norm(sequence, "norm.weight")[:, 0]


@pytest.mark.parametrize("variant", ["base", "xl-base"])
def test_xl_pools_a_special_token_before_the_frames_and_the_others_pool_the_first_frame(tmp_path: Path, variant: str):
    checkpoint = find_checkpoint(build_toy_checkpoint(tmp_path, variant=variant), variant)
    encoder = load_condition_encoder(checkpoint, device=CPU, dtype=torch.float32).timbre_encoder
    assert isinstance(encoder, TimbreEncoder) == (variant == "xl-base")
    frames = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        pooled, mask = encoder(frames, torch.tensor([0, 0, 1]))
    sequence = frames.double() @ encoder.embed_tokens.weight.double().T + encoder.embed_tokens.bias.double()
    if variant == "xl-base":
        sequence = torch.cat([encoder.special_token.double().expand(3, -1, -1), sequence], dim=1)
    expected = plain_timbre(sequence, encoder, window=16).float()
    assert mask.tolist() == [[1, 1], [1, 0]]
    torch.testing.assert_close(torch.stack([pooled[0, 0], pooled[0, 1], pooled[1, 0]]), expected, atol=1e-5, rtol=1e-5)


def test_the_special_token_changes_what_stock_diffusers_would_give(tmp_path: Path):
    checkpoint = find_checkpoint(build_toy_checkpoint(tmp_path, variant="xl-sft"), "xl-sft")
    encoder = load_condition_encoder(checkpoint, device=CPU, dtype=torch.float32).timbre_encoder
    sizes = {key: value for key, value in encoder.config.items() if not key.startswith("_")}
    stock = AceStepTimbreEncoder(**sizes)
    stock.load_state_dict(encoder.state_dict())
    silence = load_silence_latent(checkpoint, frames=750)
    with torch.no_grad():
        ours, theirs = (each(silence, torch.zeros(1, dtype=torch.long))[0] for each in (encoder, stock))
    assert (ours - theirs).norm() / theirs.norm() > 0.5


def test_a_decoder_of_xl_reads_rows_of_the_narrower_encoder(tmp_path: Path):
    checkpoint = find_checkpoint(build_toy_checkpoint(tmp_path, variant="xl-turbo"), "xl-turbo")
    decoder = load_decoder(checkpoint, device=CPU, dtype=torch.float32)
    assert decoder.condition_embedder.weight.shape == (64, 48)
    assert checkpoint.encoder_width == 48
