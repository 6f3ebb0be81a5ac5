"""Seeded dropout: the mask follows from the seed, the module and the place, and from nothing else."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sidestep.model.dropout import SeededDropout, seed_dropout
from tests.torch.tiny_adapters import LAYERS, attach, tiny_decoder

SHAPE = (3, 40, 48)


def make(p: float = 0.3, *, seed: int = 1, salt: int = 0) -> SeededDropout:
    return SeededDropout(p, torch.tensor(seed, dtype=torch.int32), salt)


def mask(p: float = 0.3, *, seed: int = 1, salt: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return make(p, seed=seed, salt=salt)(torch.ones(shape)) != 0


@pytest.mark.parametrize("p", [0.05, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_the_share_is_dropped_and_the_rest_keeps_the_mean(p: float, seed: int):
    size = 400_000
    x = make(p, seed=seed)(torch.ones(size))
    # Four standard deviations of a share of 400 000 draws.
    assert abs((x == 0).double().mean().item() - p) < 4 * (p * (1 - p) / size) ** 0.5
    torch.testing.assert_close(x[x != 0], torch.full_like(x[x != 0], 1 / (1 - p)))


def test_each_seed_and_each_module_has_a_mask_of_its_own_and_the_same_one_again():
    masks = [mask(seed=seed, salt=salt) for seed in (0, 1, 2) for salt in (0, 1, 2)]
    assert torch.equal(masks[0], mask(seed=0, salt=0))
    expected = 0.7**2 + 0.3**2  # How often two independent masks agree.
    for place, one in enumerate(masks):
        for other in masks[:place]:
            assert abs((one == other).double().mean().item() - expected) < 0.03


def test_neighbours_are_dropped_independently():
    dropped = ~mask(0.5, shape=(1, 400, 1024))[0]
    for shift in ((1, 0), (0, 1), (1, 1), (16, 0), (0, 64)):
        rolled = dropped.roll(shift, dims=(0, 1))
        assert abs((dropped & rolled).double().mean().item() - 0.25) < 0.005


def test_filling_the_seed_anew_draws_another_mask_and_an_earlier_one_the_same_again():
    dropout = make()
    x = torch.ones(SHAPE)
    first = dropout(x)
    dropout.seed.fill_(2)
    assert not torch.equal(dropout(x), first)
    dropout.seed.fill_(1)
    assert torch.equal(dropout(x), first)


def test_nothing_is_drawn_from_the_generators_of_torch():
    before = torch.get_rng_state()
    make()(torch.ones(SHAPE))
    assert torch.equal(torch.get_rng_state(), before)


def test_outside_training_and_at_zero_the_input_is_returned():
    x = torch.ones(SHAPE)
    assert make().eval()(x) is x
    assert make(0.0)(x) is x


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_it_draws_the_same_masks_for_every_seed_and_module(backend: str):
    torch._dynamo.reset()
    x = torch.randn(SHAPE)
    apply = torch.compile(lambda module, x: module(x), backend=backend, fullgraph=True)
    for salt in (0, 5):
        dropout = make(salt=salt)
        for seed in (1, 2, 3_000_000):
            dropout.seed.fill_(seed)
            assert torch.equal(apply(dropout, x), dropout(x))


def test_recomputed_it_draws_the_same_mask():
    dropout, x = make(0.5), torch.randn(SHAPE, requires_grad=True)

    def twice(x: Tensor) -> Tensor:
        return dropout(x.sin()).square()

    plain, recomputed = (
        torch.autograd.grad(output.sum(), x)[0]
        for output in (twice(x), checkpoint(twice, x, use_reentrant=False, preserve_rng_state=False))
    )
    assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_passes_where_the_input_did(dtype: torch.dtype):
    x = torch.ones(SHAPE, dtype=dtype, requires_grad=True)
    output = make(0.5)(x)
    output.sum().backward()
    assert output.dtype == dtype
    assert x.grad is not None and torch.equal(x.grad, output.detach())


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "lokr with magnitudes", "loha"])
def test_every_dropout_of_an_adapter_is_replaced_and_shares_the_seed(kind: str):
    decoder = tiny_decoder()
    adapter = attach(decoder, kind, dropout=0.25)
    seed = seed_dropout(decoder, 0.25)
    seeded = [module for module in decoder.modules() if isinstance(module, SeededDropout)]
    assert len(seeded) == len(adapter.modules)
    assert all(module.seed is seed for module in seeded)
    # Layers that read the same input drop the same of it: by block one input of queries, keys and values, one of keys
    # and values of the prompt, one of gate and up; q (cross), o (twice) and down have inputs of their own.
    assert len({int(module.salt) for module in seeded}) == LAYERS * 7
    assert not [m for m in decoder.modules() if isinstance(m, nn.Dropout) and m.p > 0]
