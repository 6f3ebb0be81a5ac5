"""Our attention and our forward pass are diffusers' own, for every length, and without its dense mask."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel, _create_4d_mask
from torch import Tensor

from sidestep.model import attention
from sidestep.model.attention import block_window, blocks_of, full_attention, rotate, use_processors, window_kernel_for
from sidestep.model.forward import velocity
from tests.torch.tiny_adapters import LAYERS, tiny_decoder

CPU = torch.device("cpu")
WINDOW = 16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Sliding attention of [B, S, H, D] with diffusers' dense mask, and keys repeated for the heads they serve."""
    mask = _create_4d_mask(
        query.shape[1], query.dtype, query.device, sliding_window=window, is_sliding_window=True, is_causal=False
    )
    groups = query.shape[2] // key.shape[2]
    key, value = (tensor.repeat_interleave(groups, dim=2) for tensor in (key, value))
    out = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, value)), attn_mask=mask)
    return out.transpose(1, 2)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 18, 31, 32, 33, 47, 48, 49, 63, 64, 65, 100])
def test_blocks_attend_within_the_window_as_the_dense_mask_does(length: int, heads: tuple[int, int]):
    query = random(2, length, heads[0], 8).requires_grad_()
    key, value = (random(2, length, heads[1], 8, seed=seed).requires_grad_() for seed in (1, 2))
    weights = random(2, length, heads[0], 8, seed=3)
    found, wanted = block_window(query, key, value, WINDOW), dense(query, key, value, WINDOW)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), (query, key, value)),
        torch.autograd.grad((wanted * weights).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_a_key_just_outside_the_window_has_no_say_and_one_at_its_edge_has():
    query, key, value = (random(1, 60, 2, 8, seed=seed) for seed in range(3))
    before = block_window(query, key, value, WINDOW)
    changed = value.clone()
    changed[:, 30] += 1
    moved = (block_window(query, key, changed, WINDOW) - before).abs().amax(dim=(0, 2, 3)) > 0
    assert moved.nonzero().flatten().tolist() == list(range(30 - WINDOW, 30 + WINDOW + 1))


def test_the_window_never_makes_a_mask_of_length_by_length(monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    genuine = attention.full_attention

    def spied(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None) -> Tensor:
        sizes.append(0 if mask is None else mask.numel())
        return genuine(query, key, value, mask=mask)

    monkeypatch.setattr(attention, "full_attention", spied)
    for length in (1000, 2000):
        block_window(*(random(1, length, 1, 4, seed=seed) for seed in range(3)), WINDOW)
    assert sizes[1] < 2.1 * sizes[0] < 2000 * 1000


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
def test_rows_behind_a_mask_are_as_if_they_were_not_there(heads: tuple[int, int]):
    query = random(2, 10, heads[0], 8)
    key, value = (random(2, 7, heads[1], 8, seed=seed) for seed in (1, 2))
    mask = torch.arange(7)[None, :] < torch.tensor([7, 4])[:, None]
    found = full_attention(query, key, value, mask=mask[:, None, None, :])
    torch.testing.assert_close(found[:1], full_attention(query[:1], key[:1], value[:1]), atol=1e-6, rtol=1e-5)
    alone = full_attention(query[1:], key[1:, :4], value[1:, :4])
    torch.testing.assert_close(found[1:], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_are_turned_as_diffusers_turns_them(dtype: torch.dtype):
    x = random(2, 21, 3, 16).to(dtype)
    angles = random(21, 8).repeat(1, 2)
    rotary = (angles.cos().to(dtype), angles.sin().to(dtype))
    wanted = apply_rotary_emb(x, rotary, use_real=True, use_real_unbind_dim=-2, sequence_dim=1)
    found = rotate(x, rotary)
    assert found.dtype == wanted.dtype == dtype
    assert torch.equal(found, wanted)


def inputs(frames: int, *, batch: int = 2, rows: int = 5) -> dict[str, Tensor]:
    return {
        "hidden_states_BTC": random(batch, frames, 64),
        "timestep_B": torch.linspace(0.3, 0.8, batch),
        "condition_BLD": random(batch, rows, 48, seed=1),
        "context_BTC": random(batch, frames, 128, seed=2),
    }


def ours(decoder: AceStepTransformer1DModel, tensors: dict[str, Tensor], **changes: Any) -> Tensor:
    settings: dict[str, Any] = {"blocks": blocks_of(decoder), "recompute": [False] * LAYERS}
    return velocity(decoder, **tensors, **{**settings, **changes})


def theirs(decoder: AceStepTransformer1DModel, tensors: dict[str, Tensor]) -> Tensor:
    return decoder(
        hidden_states=tensors["hidden_states_BTC"],
        timestep=tensors["timestep_B"],
        timestep_r=tensors["timestep_B"],
        encoder_hidden_states=tensors["condition_BLD"],
        context_latents=tensors["context_BTC"],
    ).sample


# 16 patches of two frames are the toy's window; beyond 17 the kernel for windows takes over.
@pytest.mark.parametrize("frames", [1, 2, 7, 32, 33, 34, 35, 36, 70, 131])
def test_the_forward_pass_is_the_one_of_diffusers(frames: int):
    plain, decoder = tiny_decoder(), tiny_decoder()
    use_processors(decoder, device=CPU, dtype=torch.float32)
    tensors = inputs(frames)
    with torch.no_grad():
        found, wanted = ours(decoder, tensors), theirs(plain, tensors)
    assert found.shape == wanted.shape == (2, frames, 64)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("recompute", [(False, False), (True, False), (True, True)], ids=str)
def test_so_are_its_gradients_whichever_blocks_are_recomputed(recompute: tuple[bool, ...]):
    gradients = []
    for run in (theirs, lambda decoder, tensors: ours(decoder, tensors, recompute=recompute)):
        decoder = tiny_decoder()
        if run is not theirs:
            use_processors(decoder, device=CPU, dtype=torch.float32)
        weights = [block.cross_attn.to_q.weight.requires_grad_() for block in blocks_of(decoder)]
        weights += [block.self_attn.to_k.weight.requires_grad_() for block in blocks_of(decoder)]
        output = run(decoder, inputs(50))
        gradients.append(torch.autograd.grad((output * random(2, 50, 64, seed=4)).sum(), weights))
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_prompts_of_two_lengths_share_a_pass():
    decoder = tiny_decoder()
    cross_attention = use_processors(decoder, device=CPU, dtype=torch.float32)
    tensors = inputs(40, rows=7)
    cross_attention.set_rows(torch.arange(7)[None, :] < torch.tensor([7, 4])[:, None])
    with torch.no_grad():
        together = ours(decoder, tensors)
        cross_attention.set_rows(None)
        for place, rows in ((0, 7), (1, 4)):
            single = {name: tensor[place : place + 1] for name, tensor in tensors.items()}
            single["condition_BLD"] = single["condition_BLD"][:, :rows]
            alone = ours(decoder, single)
            torch.testing.assert_close(together[place : place + 1], alone, atol=2e-6, rtol=1e-5)


def test_the_window_kernel_of_the_cpu_is_blocks_and_flash_needs_a_half_precision_on_a_new_gpu(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    cuda = torch.device("cuda")
    for capability, dtype, kernel in (
        ((9, 0), torch.bfloat16, attention.flash_window),
        ((8, 0), torch.float16, attention.flash_window),
        ((8, 0), torch.float32, block_window),
        ((7, 5), torch.float16, block_window),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert window_kernel_for(cuda, dtype) is kernel
    assert window_kernel_for(CPU, torch.bfloat16) is block_window
