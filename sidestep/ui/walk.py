"""The small engine that walks a form's questions: one at a time, and back again."""

from collections.abc import Callable
from typing import Any

from sidestep.ui.asker import Asker, GoBack, Prompt
from sidestep.ui.questions import Form, Question

Selection = Callable[[Form, Question], bool]


def walk(form: Form, asker: Asker, wanted: Selection, *, from_end: bool = False) -> None:
    """Ask the wanted questions in their order; GoBack when the user goes back from the first one.

    Which questions are wanted may depend on the answers before them. `from_end` begins with the last one.
    """
    place = len(_asked(form, wanted)) - 1 if from_end else 0
    if place < 0:
        raise GoBack
    while True:
        asked = _asked(form, wanted)
        if place >= len(asked):
            return
        try:
            ask(asked[place], form, asker)
            place += 1
        except GoBack:
            if place == 0:
                raise
            place -= 1


def ask(question: Question, form: Form, asker: Asker) -> None:
    """Ask until the answer is accepted, each time with what was given before; the reason is said when it is not."""
    prompt = Prompt(question.title, question.help)
    draft: Any = None
    while True:
        earlier = form[question.name]
        value, reason = None, ""
        if question.kind in ("choice", "many"):
            choices = question.choices(form)
            if question.kind == "many":
                value = asker.mark(prompt, choices, earlier)
            else:
                value = asker.choose(prompt, choices, earlier)
        else:
            typed = asker.text(prompt, question.show(form, earlier), draft=draft, path=_path_kind(question))
            draft = typed
            try:
                value = question.parse(typed)
            except ValueError as error:
                reason = str(error)
        reason = reason or question.check(form, value)
        if not reason:
            form.give(question.name, value)
            asker.answered(prompt, question.say(form, value), question.tell(form))
            return
        asker.refused(reason)


def _asked(form: Form, wanted: Selection) -> list[Question]:
    return [question for question in form.questions if wanted(form, question)]


def _path_kind(question: Question) -> str:
    if question.kind != "path":
        return ""
    return "folder" if question.only_folders else "any"
