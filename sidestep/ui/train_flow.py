"""Training: the questions from a preset to the output folder, and what they come to."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sidestep.config.flags import COMMANDS
from sidestep.config.presets import read_preset, save_preset
from sidestep.config.rank_map import RANK_MAP_FILE, RankMap, read_rank_map
from sidestep.config.recipe import RECIPE_PINS, resolve_recipe, songs_held_out
from sidestep.config.resolve import resolve_training
from sidestep.config.runs import checkpoints_in
from sidestep.config.settings import Setting, settings_of
from sidestep.config.train import TrainConfig
from sidestep.data.audio import find_audio
from sidestep.errors import ConfigError, DataError, SidestepError
from sidestep.ui.command_line import Plan
from sidestep.ui.flow import Facts, Flow, depth_questions
from sidestep.ui.machine import Gpu
from sidestep.ui.model_questions import checkpoint_of, model_questions
from sidestep.ui.outlook import what_it_takes
from sidestep.ui.paths import (
    beside,
    count_tensors,
    free_name,
    holds_songs,
    what_is_wrong_with_data,
    what_is_wrong_with_output,
)
from sidestep.ui.preset_list import FRESH, preset_question
from sidestep.ui.questions import Choice, Form, Question, question_of, typed_values
from sidestep.ui.resume_flow import places_of_runs
from sidestep.ui.session import Session
from sidestep.ui.wording import count

Known = Callable[[Form], Mapping[str, Any]]
SETTINGS = {setting.name: setting for setting in settings_of(TrainConfig)}
MODEL, PREPROCESSING, ADAPTER, TRAINING, OBJECTIVE, DEVICE = (
    SETTINGS[name].group for name in ("dataset_dir", "preprocess", "rank", "epochs", "loss_weighting", "device")
)
MARKED = (ADAPTER, TRAINING, OBJECTIVE)
DECIDED_BY_MAP = ("rank", "target_modules", "attention_type")
FIRST = ("adapter_type", "rank_map")  # Of their group: they decide which of the other questions there are.
# As declared, but what happens first is asked first, and the device, which is found by itself, last.
ORDER = (
    MODEL,
    PREPROCESSING,
    *dict.fromkeys(s.group for s in SETTINGS.values() if s.group not in (MODEL, PREPROCESSING, DEVICE)),
    DEVICE,
)


def train_flow(
    session: Session,
    *,
    adapter_type: str | None = None,
    preset: str = FRESH,
    data: Path | None = None,
    known: Mapping[str, Any] = MappingProxyType({}),
    gpus: Sequence[Gpu] = (),
) -> Flow:
    """The flow that trains an adapter; what is known beforehand is given and, the adapter's kind aside, still asked.

    `known` are settings that the step before was made for; but for a rank map they count only with this preset.
    """
    session = session.as_it_is()

    def known_now(form: Form) -> Mapping[str, Any]:
        return known if form["preset"] == preset else {name: known[name] for name in known if name == "rank_map"}

    questions = (
        preset_question(preset, gpus, remarks=lambda name: _preset_remarks(name, adapter_type)),
        *depth_questions(lambda form: ORDER, marked=MARKED),
        *model_questions(session, overrides=known.get),
        _data_question(session, data),
        *_folder_questions(session),
        *_setting_questions(adapter_type, known_now),
    )
    return Flow(
        title=f"Train a {_title(adapter_type)}" if adapter_type else "Train",
        questions=questions,
        plan=training_plan,
        facts=lambda form: training_facts(form, places=places_of_runs(session)),
        problem=_problem,
        preset=_save_preset,
    )


def training_plan(form: Form) -> Plan:
    """The command and the values to type: what differs from the defaults and the preset."""
    preset = {"preset": form["preset"]} if form["preset"] else {}
    changed = typed_values(form, layer(form))
    if None in changed.values():  # No flag empties what a preset sets: everything is typed instead.
        return Plan(form["recipe"], typed_values(form, {}))
    return Plan(form["recipe"], {**preset, **changed})


def layer(form: Form) -> Mapping[str, Any]:
    """The settings of the chosen preset; none for a fresh start."""
    return read_preset(form["preset"]) if form["preset"] else {}


def training_facts(form: Form, *, places: Sequence[Path] = ()) -> Facts:
    """The recipe in a sentence, the preset, what it takes, and where things are written; `places` hold earlier runs."""
    config = _config(form)
    checkpoint = checkpoint_of(form)
    rows: list[tuple[str, str]] = []
    if checkpoint:
        recipe = resolve_recipe(config, name=form["recipe"], is_turbo=checkpoint.is_turbo)
        rows.append(("Recipe", f"{recipe}; {_why(form, checkpoint.is_turbo)}"))
    if form["preset"]:
        rows.append(("Preset", form["preset"]))
    steps, sum_ = _steps(form, config)
    rows.append(("Steps", sum_))
    if checkpoint:
        rows += what_it_takes(config, checkpoint, steps=steps, places=places)
    if is_raw(form):
        rows.append(("First", f"the songs in {form['data']} become tensors in {form['tensor_output']}"))
    output = form["output_dir"]
    rows.append(("Writes", f"the adapter, checkpoints every {count(config.save_every, 'epoch')} and logs to {output}"))
    return rows


def is_raw(form: Form) -> bool:
    """Whether the data are songs that are preprocessed first."""
    return form["data"] is not None and holds_songs(form["data"])


def _preset_remarks(name: str, adapter_type: str | None) -> Sequence[str]:
    named = read_preset(name).get("adapter_type", adapter_type)
    return () if named == adapter_type else [f"But for its adapter type: this trains a {_title(adapter_type)}."]


def _recipe_question(known: Known) -> Question:
    recipes = [Choice(value=c.name, title=c.name, note=c.summary) for c in COMMANDS if c.name in RECIPE_PINS]
    return Question(
        name="recipe",
        title="Recipe",
        kind="choice",
        group=OBJECTIVE,
        ask="advanced",
        suggest=lambda form: known(form).get("recipe", "fixed"),
        choices=lambda form: recipes,
    )


def _data_question(session: Session, data: Path | None) -> Question:
    def remark(form: Form) -> list[str]:
        if is_raw(form):
            return ["Songs, not tensors yet: they are preprocessed first. Esc chooses another folder."]
        return [f"{count(count_tensors(form['data']), 'song')}."]

    return Question(
        name="data",
        title="Dataset",
        kind="path",
        group=MODEL,
        help="Folder of preprocessed tensors, or a folder of songs to preprocess first.",
        suggest=lambda form: data or session.get("dataset_dir"),
        parse=question_of(SETTINGS["dataset_dir"]).parse,
        check=lambda form, folder: what_is_wrong_with_data(folder) if folder else "A dataset is needed to train.",
        tell=remark,
    )


def _folder_questions(session: Session) -> list[Question]:
    """Where tensors come from and go, and where the run writes: made from the one question about the dataset."""

    def hidden(name: str, value: Callable[[Form], Any]) -> Question:
        return question_of(SETTINGS[name], ask="never", suggest=value)

    # Found once: a run that fails leaves its folder behind, and the same one is right for the next try.
    free = cache(free_name)

    def output(form: Form) -> Path:
        carried = session.get("output_dir")
        named = f"{_stem(form['data'])}_{form['adapter_type']}" if form["data"] else f"my_{form['adapter_type']}"
        return free(carried.with_name(named) if carried else Path("output") / named)

    return [
        hidden("dataset_dir", lambda form: None if is_raw(form) else form["data"]),
        hidden("preprocess", is_raw),
        hidden("audio_dir", lambda form: form["data"] if is_raw(form) else None),
        question_of(
            SETTINGS["output_dir"],
            help=SETTINGS["output_dir"].help,
            suggest=output,
            check=what_is_wrong_with_run_folder,
        ),
        question_of(SETTINGS["run_name"]),
        question_of(
            SETTINGS["tensor_output"],
            help=SETTINGS["tensor_output"].help,
            applies=is_raw,
            suggest=lambda form: beside(form["data"], "tensors"),
            check=lambda form, folder: what_is_wrong_with_output(folder) if folder else "A folder is needed here.",
        ),
    ]


def what_is_wrong_with_run_folder(form: Form, folder: Path | None) -> str:
    """Why a run cannot begin in this folder; nothing when it can."""
    if folder is None:
        return "A folder is needed to train."
    if checkpoints_in(folder):
        return f"{folder} holds a run already: choose another folder, or resume that run from the menu."
    return what_is_wrong_with_output(folder)


def _setting_questions(adapter_type: str | None, known: Known) -> list[Question]:
    own = {"checkpoint_dir", "model_variant", "base_model", "dataset_dir", "output_dir", "run_name"}
    own |= {"preprocess", "audio_dir", "tensor_output", "resume_from"}
    others = [setting for setting in SETTINGS.values() if setting.name not in own]
    questions = [_recipe_question(known), *(_training_question(setting, adapter_type, known) for setting in others)]
    return sorted(questions, key=lambda question: (ORDER.index(question.group), question.name not in FIRST))


def _map_question(setting: Setting, known: Known, applies: Callable[[Form], bool]) -> Question:
    """Which rank map to train with; asked of everyone where one for this model lies beside the dataset."""
    read = cache(_map_in)

    def beside_dataset(form: Form) -> Path | None:
        folder, checkpoint = form["dataset_dir"], checkpoint_of(form)
        found = read(folder) if folder and checkpoint else None
        fits = found and checkpoint and found.origin.model_variant == checkpoint.variant
        return folder / RANK_MAP_FILE if fits else None

    return question_of(
        setting,
        suggest=lambda form: known(form).get(setting.name) or beside_dataset(form),
        applies=applies,
        is_needed=lambda form: setting.name not in known(form) and beside_dataset(form) is not None,
        check=_what_is_wrong_with_map,
    )


def _map_in(folder: Path) -> RankMap | None:
    """The rank map beside a dataset; None where there is none that can be read."""
    try:
        return read_rank_map(folder / RANK_MAP_FILE)
    except (DataError, OSError):
        return None


def _what_is_wrong_with_map(form: Form, path: Path | None) -> str:
    try:
        read_rank_map(path) if path else None
    except DataError as error:
        return f"{error.message} {error.hint}".strip()
    return ""


def _has_map(form: Form) -> bool:
    when = SETTINGS["rank_map"].when
    return form["rank_map"] is not None and (when is None or when.holds(form))


def _training_question(setting: Setting, adapter_type: str | None, known: Known) -> Question:
    def suggest(form: Form) -> Any:
        return known(form).get(setting.name, layer(form).get(setting.name, setting.default))

    def applies(form: Form) -> bool:
        return (
            setting.name not in RECIPE_PINS[form["recipe"]]
            and not (setting.name in DECIDED_BY_MAP and _has_map(form))
            # One that a preset asks for without a map must be here to be taken back.
            and not (setting.name == "rank_map_start" and not suggest(form) and not _has_map(form))
            and (setting.when is None or setting.when.holds(form))
            and (setting.group != PREPROCESSING or is_raw(form))
        )

    if setting.name == "alpha":
        return question_of(setting, suggest=lambda form: _suggested_alpha(form, known(form)), applies=applies)
    if setting.name == "rank_map":
        return _map_question(setting, known, applies)
    if setting.name == "adapter_type" and adapter_type:
        return question_of(setting, ask="advanced", suggest=lambda form: adapter_type, applies=applies)
    return question_of(setting, suggest=suggest, applies=applies)


def _suggested_alpha(form: Form, known: Mapping[str, Any]) -> float:
    """As the layers below have it; where another rank was given, in the same proportion to it."""
    if "alpha" in known:
        return known["alpha"]
    values = {name: layer(form).get(name, SETTINGS[name].default) for name in ("rank", "alpha")}
    return values["alpha"] * form["rank"] / values["rank"]


def _config(form: Form) -> TrainConfig:
    plan = training_plan(form)
    values = {name: value for name, value in plan.values.items() if name != "preset"}
    return resolve_training(plan.command, values, preset=plan.values.get("preset")).config


def _problem(form: Form) -> SidestepError | None:
    try:
        _config(form)
    except ConfigError as error:
        return error
    return None


def _save_preset(form: Form, name: str) -> str:
    return str(save_preset(name, _config(form), without=RECIPE_PINS[form["recipe"]]))


def _why(form: Form, is_turbo: bool) -> str:
    if form["recipe"] == "vanilla":
        return "as the official trainer does it, for every model"
    if form["timestep_mode"] != "auto" or form["cfg_ratio"] is not None:
        return "as you set it"
    return "as this model is used: in eight steps, without guidance" if is_turbo else "as this model was trained"


def _steps(form: Form, config: TrainConfig) -> tuple[int, str]:
    passes = config.batch_size * config.gradient_accumulation
    if config.max_steps:
        return config.max_steps, f"{config.max_steps}, by max steps"
    found = len(find_audio(form["data"])) if is_raw(form) else count_tensors(form["data"])
    songs = (found - songs_held_out(found, config.val_split)) * config.dataset_repeats
    each = -(-songs // passes)
    more = "; more where songs are longer than a window" if config.chunk_duration else ""
    sum_ = f"{count(songs, 'song')} / ({config.batch_size} x {config.gradient_accumulation}), {config.epochs} epochs"
    return each * config.epochs, f"about {each * config.epochs} ({sum_}{more})"


def _stem(folder: Path) -> str:
    name = folder.resolve().name
    return name.removesuffix("_tensors") or "my"


def _title(adapter_type: str | None) -> str:
    return {"lora": "LoRA", "lokr": "LoKr"}.get(adapter_type or "", adapter_type or "")
