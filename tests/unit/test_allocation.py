"""A budget of adapter parameters, divided: never overspent, and where it gains the most."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestep.estimate.allocation import Unit, allocate, captured, suggested_parameters, suggested_rank, uniform_rank


def falling(*gains: float) -> np.ndarray:
    return np.array(sorted(gains, reverse=True), dtype=float)


units = st.lists(
    st.builds(
        lambda cost, gains: Unit(cost, falling(*gains)),
        st.integers(1, 50),
        st.lists(st.floats(0, 10), min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=8,
)


@given(units, st.integers(0, 2000), st.integers(1, 4), st.integers(4, 12))
def test_the_budget_is_never_exceeded_and_ranks_keep_their_bounds(
    units: list[Unit], budget: int, rank_min: int, rank_max: int
):
    ranks = allocate(units, budget=budget, rank_min=rank_min, rank_max=rank_max)
    assert sum(rank * unit.cost for rank, unit in zip(ranks, units, strict=True)) <= budget
    for rank, unit in zip(ranks, units, strict=True):
        assert rank == 0 or rank_min <= rank <= min(rank_max, len(unit.gains))
        assert rank == 0 or unit.gains.sum() > 0


@given(units, st.integers(0, 2000))
def test_what_is_left_over_pays_for_no_further_rank(units: list[Unit], budget: int):
    ranks = allocate(units, budget=budget, rank_min=1, rank_max=12)
    left = budget - sum(rank * unit.cost for rank, unit in zip(ranks, units, strict=True))
    for rank, unit in zip(ranks, units, strict=True):
        if unit.gains.sum() > 0 and rank < len(unit.gains):
            assert left < unit.cost


def test_at_equal_costs_no_other_division_captures_more():
    units = [Unit(3, falling(9, 5, 1)), Unit(3, falling(6, 6, 0.5)), Unit(3, falling(2, 1, 1))]
    for budget in range(28):
        ranks = allocate(units, budget=budget, rank_min=1, rank_max=3)
        others = [r for r in product(range(4), repeat=3) if 3 * sum(r) <= budget]
        assert captured(units, ranks) == pytest.approx(max(captured(units, other) for other in others))


def test_what_gains_more_a_parameter_comes_first():
    cheap, dear = Unit(10, falling(4, 4)), Unit(100, falling(9, 9))
    assert allocate([dear, cheap], budget=109, rank_min=1, rank_max=2) == [0, 2]
    assert allocate([dear, cheap], budget=120, rank_min=1, rank_max=2) == [1, 2]


def test_a_unit_without_gain_is_left_out_even_where_the_budget_would_pay_for_it():
    assert allocate([Unit(1, falling(0, 0)), Unit(1, falling(1, 0))], budget=100, rank_min=1, rank_max=2) == [0, 2]


def test_where_gains_end_the_rest_goes_to_those_that_gained_in_proportion():
    strong, weak = Unit(1, np.array([6.0, *[0.0] * 63])), Unit(1, np.array([2.0, *[0.0] * 63]))
    assert allocate([strong, weak], budget=40, rank_min=1, rank_max=64) == [30, 10]


def test_ranks_come_in_eights_where_both_bounds_are_multiples_of_eight():
    units = [Unit(3, np.linspace(5, 1, 64)), Unit(2, np.linspace(3, 0.5, 64))]
    assert all(rank % 8 == 0 for rank in allocate(units, budget=200, rank_min=8, rank_max=64))
    assert any(rank % 8 for rank in allocate(units, budget=200, rank_min=4, rank_max=64))


def test_suggestions_capture_nine_tenths_of_what_is_usable():
    units = [Unit(10, falling(5, 3, 1, 0.5)), Unit(5, falling(0.4, 0.1))]
    rank = suggested_rank(units)
    assert rank == 3
    assert captured(units, [3, 3]) >= 0.9 > captured(units, [2, 2])
    budget = suggested_parameters(units, rank_min=1, rank_max=4)
    assert budget is not None
    assert captured(units, allocate(units, budget=budget, rank_min=1, rank_max=4)) >= 0.9
    assert suggested_rank([Unit(1, falling(0))]) is None
    assert suggested_parameters([Unit(1, falling(0))], rank_min=1, rank_max=1) is None


def test_the_uniform_rank_is_the_largest_that_the_budget_pays_for():
    assert uniform_rank([3, 4], budget=20) == 2
    assert uniform_rank([3, 4], budget=21) == 3
