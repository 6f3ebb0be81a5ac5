"""The estimator on models whose truth is known: exact gradients, planted structure, pure noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sidestep.estimate.measure import Passes
from sidestep.estimate.scores import CrossFit, cross_fit
from sidestep.estimate.sketch import Sketch
from sidestep.estimate.taps import tapped

WIDTH, POSITIONS, BRANCHES, SONGS = 24, 12, 20, 8


@dataclass(frozen=True)
class Question:
    """Inputs [B, S, branches, width] and what should come out of them."""

    inputs: Tensor
    wanted: Tensor

    def to(self, device: torch.device) -> "Question":
        return self


class Branches(nn.Module):
    """Independent linear branches: what one of them could learn, no other can."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.branches = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(BRANCHES))
        self.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([branch(inputs[:, :, place]) for place, branch in enumerate(self.branches)], dim=2)

    @property
    def layers(self) -> dict[str, nn.Module]:
        return {f"branch {place}": branch for place, branch in enumerate(self.branches)}


def passes(model: nn.Module, layers: dict[str, Any], losses: Callable[[Any], Tensor], **changes: Any) -> Passes:
    return Passes(
        losses=losses,
        layers=layers,
        shapes={name: (layer.out_features, layer.in_features) for name, layer in layers.items()},
        device=torch.device("cpu"),
        **{"dtype": torch.float32, "after_batch": lambda songs: None, **changes},
    )


def questions(
    model: Branches, *, changes: Sequence[Tensor | None], noises: Sequence[float], draws: int, seed: int
) -> list[tuple[list[int], Any]]:
    """Draw questions whose answer differs from the model by each branch's change, and by noise of its own size."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for draw in range(draws):
        inputs = torch.randn(1, POSITIONS, BRANCHES, WIDTH, generator=generator)
        noise = torch.randn(inputs.shape, generator=generator) * torch.tensor(noises)[:, None]
        wanted = model(inputs) + noise
        for place, change in enumerate(changes):
            if change is not None:
                wanted[:, :, place] += inputs[:, :, place] @ change.T
        drawn.append(([draw % SONGS], Question(inputs, wanted)))
    return drawn


def estimate(
    planted: Sequence[int], *, seed: int, draws: int = 128, quiet: float = 1.0, loud: float = 4.0
) -> tuple[CrossFit, np.ndarray]:
    """Estimate a model of which some branches have something to learn and all others are louder."""
    model = Branches(seed)
    generator = torch.Generator().manual_seed(seed)
    changes = [None if place not in planted else _low_rank(generator) for place in range(BRANCHES)]
    noises = [quiet if place in planted else loud for place in range(BRANCHES)]
    halves = [
        questions(model, changes=changes, noises=noises, draws=draws // 2, seed=100 * seed + half) for half in (1, 2)
    ]

    def losses(question: Question) -> Tensor:
        return (model(question.inputs) - question.wanted).square().mean((1, 2, 3))

    found = passes(model, model.layers, losses).gradients(*halves, count=8, seed=seed)
    scores = cross_fit(found.values_MR, found.parts_NMR, found.songs_N, seed=seed)
    return scores, found.norms_NM.mean(0)


def _low_rank(generator: torch.Generator, size: float = 0.04) -> Tensor:
    return size * torch.randn(WIDTH, 2, generator=generator) @ torch.randn(2, WIDTH, generator=generator)


def auc(scores: np.ndarray, planted: Sequence[int]) -> float:
    """The chance that a planted module ranks above one that is not."""
    inside = [scores[place] for place in planted]
    outside = [score for place, score in enumerate(scores) if place not in planted]
    return float(np.mean([(a > b) + 0.5 * (a == b) for a in inside for b in outside]))


@pytest.mark.parametrize("seed", range(3))
def test_planted_structure_is_found_where_the_gradient_norm_is_misled(seed: int):
    planted = np.random.default_rng(seed).choice(BRANCHES, 6, replace=False).tolist()
    scores, norms = estimate(planted, seed=seed)
    assert auc(scores.score_M, planted) > 0.95
    assert auc(norms, planted) < 0.6
    assert np.flatnonzero(scores.stands_out_M).tolist() == sorted(planted)
    usable = scores.gains_MR.sum(1)
    assert usable[planted].sum() > 0.8 * usable.sum()


def test_the_planted_rank_is_found_as_well():
    scores, _ = estimate([3, 7, 11], seed=5)
    for place in (3, 7, 11):
        assert scores.gains_MR[place, :2].sum() > 0.6 * scores.gains_MR[place].sum()


@pytest.mark.parametrize("seed", range(3))
def test_in_pure_noise_nothing_stands_out(seed: int):
    scores, _ = estimate([], seed=seed)
    assert not scores.stands_out_M.any()


class Deep(nn.Module):
    """Two blocks with shapes that differ, as the decoder's do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.ModuleList([nn.Linear(20, 36, bias=False), nn.Linear(36, 20, bias=False)])
        self.second = nn.ModuleList([nn.Linear(20, 12, bias=False), nn.Linear(12, 20, bias=False)])
        self.recompute = False

    def _block(self, layers: nn.ModuleList, x: Tensor) -> Tensor:
        return x + layers[1](torch.tanh(layers[0](x)))

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.first, self.second):
            x = checkpoint(self._block, block, x, use_reentrant=False) if self.recompute else self._block(block, x)
        return x

    @property
    def layers(self) -> dict[str, nn.Module]:
        return {name: layer for name, layer in self.named_modules() if isinstance(layer, nn.Linear)}


