"""Spends a budget of adapter parameters where it captures the most."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GOOD_MULTIPLE = 8  # Matrix units work in eights; other ranks cost as much as the next multiple.
USABLE_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Unit:
    """What gets one rank: a module, or all modules of a layer.

    `cost` in parameters a rank; `gains` of the first, second, ... rank, not negative and not rising.
    """

    cost: int
    gains: NDArray[np.float64]


def allocate(units: Sequence[Unit], *, budget: int, rank_min: int, rank_max: int) -> list[int]:
    """Return a rank for each unit, 0 or between the bounds, that spends at most `budget` parameters.

    The next ranks always go where they gain most a parameter; as gains never rise that is the best division up to the
    last block. Units without any gain get nothing. Where gains end before the budget does, the rest goes to the units
    that gained, in proportion. Ranks come in eights where both bounds are multiples of eight.
    """
    step = GOOD_MULTIPLE if rank_min % GOOD_MULTIPLE == 0 and rank_max % GOOD_MULTIPLE == 0 else 1
    ranks = [0] * len(units)
    queue = [_offer(units, place, 0, rank_min, step) for place, unit in enumerate(units) if unit.gains.sum() > 0]
    heapq.heapify(queue)
    while queue:
        _, place, wanted = heapq.heappop(queue)
        price = (wanted - ranks[place]) * units[place].cost
        # A matrix has no more directions than its shorter side, which `gains` knows.
        if wanted > min(rank_max, len(units[place].gains)) or price > budget:
            continue
        budget -= price
        ranks[place] = wanted
        heapq.heappush(queue, _offer(units, place, wanted, rank_min, step))
    return ranks


def uniform_rank(costs: Sequence[int], *, budget: int) -> int:
    """Return the largest rank that all of these can have."""
    return budget // sum(costs)


def captured(units: Sequence[Unit], ranks: Sequence[int]) -> float:
    """Return the gain of these ranks as a share of all there is (0 where there is none)."""
    total = sum(float(unit.gains.sum()) for unit in units)
    gained = sum(float(unit.gains[:rank].sum()) for unit, rank in zip(units, ranks, strict=True))
    return gained / total if total else 0.0


def suggested_rank(units: Sequence[Unit]) -> int | None:
    """Return the smallest rank that, given to every unit, captures 90 % of all gains; None without gains."""
    width = max(len(unit.gains) for unit in units)
    gains = sum(np.pad(unit.gains, (0, width - len(unit.gains))) for unit in units)
    total = float(np.sum(gains))
    if total <= 0:
        return None
    return int(np.searchsorted(np.cumsum(gains), USABLE_SHARE * total)) + 1


def suggested_parameters(units: Sequence[Unit], *, rank_min: int, rank_max: int) -> int | None:
    """Return the smallest budget, to a hundredth, whose division captures 90 % of what any could; None without gain."""

    def gain(budget: int) -> float:
        return captured(units, allocate(units, budget=budget, rank_min=rank_min, rank_max=rank_max))

    low, high = 0, sum(unit.cost for unit in units) * rank_max
    enough = USABLE_SHARE * gain(high)
    if enough <= 0:
        return None
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if gain(middle) >= enough else (middle, high)
    return high


def _offer(
    units: Sequence[Unit], place: int, rank: int, rank_min: int, step: int
) -> tuple[tuple[bool, float], int, int]:
    """Return a queue entry for the unit's next ranks: the best first, ties in the order of the units."""
    unit = units[place]
    wanted = rank + step if rank else rank_min
    gain = float(unit.gains[rank:wanted].sum())
    if gain > 0:
        return (False, -gain / ((wanted - rank) * unit.cost)), place, wanted
    return (True, -float(unit.gains.sum()) / (unit.cost * max(1, rank))), place, wanted
