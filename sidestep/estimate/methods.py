"""The ways to score modules, by the names users give them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sidestep.estimate.eva import eva_components
from sidestep.estimate.measure import Passes
from sidestep.estimate.question import Question
from sidestep.estimate.scores import Array, Scores, cross_fit, mean_scores, proportional


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a method found of the layers, in their order.

    `gains_MR`: what the first, second, ... rank of each is worth. `directions`: the strongest input directions
    [inputs, R] of each layer. None, or no entry, where the method has no such thing.
    """

    score_M: Array
    gains_MR: Array
    scores: Scores | None = None
    gradient_norm_M: Array | None = None
    directions: Mapping[str, Tensor]


def _cross_fit(question: Question) -> Found:
    config = question.config
    found = _passes(question).gradients(
        question.tasks(question.first), question.tasks(question.second), count=config.rank_max, seed=config.seed
    )
    scores = cross_fit(found.values_MR, found.parts_NMR, found.songs_N, seed=config.seed)
    return Found(
        score_M=scores.score_M,
        gains_MR=scores.gains_MR,
        scores=scores,
        gradient_norm_M=found.norms_NM.mean(0),
        directions=found.right,
    )


def _gradient_norm(question: Question) -> Found:
    asked = question.tasks([*question.first, *question.second])
    norms_NM, songs_N = _passes(question).norms(asked, seed=question.config.seed)
    scores = mean_scores(norms_NM, songs_N, seed=question.config.seed)
    return Found(
        score_M=scores.score_M,
        gains_MR=_in_proportion(question, scores.score_M),
        scores=scores,
        gradient_norm_M=scores.score_M,
        directions={},
    )


def _eva(question: Question) -> Found:
    components = eva_components(question)
    ranks_M = np.array([float(components[name].shape[0]) for name in question.layers])
    return Found(
        score_M=ranks_M,
        gains_MR=_in_proportion(question, ranks_M),
        directions={name: component.T for name, component in components.items()},
    )


def _passes(question: Question) -> Passes:
    model = question.model
    return Passes(
        losses=question.losses,
        layers=question.layers,
        shapes=question.shapes,
        device=model.device,
        dtype=model.dtype,
        after_batch=question.report,
    )


def _in_proportion(question: Question, score_M: Array) -> Array:
    """Return gains whose best division gives ranks in proportion to the scores, whatever a rank costs."""
    costs = np.array([sum(shape) for shape in question.shapes.values()], dtype=float)
    return proportional(score_M * costs, question.config.rank_max)


METHODS: dict[str, Callable[[Question], Found]] = {"cross-fit": _cross_fit, "eva": _eva, "grad-norm": _gradient_norm}
