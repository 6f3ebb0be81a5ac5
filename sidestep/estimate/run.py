"""EstimateConfig -> a rank map: the passes, the scores, the division of the budget."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sidestep.config.rank_map import Captured, ModuleRank, Origin, RankMap, recipe_fingerprint
from sidestep.config.tasks import EstimateConfig, focus_range
from sidestep.errors import RunError
from sidestep.estimate.division import check_budget, check_equal_size, divide, what_it_captures
from sidestep.estimate.methods import METHODS, Found
from sidestep.estimate.question import Question, prepare
from sidestep.estimate.scores import CrossFit
from sidestep.events import Emit, Notice, StageDone, StageStarted
from sidestep.model.checkpoint import Checkpoint, decoder_fingerprint
from sidestep.model.device import full_memory_alike
from sidestep.training.songs import dataset_fingerprint

STAGE = "Estimating"


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A rank map, what it captures, and the strongest input directions [rank or fewer, inputs] of its modules.

    The last two are None and empty where the method does not know them.
    """

    rank_map: RankMap
    captured: Captured | None
    directions: Mapping[str, Tensor]


def estimate(config: EstimateConfig, *, checkpoint: Checkpoint, version: str, emit: Emit) -> Estimate:
    """Measure what each module has to gain on these songs and divide the budget by it.

    The same settings, songs and machine give the same result. Where nothing stands out of the noise the map is the
    uniform one, and a warning says so. Errors are those of training.
    """
    question = prepare(config, checkpoint=checkpoint, emit=emit)
    costs = {name: sum(shape) for name, shape in question.shapes.items()}
    check_budget(config, costs)
    check_equal_size(config, costs)
    found = _measure(question)
    limits = {name: min(shape) for name, shape in question.shapes.items()}
    gains_MR = None if _is_noise(found, emit) else found.gains_MR
    budget, ranks = divide(config, costs, limits, gains_MR)
    modules = tuple(_module(name, row, ranks[name], costs[name], found) for row, name in enumerate(costs))
    rank_map = RankMap(origin=_origin(question, checkpoint, version), budget=budget, modules=modules)
    directions = {
        name: found.directions[name][:, :rank].T.float().cpu().contiguous()
        for name, rank in rank_map.ranks.items()
        if name in found.directions and found.directions[name].shape[1]
    }
    captured = what_it_captures(config, costs, limits, gains_MR, budget=budget, ranks=ranks)
    if captured and captured.by_map < captured.by_uniform:
        emit(Notice(text=_worse_than_uniform(config, captured), level="warning"))
    return Estimate(rank_map=rank_map, captured=captured, directions=directions)


def _measure(question: Question) -> Found:
    draws = sum(len(batch) for batch in [*question.first, *question.second])
    question.emit(StageStarted(title=STAGE, total=draws, unit="draw"))
    started = time.monotonic()
    try:
        with full_memory_alike():
            found = METHODS[question.config.method](question)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"{question.model.device} is out of memory.",
            hint="Leave --gradient-checkpointing on, set a smaller --rank-max, or a --chunk-duration in seconds.",
        ) from error
    seconds = time.monotonic() - started
    question.emit(StageDone(title=STAGE, done=draws, skipped=0, seconds=seconds, unit="draw"))
    return found


def _is_noise(found: Found, emit: Emit) -> bool:
    """Say whether a method that can tell found nothing but chance; then the user is told."""
    if not isinstance(found.scores, CrossFit) or found.scores.stands_out_M.any():
        return False
    emit(
        Notice(
            text="Nothing stands out: the two halves of the draws agree on no module's gradient. "
            "The map gives every module of the uniform adapter the same rank. More --estimate-batches may find "
            "something.",
            level="warning",
        )
    )
    return True


def _worse_than_uniform(config: EstimateConfig, captured: Captured) -> str:
    """Say that the map captures less than the uniform adapter, and which bounds leave it no better choice."""
    ways = [
        *(["a smaller --rank-min"] if config.rank_min > 1 else []),
        *(["a larger --rank-max"] if config.rank_max < captured.uniform_rank else []),
        *(["--granularity module"] if config.granularity == "layer" else []),
        "more --parameters",
    ]
    return (
        f"The map captures less of what is usable ({captured.by_map:.1%}) than the uniform adapter of rank "
        f"{captured.uniform_rank} ({captured.by_uniform:.1%}): its ranks are {config.rank_min} to {config.rank_max}. "
        f"Set {' or '.join(ways)}, or train without the map."
    )


def _module(name: str, row: int, rank: int, cost: int, found: Found) -> ModuleRank:
    scores, norms_M = found.scores, found.gradient_norm_M
    return ModuleRank(
        name=name,
        rank=rank,
        cost=cost,
        score=float(found.score_M[row]),
        low=None if scores is None or math.isnan(scores.low_M[row]) else float(scores.low_M[row]),
        high=None if scores is None or math.isnan(scores.high_M[row]) else float(scores.high_M[row]),
        stands_out=bool(scores.stands_out_M[row]) if isinstance(scores, CrossFit) else None,
        gradient_norm=None if norms_M is None else float(norms_M[row]),
    )


def _origin(question: Question, checkpoint: Checkpoint, version: str) -> Origin:
    config = question.config
    return Origin(
        sidestep_version=version,
        method=config.method,
        granularity=config.granularity,
        seed=config.seed,
        draws=sum(len(batch) for batch in [*question.first, *question.second]),
        songs=len(question.songs),
        timestep_range=focus_range(config.timestep_focus),
        model_variant=checkpoint.variant,
        model=decoder_fingerprint(checkpoint),
        dataset=dataset_fingerprint(question.songs),
        recipe=recipe_fingerprint(question.recipe),
        objective=str(question.recipe),
    )
