"""From scores to ranks: the budget of a uniform adapter, divided by what each module has to gain."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sidestep.config.rank_map import MEASURES_GAINS, Budget, Captured
from sidestep.config.tasks import EstimateConfig
from sidestep.errors import ConfigError
from sidestep.estimate.allocation import Unit, allocate, captured, suggested_parameters, suggested_rank, uniform_rank
from sidestep.estimate.scores import Array


def divide(
    config: EstimateConfig, costs: Mapping[str, int], limits: Mapping[str, int], gains_MR: Array | None
) -> tuple[Budget, dict[str, int]]:
    """Return the budget and a rank for every module of `costs` (parameters a rank), in its order.

    `limits` are the largest rank each matrix has. Without gains (None) every module of the uniform adapter gets the
    same rank. ConfigError when the budget does not pay for anything.
    """
    uniform = uniform_names(config, costs)
    budget = _budget(config, costs)
    suggestions: tuple[int | None, int | None] = (None, None)
    if gains_MR is None:
        affordable = uniform_rank([costs[name] for name in uniform], budget=budget)
        rank = min(affordable, config.rank_max, *(limits[name] for name in uniform))
        ranks = {name: rank if name in set(uniform) else 0 for name in costs}
    else:
        groups = _groups(list(costs), config.granularity)
        units = [_unit([list(costs).index(name) for name in group], group, costs, limits, gains_MR) for group in groups]
        bounds = {"rank_min": config.rank_min, "rank_max": config.rank_max}
        of_unit = allocate(units, budget=budget, **bounds)
        given = {name: rank for group, rank in zip(groups, of_unit, strict=True) for name in group}
        ranks = {name: given[name] for name in costs}
        if config.method in MEASURES_GAINS:  # Those of other methods are made up for the division alone.
            suggestions = (suggested_rank(units), suggested_parameters(units, **bounds))
    spent = sum(rank * costs[name] for name, rank in ranks.items())
    if not spent:
        raise _pays_for_nothing(budget)
    return (
        Budget(
            parameters=budget,
            spent=spent,
            rank_min=config.rank_min,
            rank_max=config.rank_max,
            suggested_rank=suggestions[0],
            suggested_parameters=suggestions[1],
        ),
        ranks,
    )


def check_budget(config: EstimateConfig, costs: Mapping[str, int]) -> None:
    """Raise ConfigError for a budget that pays for no module, whatever is measured."""
    budget = _budget(config, costs)
    smallest = min(sum(costs[name] for name in group) for group in _groups(list(costs), config.granularity))
    uniform = sum(costs[name] for name in uniform_names(config, costs))
    if budget < min(config.rank_min * smallest, uniform):
        raise _pays_for_nothing(budget)


def check_equal_size(config: EstimateConfig, costs: Mapping[str, int]) -> None:
    """Raise ConfigError for `parameters` that no uniform adapter has, when it is to be compared with one."""
    of_a_rank = sum(costs[name] for name in uniform_names(config, costs))
    if not (config.verify and config.parameters and of_a_rank) or config.parameters % of_a_rank == 0:
        return
    nearest = max(1, round(config.parameters / of_a_rank)) * of_a_rank
    raise ConfigError(
        f"--verify compares at equal size, and a uniform adapter has a multiple of {of_a_rank:,} parameters.",
        hint=f"Set --parameters {nearest}, or leave it out, or do without --verify.",
    )


def uniform_names(config: EstimateConfig, names: Iterable[str]) -> list[str]:
    """Return which of the modules that are looked at a uniform adapter would have."""
    return [name for name in names if name.rsplit(".", 1)[1] in config.uniform_modules]


def what_it_captures(
    config: EstimateConfig,
    costs: Mapping[str, int],
    limits: Mapping[str, int],
    gains_MR: Array | None,
    *,
    budget: Budget,
    ranks: Mapping[str, int],
) -> Captured | None:
    """Return what these ranks capture and what a uniform adapter of the budget would; None without measured gains."""
    if gains_MR is None or config.method not in MEASURES_GAINS:
        return None
    units = [_unit([row], [name], costs, limits, gains_MR) for row, name in enumerate(costs)]
    uniform = uniform_names(config, costs)
    rank = uniform_rank([costs[name] for name in uniform], budget=budget.parameters)
    return Captured(
        by_map=captured(units, [ranks[name] for name in costs]),
        by_uniform=captured(units, [rank if name in uniform else 0 for name in costs]),
        uniform_rank=rank,
    )


def _budget(config: EstimateConfig, costs: Mapping[str, int]) -> int:
    return config.parameters or config.rank * sum(costs[name] for name in uniform_names(config, costs))


def _pays_for_nothing(budget: int) -> ConfigError:
    return ConfigError(
        f"A budget of {budget:,} parameters does not pay for any module.",
        hint="Set a smaller --rank-min, or more --parameters.",
    )


def _groups(names: Sequence[str], granularity: str) -> list[list[str]]:
    """Return which modules share a rank, in the order of their first."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[name if granularity == "module" else ".".join(name.split(".")[:2])].append(name)
    return list(groups.values())


def _unit(
    rows: Sequence[int], names: Sequence[str], costs: Mapping[str, int], limits: Mapping[str, int], gains_MR: Array
) -> Unit:
    limit = min(limits[name] for name in names)
    return Unit(sum(costs[name] for name in names), np.asarray(gains_MR[rows, :limit].sum(0)))
