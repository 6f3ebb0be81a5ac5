"""Going on with a run: which one, what may change on the way, and what stays as it was."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sidestep.config.resolve import resolve_training
from sidestep.config.runs import checkpoints_in
from sidestep.config.settings import Setting, settings_of
from sidestep.config.train import TrainConfig
from sidestep.errors import SidestepError
from sidestep.ui.command_line import Plan, word_of
from sidestep.ui.flow import Facts, Flow
from sidestep.ui.model_questions import what_is_wrong_with_checkpoints
from sidestep.ui.paths import count_tensors, read_path
from sidestep.ui.questions import Choice, Form, Question, question_of, title_of, typed_values
from sidestep.ui.run_list import FoundRun, find_runs, pace_of, read_run
from sidestep.ui.session import Session
from sidestep.ui.wording import duration

ELSEWHERE = Path()  # No run lies in the working folder itself: it is searched like any other place.
SHOWN_AS_FIXED = ("model_variant", "adapter_type", "rank", "alpha", "learning_rate", "batch_size", "seed")


def resume_flow(session: Session) -> Flow:
    """The flow that goes on with an earlier run."""
    runs = find_runs(places_of_runs(session))
    return Flow(
        title="Resume a run",
        questions=(_run_question(runs), _elsewhere_question(), *_setting_questions()),
        plan=_plan,
        facts=_facts,
        problem=_problem,
        base=lambda form: run.settings if (run := run_of(form)) else {},
        base_name="the run so far",
    )


def places_of_runs(session: Session) -> list[Path]:
    """Where runs are looked for: beside the last output folder, and in ./output."""
    last = session.get("output_dir")
    return [*([last.parent] if last else []), Path("output"), Path()]


def run_of(form: Form) -> FoundRun | None:
    """The run that was chosen; None while there is none."""
    folder = form["elsewhere"] if form["run"] == ELSEWHERE else form["run"]
    return read_run(folder) if folder is not None and checkpoints_in(folder) else None


def _run_question(runs: Sequence[FoundRun]) -> Question:
    listed = [Choice(value=run.folder, title=run.folder.name, note=str(run)) for run in runs]
    choices = [*listed, Choice(value=ELSEWHERE, title="Another folder")]
    return Question(
        name="run",
        title="Run",
        kind="choice",
        suggest=lambda form: choices[0].value,
        choices=lambda form: choices,
        check=lambda form, folder: "" if folder == ELSEWHERE else read_run(folder).problem,
        tell=_what_may_change,
    )


def _elsewhere_question() -> Question:
    def problem(form: Form, folder: Path) -> str:
        if not checkpoints_in(folder):
            return f"There is no checkpoint in {folder}: name the output folder of a run."
        return read_run(folder).problem

    return Question(
        name="elsewhere",
        title="Output folder of the run",
        kind="path",
        suggest=lambda form: None,
        parse=read_path,
        applies=lambda form: form["run"] == ELSEWHERE,
        check=problem,
        tell=_what_may_change,
    )


def _what_may_change(form: Form) -> list[str]:
    run = run_of(form)
    if run is None:
        return []
    shown = [setting for setting in _settings() if setting.name in SHOWN_AS_FIXED]
    fixed = [f"{title_of(s).lower()} {_word_of(s, run.settings[s.name])}" for s in shown]
    free = [title_of(setting).lower() for setting in _settings() if _may_change(setting)]
    return [
        f"{run}.",
        f"Stays: {', '.join(fixed)}, and all that shapes the numbers.",
        f"May change: {', '.join(free)}.",
    ]


def _word_of(setting: Setting, value: Any) -> str:
    return setting.shown_default if value is None else word_of(value)


def _setting_questions() -> list[Question]:
    """A question for every setting: what may not change is never asked, and what depends on it can look there."""
    return [_question(setting) for setting in _settings()]


def _question(setting: Setting) -> Question:
    def suggest(form: Form) -> Any:
        run = run_of(form)
        if run is None:
            return setting.default
        value = run.settings.get(setting.name, setting.default)
        is_over = setting.name == "epochs" and value <= run.epoch and not run.settings["max_steps"]
        return run.epoch + value if is_over else value

    changes: dict[str, Any] = {"suggest": suggest, "ask": "advanced" if _may_change(setting) else "never"}
    if setting.name == "epochs":
        changes |= {"ask": "basic", "check": _what_is_wrong_with_epochs}
    if setting.optional:
        changes |= {"check": lambda form, value: _what_is_wrong_with_emptying(setting, form, value)}
    if setting.name in _CHECKS:
        check = _CHECKS[setting.name]
        changes |= {"check": check, "is_needed": lambda form: bool(check(form, suggest(form)))}
    return question_of(setting, **changes)


def _may_change(setting: Setting) -> bool:
    """Whether a resumed run may have another value; where it writes is the run's own folder."""
    (preprocessing,) = {each.group for each in _settings() if each.name == "preprocess"}
    return (
        setting.on_resume == "free"
        and setting.ask != "never"
        and setting.name != "output_dir"
        and setting.group != preprocessing
    )


def _settings() -> Sequence[Setting]:
    return settings_of(TrainConfig)


def _what_is_wrong_with_epochs(form: Form, epochs: int) -> str:
    run = run_of(form)
    if run and epochs <= run.epoch and not run.settings["max_steps"]:
        return f"The run has done {run.epoch} epochs: give more to go on."
    return ""


def _what_is_wrong_with_emptying(setting: Setting, form: Form, value: Any) -> str:
    run = run_of(form)
    earlier = run.settings.get(setting.name) if run else None
    if value is None and earlier is not None:
        return f"It was {word_of(earlier)} in that run, and no flag takes that back: give another value, or the same."
    return ""


def _what_is_wrong_with_dataset(form: Form, folder: Path | None) -> str:
    return "" if folder and count_tensors(folder) else f"There are no tensors in {folder}: the run needs its own again."


def _what_is_wrong_with_root(form: Form, folder: Path | None) -> str:
    return what_is_wrong_with_checkpoints(folder)


_CHECKS = {"checkpoint_dir": _what_is_wrong_with_root, "dataset_dir": _what_is_wrong_with_dataset}


def _plan(form: Form) -> Plan:
    run = run_of(form)
    assert run is not None  # The first questions are not left without one.
    return Plan(run.recipe, {"resume_from": run.folder, **typed_values(form, run.settings)})


def _facts(form: Form) -> Facts:
    run = run_of(form)
    assert run is not None
    pace = pace_of(run.folder)
    more = (form["epochs"] - run.epoch) * pace.steps_per_epoch * pace.seconds_per_step if pace else 0.0
    takes = [("Time", f"about {duration(more)} more, at the pace it had")] if more > 0 and not form["max_steps"] else []
    return [
        ("Run", f"{run.folder}: {run}"),
        *takes,
        ("Writes", f"on in the same folder, from the checkpoint of epoch {run.epoch}"),
    ]


def _problem(form: Form) -> SidestepError | None:
    plan = _plan(form)
    try:
        resolve_training(plan.command, plan.values)
    except SidestepError as error:
        return error
    return None
