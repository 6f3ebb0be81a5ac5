"""Values, ranges and conditions: one rule, whatever door a value comes through."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from sidestep.config.settings import Range, When, build, idle_settings, option, parse_values, settings_of
from sidestep.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Oven:
    """A config as small as can be."""

    heat: float = option("How hot.", group="Oven", within=Range(above=0, at_most=300))
    rounds: int = option("How often.", group="Oven", default=1, within=Range(at_least=1, at_most=9))
    mode: Literal["fan", "grill"] = option("Which heat.", group="Oven", default="fan")
    racks: tuple[str, ...] = option("Which racks.", group="Oven", default=("top",), choices=("top", "middle"))
    is_lit: bool = option("Whether the lamp is on.", group="Oven", default=False)
    recipe: Path | None = option("The book.", group="Oven", default=None)
    flame: float = option("How high.", group="Oven", default=1.0, when=When("mode", ("grill",)))


def parse(**values: object) -> dict[str, object]:
    return parse_values(Oven, values)


def test_values_from_flags_and_from_json_become_the_same():
    typed = parse(heat="180", rounds="2", mode="grill", racks=["top", "middle"], is_lit="on", recipe='"~/a b"')
    from_json = parse(heat=180, rounds=2.0, mode="grill", racks="top middle", is_lit=True, recipe="~/a b")
    assert typed == from_json
    assert typed == {
        "heat": 180.0, "rounds": 2, "mode": "grill", "racks": ("top", "middle"), "is_lit": True,
        "recipe": Path("~/a b").expanduser(),
    }  # fmt: skip
    assert type(typed["rounds"]) is int and type(typed["heat"]) is float


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"heat": "0"}, "--heat takes a number above 0 and at most 300, not 0."),
        ({"heat": "nan"}, "--heat takes a number above 0 and at most 300, not nan."),
        ({"heat": math.inf}, "--heat takes a number above 0 and at most 300, not inf."),
        ({"heat": True}, "--heat takes a number above 0 and at most 300, not on."),
        ({"heat": None}, "--heat takes a number above 0 and at most 300."),
        ({"rounds": "1.5"}, "--rounds takes a whole number from 1 to 9, not 1.5."),
        ({"rounds": "10"}, "--rounds takes a whole number from 1 to 9, not 10."),
        ({"rounds": ""}, "--rounds takes a whole number from 1 to 9, not nothing."),
        ({"mode": "gril"}, "--mode takes one of fan, grill, not gril (did you mean grill?)."),
        ({"racks": ["tpo"]}, "--racks takes one or more of top, middle, not tpo (did you mean top?)."),
        ({"racks": []}, "--racks takes one or more of top, middle."),
        ({"is_lit": "maybe"}, "--is-lit takes on or off, not maybe."),
        ({"recipe": "  "}, "--recipe takes a path, not   ."),
        ({"heet": 3}, "There is no setting 'heet' (did you mean heat?)."),
    ],
)
def test_a_wrong_value_is_refused_with_the_rule(values: dict[str, object], sentence: str):
    with pytest.raises(ConfigError) as caught:
        parse_values(Oven, values)
    assert caught.value.message == sentence


def test_a_backslash_that_took_the_closing_quote_for_itself_is_named_on_windows(monkeypatch: pytest.MonkeyPatch):
    typed = r'C:\My Songs" --rank 8'  # What Windows makes of "C:\My Songs\" --rank 8
    assert parse(recipe=typed) == {"recipe": Path(typed)}
    monkeypatch.setattr("sidestep.config.settings.IS_WINDOWS", True)
    with pytest.raises(ConfigError) as caught:
        parse(recipe=typed)
    assert (
        caught.value.message == f"--recipe takes a path, not {typed}: leave out the backslash before the closing quote."
    )


def test_all_problems_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        parse(heat="-1", rounds="0", mode="x")
    assert caught.value.message.count("\n") == 2


def test_later_layers_win_and_a_missing_requirement_is_named():
    oven = build(Oven, {"heat": 100.0, "rounds": 2}, {"rounds": 3})
    assert (oven.heat, oven.rounds, oven.mode) == (100.0, 3, "fan")
    with pytest.raises(ConfigError, match="--heat is required: How hot"):
        build(Oven, {"rounds": 2})


def test_a_setting_given_without_effect_is_said():
    cold = build(Oven, {"heat": 100.0, "flame": 2.0})
    assert idle_settings(cold, {"flame": 2.0}) == ["--flame has no effect here: it counts only with --mode grill."]
    assert idle_settings(build(Oven, {"heat": 100.0, "mode": "grill"}), {"flame": 2.0}) == []


def test_settings_keep_the_order_of_their_declaration():
    assert [setting.name for setting in settings_of(Oven)] == list(Oven.__dataclass_fields__)


def test_a_condition_of_many_numbers_is_said_in_a_line():
    assert str(When("num_workers", tuple(range(1, 257)))) == "only with --num-workers from 1 to 256"
    assert str(When("num_workers", (1, 2, 4))) == "only with --num-workers 1 or 2 or 4"
