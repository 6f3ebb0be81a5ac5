"""A flow: the questions before an action, what they come to, and what to show of it before it starts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sidestep.errors import SidestepError
from sidestep.ui.command_line import Plan
from sidestep.ui.questions import Choice, Form, Question

Facts = Sequence[tuple[str, str]]

BASIC, EVERYTHING = "basic", "everything"
DEPTHS = (Choice(value=BASIC, title="Only what matters"), Choice(value=EVERYTHING, title="More, group by group"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """An action's questions and what becomes of the answers."""

    title: str
    questions: tuple[Question, ...]
    plan: Callable[[Form], Plan]
    """What to start once all is answered."""
    facts: Callable[[Form], Facts]
    """What the review says beside the settings: what is done, what is written where."""
    problem: Callable[[Form], SidestepError | None] = lambda form: None
    """What contradicts itself, in the words of the command line."""
    preset: Callable[[Form, str], str] | None = None
    """Saves the settings as a preset of this name and says where; None where there is nothing to save."""
    base: Callable[[Form], Mapping[str, Any]] = lambda form: {}
    """The settings that the review compares with, by name, in place of the defaults."""
    base_name: str = "the default"

    def groups(self, form: Form) -> list[str]:
        """The groups of settings that can be changed, in the order of their questions."""
        found = {q.group: None for q in self.questions if q.group and q.ask != "never" and q.applies(form)}
        return list(found)


def depth_questions(groups: Callable[[Form], Sequence[str]], *, marked: Sequence[str]) -> list[Question]:
    """How much to ask: only what matters, or groups of the user's choice as well (`marked` are suggested)."""
    return [
        Question(
            name="depth",
            title="How much to decide",
            kind="choice",
            help="Everything else has a good default, and can still be changed in the review.",
            suggest=lambda form: BASIC,
            choices=lambda form: DEPTHS,
        ),
        Question(
            name="groups",
            title="Groups",
            kind="many",
            suggest=lambda form: tuple(group for group in groups(form) if group in marked),
            choices=lambda form: [Choice(value=group, title=group) for group in groups(form)],
            applies=lambda form: form["depth"] == EVERYTHING,
        ),
    ]


def chosen_groups(form: Form) -> Sequence[str]:
    """The groups that are asked in full."""
    return form["groups"] if "depth" in form and form["depth"] == EVERYTHING else ()
