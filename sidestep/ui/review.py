"""The last look before an action starts: what was decided, what it does, and the command line that does the same."""

from sidestep.errors import SidestepError
from sidestep.ui.command_line import command_line
from sidestep.ui.console import Console
from sidestep.ui.flow import Flow
from sidestep.ui.questions import Form
from sidestep.ui.tables import review

INDENT = 2


def show_review(console: Console, flow: Flow, form: Form) -> SidestepError | None:
    """Print the settings by group, the facts and the command line; or, and return it, what contradicts itself."""
    review(console, _groups(flow, form), base=flow.base_name)
    problem = flow.problem(form)
    if problem:
        console.print()
        for line in console.wrapped(f"{problem.message} {problem.hint}".strip(), indent=INDENT):
            console.print(" " * INDENT + line, style="red", wrap=False)
        return problem
    console.table("What happens", flow.facts(form))
    console.heading("The same as a command")
    console.print(f"{' ' * INDENT}{command_line(flow.plan(form))}", wrap=False)
    console.print()
    return None


def _groups(flow: Flow, form: Form) -> dict[str, list[tuple[str, str, bool]]]:
    """The settings worth a look, by group: the basic ones, and all that differ from what is usual."""
    base = flow.base(form)
    groups: dict[str, list[tuple[str, str, bool]]] = {}
    for question in flow.questions:
        setting = question.setting
        if not question.group or question.ask == "never" or not question.applies(form):
            continue
        value = form[question.name]
        usual = base.get(setting.name, setting.default) if setting else question.suggest(form)
        # A path has no default to differ from: everyone has their own.
        differs = value != usual and (question.kind != "path" or bool(base))
        if value != usual or question.ask == "basic":
            groups.setdefault(question.group, []).append((question.title, question.say(form, value), differs))
    return groups
