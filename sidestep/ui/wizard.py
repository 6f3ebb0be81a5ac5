"""The wizard: a menu, and behind each entry the questions, the review, the action, and what comes next."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from sidestep.config.places import config_folder, product_version
from sidestep.config.presets import delete_preset, is_own_preset, own_preset_path, preset_names
from sidestep.config.settings import settings_of
from sidestep.config.train import TrainConfig
from sidestep.errors import EXIT_BUG, SidestepError
from sidestep.model.checkpoint import list_models
from sidestep.ui.asker import Asker, GoBack, Prompt
from sidestep.ui.command_line import Plan
from sidestep.ui.console import Console
from sidestep.ui.download import Hub
from sidestep.ui.estimate_flow import estimate_flow, known_of_run
from sidestep.ui.first_start import ask_for_folder, fetch_models, has_models, show_how_to_fetch, show_machine
from sidestep.ui.flow import Flow, chosen_groups
from sidestep.ui.machine import Gpu
from sidestep.ui.preset_list import describe_preset, preset_choices
from sidestep.ui.problems import log_traceback, show_bug, show_error
from sidestep.ui.questions import Choice, Form, Question, wanted, whole_group
from sidestep.ui.resume_flow import resume_flow
from sidestep.ui.review import show_review
from sidestep.ui.session import Session
from sidestep.ui.task_flows import build_dataset_flow, preprocess_flow
from sidestep.ui.train_flow import train_flow
from sidestep.ui.walk import ask, walk

ADAPTERS = {"lora": "LoRA", "lokr": "LoKr"}
Outcome = Literal["done", "failed", "bug"]


class _Leave(Exception):  # noqa: N818 - a signal, not an error
    """The user chose Exit."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a menu and what it opens."""

    title: str
    open: Callable[[], None]
    note: str = ""


