"""Every flag of the command line has a test of what it does."""

import argparse
import ast
from functools import cache

import pytest

from sidestep.config.flags import parser
from sidestep.config.places import PROJECT
from tests.unit.flag_coverage import COVERED


def flags_of(one: argparse.ArgumentParser) -> set[str]:
    """Give a parser's flags by their long spelling, help left out."""
    longest = [[o for o in action.option_strings if o.startswith("--")] for action in one._actions]
    return {options[0] for options in longest if options and options[0] != "--help"}


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Give the parser of each command, and under the empty name the one before any command."""
    root = parser()
    (commands,) = (action for action in root._actions if isinstance(action, argparse._SubParsersAction))
    return {"": root, **commands.choices}


PARSERS = parsers()


@cache
def functions_in(path: str) -> frozenset[str]:
    tree = ast.parse((PROJECT / path).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_every_command_is_in_the_table():
    assert set(COVERED) == set(PARSERS)


@pytest.mark.parametrize("command", PARSERS)
def test_every_flag_has_a_test_of_what_it_does_and_the_table_names_no_other(command: str):
    flags = flags_of(PARSERS[command])
    assert flags - set(COVERED[command]) == set(), "these flags have no test in tests/unit/flag_coverage.py"
    assert set(COVERED[command]) - flags == set(), "the table names flags that do not exist"


@pytest.mark.parametrize("command", COVERED)
def test_the_tests_in_the_table_exist(command: str):
    for flag, named in COVERED[command].items():
        path, _, function = named.partition("::")
        assert function.startswith("test_"), flag
        assert (PROJECT / path).is_file(), f"{flag}: there is no file {path}"
        assert function in functions_in(path), f"{flag}: there is no {named}"
