"""Preprocessing++: which modules to train and how much of each, measured on the songs; and the run that follows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sidestep.config.presets import read_preset
from sidestep.config.rank_map import RANK_MAP_FILE
from sidestep.config.recipe import RECIPE_PINS, resolve_recipe
from sidestep.config.settings import Setting, build, settings_of
from sidestep.config.tasks import (
    BUDGET,
    EstimateConfig,
    check_estimate,
    focus_range,
    run_of,
    what_is_wrong_with_map_file,
)
from sidestep.config.train import TrainConfig
from sidestep.errors import ConfigError, SidestepError
from sidestep.ui.command_line import Plan
from sidestep.ui.flow import Facts, Flow, depth_questions
from sidestep.ui.machine import Gpu
from sidestep.ui.model_questions import checkpoint_of, model_questions
from sidestep.ui.paths import count_tensors, holds_songs
from sidestep.ui.preset_list import FRESH, preset_question
from sidestep.ui.questions import Form, Question, question_of, typed_values
from sidestep.ui.session import Session
from sidestep.ui.wording import count

SETTINGS = {setting.name: setting for setting in settings_of(EstimateConfig)}
MODEL, DEVICE = (SETTINGS[name].group for name in ("dataset_dir", "device"))
# As declared, but the device, which is found by itself, last.
ORDER = (*dict.fromkeys(setting.group for setting in SETTINGS.values() if setting.group != DEVICE), DEVICE)
# What a preset and a run call by another name here, or decide by the map alone.
OTHER_NAMES = {"target_modules": "uniform_modules"}
NOT_OF_THE_RUN = ("target_modules", "attention_type", "log_dir")


def estimate_flow(session: Session, *, preset: str = FRESH, data: Path | None = None, gpus: Sequence[Gpu] = ()) -> Flow:
    """The flow that makes a rank map for the run that comes after it."""
    session = session.as_it_is()
    asked = {"checkpoint_dir", "model_variant", "base_model", "dataset_dir"}
    others = [setting for setting in SETTINGS.values() if setting.name not in asked]
    return Flow(
        title="Preprocessing++",
        questions=(
            preset_question(preset, gpus),
            *depth_questions(lambda form: ORDER, marked=(BUDGET,)),
            *model_questions(session),
            question_of(
                SETTINGS["dataset_dir"],
                title="Dataset",
                suggest=lambda form: data or session.get("dataset_dir"),
                check=_what_is_wrong_with_data,
                tell=lambda form: [f"{count(count_tensors(form['dataset_dir']), 'song')}."],
            ),
            *sorted(map(_question, others), key=lambda question: ORDER.index(question.group)),
        ),
        plan=estimate_plan,
        facts=_facts,
        problem=_problem,
    )


def estimate_plan(form: Form) -> Plan:
    """The command and the values to type; `estimate` knows no presets, so their values are typed."""
    return Plan("estimate", typed_values(form, {}))


def map_of(form: Form) -> Path:
    """Where the rank map is written."""
    return form["output"] or form["dataset_dir"] / RANK_MAP_FILE


def known_of_run(form: Form) -> dict[str, Any]:
    """What the run with this map has to be like, beside its preset: the map, and what was decided here for it."""
    shared = {setting.name for setting in settings_of(TrainConfig)} - set(NOT_OF_THE_RUN)
    typed = {name: value for name, value in typed_values(form, layer(form)).items() if name in shared}
    return {**typed, "recipe": form["recipe"], "rank_map": map_of(form)}


def layer(form: Form) -> Mapping[str, Any]:
    """The settings of the chosen preset that count here, by the names they have here."""
    if not form["preset"]:
        return {}
    named = {OTHER_NAMES.get(name, name): value for name, value in read_preset(form["preset"]).items()}
    return {name: value for name, value in named.items() if name in SETTINGS}


def _question(setting: Setting) -> Question:
    def applies(form: Form) -> bool:
        is_open = setting.name == "recipe" or setting.name not in RECIPE_PINS[form["recipe"]]
        return is_open and (setting.when is None or setting.when.holds(form))

    changes: dict[str, Any] = {
        "suggest": lambda form: layer(form).get(setting.name, setting.default),
        "applies": applies,
    }
    if setting.name == "timestep_focus":
        changes["check"] = _what_is_wrong_with_focus
    if setting.name == "output":
        changes["check"] = lambda form, path: what_is_wrong_with_map_file(path) if path else ""
    return question_of(setting, **changes)


def _what_is_wrong_with_data(form: Form, folder: Path | None) -> str:
    if folder is None or not folder.is_dir():
        return f"There is no folder {folder}." if folder else "A dataset is needed."
    if count_tensors(folder):
        return ""
    more = " It holds songs: preprocess them first, from the menu." if holds_songs(folder) else ""
    return f"{folder} holds no tensors (.pt files).{more}"


def _what_is_wrong_with_focus(form: Form, text: str) -> str:
    try:
        focus_range(text)
    except ConfigError as error:
        return f"{error.message} {error.hint}".strip()
    return ""


def _config(form: Form) -> EstimateConfig:
    given = estimate_plan(form).values
    config = build(EstimateConfig, given)
    check_estimate(config, given)
    return config


def _problem(form: Form) -> SidestepError | None:
    try:
        _config(form)
    except ConfigError as error:
        return error
    return None


def _facts(form: Form) -> Facts:
    config = _config(form)
    songs = count(count_tensors(config.dataset_dir), "song")
    rows = [("Looks at", f"{songs}, in {config.estimate_batches} passes forwards and backwards; nothing is trained")]
    checkpoint = checkpoint_of(form)
    if checkpoint:
        recipe = resolve_recipe(run_of(config), name=config.recipe, is_turbo=checkpoint.is_turbo)
        rows.append(("For a run", str(recipe)))
    path = map_of(form)
    instead = " in place of the one that is there" if path.exists() else ""
    rows.append(("Writes", f"the rank map {path}{instead}, and a picture of it beside"))
    return rows