class Wizard:
    """Asks what to do and does it, until the user leaves.

    `start` carries out a plan and returns its exit code; `find_gpus` is called at most once, when it matters.
    """

    def __init__(
        self,
        asker: Asker,
        console: Console,
        *,
        start: Callable[[Plan], int],
        hub: Hub,
        find_gpus: Callable[[], Sequence[Gpu]],
    ) -> None:
        self._asker = asker
        self._console = console
        self._start = start
        self._hub = hub
        self._find_gpus = find_gpus
        self._session = Session(warn=console.warning)
        self._exit_code = 0

    @cached_property
    def _gpus(self) -> Sequence[Gpu]:
        return self._find_gpus()

    def run(self) -> int:
        """Open the menu; returns the exit code of the last action, 0 without one."""
        self._console.heading(f"Side-Step {product_version()}")
        self._console.print(f"  {self._asker.keys}", style="dim")
        try:
            if not has_models(self._session):
                self._welcome()
            while True:
                self._console.print()
                self._offer("What would you like to do?", self._menu(), back="")
        except _Leave:
            return self._exit_code

    def _menu(self) -> list[Entry]:
        known = next(setting for setting in settings_of(TrainConfig) if setting.name == "adapter_type").choices
        trained = [name for name in ADAPTERS if name in known]
        return [
            *(Entry(f"Train a {ADAPTERS[name]}", partial(self._train, adapter_type=name)) for name in trained),
            Entry("Build dataset", self._build_dataset, "a folder of songs becomes dataset.json"),
            Entry("Preprocess audio", self._preprocess, "songs become the tensors that training reads"),
            Entry("Preprocessing++", self._estimate, "which modules to train, and how much of each"),
            Entry("Resume a run", self._resume),
            Entry("Presets", self._presets),
            Entry("Settings", self._settings, "where the models are, what is remembered"),
            Entry("Exit", self._leave),
        ]

    def _offer(self, title: str, entries: Sequence[Entry], *, back: str = "Back") -> None:
        """Open the chosen entry; one that is gone back from leads to the list again."""
        choices = [Choice(value=index, title=entry.title, note=entry.note) for index, entry in enumerate(entries)]
        chosen = 0
        while True:
            chosen = self._asker.choose(Prompt(title), choices, chosen, back=back)
            try:
                entries[chosen].open()
                return
            except GoBack:
                continue

    def _leave(self) -> None:
        raise _Leave

    def _welcome(self) -> None:
        """The first start: without a model there is little to do, so that comes first."""
        self._console.print()
        self._console.print("  Welcome. No ACE-Step model was found yet.")
        show_machine(self._console, self._gpus)
        show_how_to_fetch(self._console)
        entries = [
            Entry("I have them: name the folder", partial(ask_for_folder, self._asker, self._session)),
            Entry("Fetch them now", self._fetch, "from Hugging Face; can be interrupted and goes on"),
            Entry("Later", lambda: None),
        ]
        self._console.print()
        self._offer("Where are the models?", entries, back="")

    def _fetch(self) -> None:
        try:
            fetch_models(self._asker, self._session, self._hub, say=self._console.print)
        except SidestepError as error:
            self._explain(error)
            raise GoBack from error

    def _train(self, **known: Any) -> None:
        if self._conduct(train_flow(self._session, gpus=self._gpus, **known)):
            self._what_next([])

    def _build_dataset(self) -> None:
        form = self._conduct(build_dataset_flow(self._session))
        if form:
            known = partial(self._preprocess, audio=form["input"], dataset_json=form["output"])
            self._what_next([Entry("Preprocess these songs", known)])

    def _preprocess(self, *, audio: Path | None = None, dataset_json: Path | None = None) -> None:
        form = self._conduct(preprocess_flow(self._session, audio=audio, dataset_json=dataset_json))
        if form:
            data = form["tensor_output"]
            train = partial(self._train, data=data)
            entries = [Entry(f"Train a {ADAPTERS[a]} on them", partial(train, adapter_type=a)) for a in ADAPTERS]
            measure = Entry(
                "Preprocessing++", partial(self._estimate, data=data), "first measure what to train on them"
            )
            self._what_next([*entries, measure])

    def _estimate(self, *, data: Path | None = None) -> None:
        form = self._conduct(estimate_flow(self._session, data=data, gpus=self._gpus))
        if form:
            given = {"preset": form["preset"], "data": form["dataset_dir"], "known": known_of_run(form)}
            train = partial(self._train, adapter_type="lora", **given)
            self._what_next([Entry("Train a LoRA with this rank map", train)])

    def _resume(self) -> None:
        if self._conduct(resume_flow(self._session)):
            self._what_next([])

    def _what_next(self, entries: Sequence[Entry]) -> None:
        """Offer the next step of the chain; going back from here leads to the menu."""
        self._console.print()
        try:
            self._offer("What next?", [*entries, Entry("Exit", self._leave)], back="Back to the menu")
        except GoBack:
            return

    def _presets(self) -> None:
        choices = preset_choices(self._gpus)
        entries = [Entry(each.title, partial(self._one_preset, each.value), each.note) for each in choices]
        self._offer("Presets", entries)

    def _one_preset(self, name: str) -> None:
        entries: list[Entry] = []
        try:
            self._console.print(f"  {describe_preset(name)}")
            train = partial(self._train, preset=name)
            entries += [Entry(f"Train a {ADAPTERS[a]} with it", partial(train, adapter_type=a)) for a in ADAPTERS]
        except SidestepError as error:
            self._explain(error)
        if is_own_preset(name):
            entries.append(Entry("Delete it", partial(self._delete_preset, name)))
        self._offer(name, entries)

    def _delete_preset(self, name: str) -> None:
        self._offer(f"Delete {name}?", [Entry("Delete it", partial(delete_preset, name))], back="Keep it")
        self._console.print(f"  Deleted: {name}")

    def _settings(self) -> None:
        folder = self._session.checkpoint_dir()
        models = ", ".join(list_models(folder)) if folder else ""
        rows = [
            ("Checkpoint folder", str(folder or "not known")),
            ("Models", models or "none"),
            *(("GPU", str(gpu)) for gpu in self._gpus),
            ("Kept in", str(config_folder())),
        ]
        self._console.table("Settings", rows)
        self._console.print()
        entries = [
            Entry("Change the checkpoint folder", partial(ask_for_folder, self._asker, self._session)),
            Entry("Fetch models", self._fetch, "from Hugging Face"),
            Entry("Forget the last answers", self._session.forget, "folders and model that questions suggest"),
            Entry("Examine this machine", self._examine, "what is here to train with, and what ails"),
        ]
        self._offer("Change", entries)

    def _examine(self) -> None:
        folder = self._session.checkpoint_dir()
        self._start_and_report(Plan("doctor", {"checkpoint_dir": folder} if folder else {}))

    def _conduct(self, flow: Flow) -> Form | None:
        """Ask, review, start. Returns the answers of what was done, None when it was cancelled; GoBack leads out."""
        form = Form(flow.questions)
        self._console.heading(flow.title)
        is_from_end = False
        while True:
            walk(form, self._asker, _asked_now, from_end=is_from_end)
            try:
                return form if self._review(flow, form) else None
            except GoBack:
                is_from_end = True

    def _review(self, flow: Flow, form: Form) -> bool:
        """Show what is about to happen until it is started or cancelled; returns whether it was started."""
        is_shown = False
        while True:
            problem = None if is_shown else show_review(self._console, flow, form)
            is_shown = False
            chosen = self._asker.choose(Prompt("Ready?"), _review_choices(flow, is_ready=problem is None), "start")
            if chosen == "cancel":
                return False
            if chosen == "start" and (outcome := self._carry_out(flow, form)) != "failed":
                return outcome == "done"
            is_shown = chosen in ("start", "save")  # What was said of it would be pushed away by the same review again.
            try:
                if chosen == "change":
                    self._change(flow, form)
                if chosen == "save":
                    self._save_preset(flow, form)
            except GoBack:
                continue

    def _change(self, flow: Flow, form: Form) -> None:
        """Let one group of settings be changed."""
        groups = [Entry(group, partial(walk, form, self._asker, whole_group(group))) for group in flow.groups(form)]
        self._offer("Which group?", groups)

    def _carry_out(self, flow: Flow, form: Form) -> Outcome:
        """Start what was planned, and keep the answers for the next time."""
        self._session.keep_answers(form)
        self._console.print("  Starting.", style="dim")
        return self._start_and_report(flow.plan(form))

    def _start_and_report(self, plan: Plan) -> Outcome:
        """Start a plan and say what went wrong: an error that a change may cure, or a bug of ours."""
        try:
            self._exit_code = self._start(plan)
        except SidestepError as error:
            self._exit_code = error.exit_code
            self._explain(error)
            return "failed"
        except Exception as error:  # What else there is to do in the wizard does not end with it.
            self._exit_code = EXIT_BUG
            show_bug(error, stream=sys.stderr, plain=self._console.is_plain)
            return "bug"
        finally:
            self._asker.forget_keys()
        return "done"

    def _save_preset(self, flow: Flow, form: Form) -> None:
        save = flow.preset
        assert save is not None  # The entry is there only then.

        def check(_: Form, name: str) -> str:
            try:
                if own_preset_path(name).stem.casefold() in map(str.casefold, preset_names()):
                    return f"There is a preset {name} already; choose another name."
                saved.append(save(form, name))
            except SidestepError as error:
                return f"{error.message} {error.hint}".strip()
            return ""

        saved: list[str] = []
        question = Question(
            name="preset_name", title="Name of the preset", kind="text", suggest=lambda form: "", check=check
        )
        ask(question, Form([question]), self._asker)
        self._console.print(f"  Saved: {saved[-1]}")
        self._console.print()

    def _explain(self, error: SidestepError) -> None:
        log_traceback(error)
        show_error(error, stream=sys.stderr, plain=self._console.is_plain)
        self._console.print()


def _asked_now(form: Form, question: Question) -> bool:
    return wanted(chosen_groups(form))(form, question)


def _review_choices(flow: Flow, *, is_ready: bool) -> list[Choice]:
    choices = [Choice(value="start", title="Start")] if is_ready else []
    choices.append(Choice(value="change", title="Change a group"))
    if flow.preset and is_ready:
        choices.append(Choice(value="save", title="Save as preset"))
    return [*choices, Choice(value="cancel", title="Cancel", note="back to the menu")]