def deep_questions(draws: int, seed: int, *, batch: int = 1) -> list[tuple[list[int], Any]]:
    generator = torch.Generator().manual_seed(seed)
    target = 0.3 * torch.randn(20, 20, generator=generator)
    drawn = []
    for draw in range(draws):
        inputs = torch.randn(batch, 10, 20, generator=generator)
        drawn.append((list(range(draw, draw + batch)), Question(inputs, inputs @ target)))
    return drawn


def deep_passes(model: Deep, **changes: Any) -> Passes:
    def losses(question: Question) -> Tensor:
        return (model(question.inputs) - question.wanted).square().mean((1, 2))

    return passes(model, model.layers, losses, **changes)


def exact_gradients(model: Deep, asked: list[tuple[list[int], Any]]) -> dict[str, Tensor]:
    model.requires_grad_(True)
    for _, question in asked:
        (model(question.inputs) - question.wanted).square().mean((1, 2)).sum().backward()
    samples = sum(len(songs) for songs, _ in asked)
    gradients = {name: parameter.grad / samples for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    return {name.removesuffix(".weight"): gradient for name, gradient in gradients.items()}


def sketched(model: Deep, asked: list[tuple[list[int], Any]], width: int) -> Sketch:
    run = deep_passes(model)
    sketch = Sketch(run.shapes, width=width, seed=0, device=run.device)
    with tapped(model.layers, sketch, dtype=torch.float32):
        for songs, question in asked:
            sketch.samples.begin(len(songs))
            run.losses(question).sum().backward()
            sketch.samples.end()
    return sketch


def test_wide_sketches_give_the_exact_decomposition_of_the_mean_gradient():
    model = Deep().requires_grad_(False)
    asked = deep_questions(6, seed=1)
    exact = exact_gradients(model, asked)
    sketch = sketched(model, asked, width=40)
    for name, gradient in exact.items():
        found = sketch.directions(name, 12)
        torch.testing.assert_close(found.values_R, torch.linalg.svdvals(gradient)[:12], rtol=1e-3, atol=1e-7)
        rebuilt = found.left_OR * found.values_R @ found.right_IR.T
        if min(gradient.shape) <= 12:
            torch.testing.assert_close(rebuilt, gradient, rtol=1e-3, atol=1e-6)


def test_narrow_sketches_agree_with_the_exact_decomposition_to_some_percent():
    model = Deep().requires_grad_(False)
    asked = deep_questions(40, seed=2)
    exact = exact_gradients(model, asked)
    sketch = sketched(model, asked, width=4)
    for name, gradient in exact.items():
        found = sketch.directions(name, 3)
        values = torch.linalg.svdvals(gradient)
        assert torch.allclose(found.values_R, values[:3], rtol=0.1), name
        captured = found.left_OR.T @ gradient @ found.right_IR
        assert captured.diagonal().sum() > 0.9 * values[:3].sum(), name


def test_the_norm_of_each_samples_gradient_is_exact_with_wide_sketches():
    model = Deep().requires_grad_(False)
    asked = deep_questions(3, seed=3)
    norms = sketched(model, asked, width=40).norms()
    for row, question in enumerate(asked):
        exact = exact_gradients(model, [question])
        torch.testing.assert_close(
            norms[row], torch.stack([exact[name].norm() for name in model.layers]), rtol=1e-4, atol=0
        )


def test_parts_along_directions_are_exact_sample_by_sample():
    model = Deep().requires_grad_(False)
    first, second = deep_questions(4, seed=4), deep_questions(2, seed=5, batch=3)
    found = deep_passes(model).gradients(first, second, count=6, seed=0)
    sketch = sketched(model, first, width=6)
    mean = exact_gradients(model, second)
    assert found.parts_NMR.shape[0] == len(found.songs_N) == 6
    for row, name in enumerate(model.layers):
        directions = sketch.directions(name, 6)
        exact = (directions.left_OR.T @ mean[name] @ directions.right_IR).diagonal()
        np.testing.assert_allclose(found.parts_NMR.mean(0)[row], exact.numpy(), rtol=1e-3, atol=1e-7)


def test_recomputed_blocks_give_the_same_numbers():
    results = []
    for recompute in (False, True):
        model = Deep().requires_grad_(False)
        model.recompute = recompute
        results.append(deep_passes(model).gradients(deep_questions(4, 6), deep_questions(4, 7), count=5, seed=0))
    np.testing.assert_array_equal(results[0].values_MR, results[1].values_MR)
    np.testing.assert_array_equal(results[0].parts_NMR, results[1].parts_NMR)


class Quantized(nn.Module):
    """A linear layer whose weight is stored in 8 bits and restored when it is used."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scale = layer.weight.abs().amax() / 127
        self.register_buffer("stored", (layer.weight / self.scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.stored, Tensor)
        return x @ (self.stored.float() * self.scale).T


def test_quantized_layers_are_measured_as_well():
    plain, quantized = Deep().requires_grad_(False), Deep().requires_grad_(False)
    for block in (quantized.first, quantized.second):
        for place, layer in enumerate(block):
            assert isinstance(layer, nn.Linear)
            block[place] = Quantized(layer)
    asked = deep_questions(4, 8), deep_questions(4, 9)
    reference = deep_passes(plain).gradients(*asked, count=4, seed=0)

    def losses(question: Question) -> Tensor:
        return (quantized(question.inputs) - question.wanted).square().mean((1, 2))

    layers = {name: layer for name, layer in quantized.named_modules() if isinstance(layer, Quantized)}
    found = passes(quantized, layers, losses).gradients(*asked, count=4, seed=0)
    np.testing.assert_allclose(found.values_MR[:, 0], reference.values_MR[:, 0], rtol=0.1)


def test_no_weight_gradient_is_ever_made_and_hooks_are_gone_afterwards():
    model = Deep().requires_grad_(False)
    deep_passes(model).gradients(deep_questions(2, 1), deep_questions(2, 2), count=4, seed=0)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
