"""From what was typed to a TrainConfig: layers, what a resumed run may change, and contradictions."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidestep.config.adapter import ATTENTION_PROJECTIONS, PEFT
from sidestep.config.presets import read_preset, read_run_config
from sidestep.config.rank_map import kept_map
from sidestep.config.recipe import RECIPE_PINS, learning_rate_of
from sidestep.config.runs import LONGEST_NAME, RESERVED_NAMES, RUN_CONFIG, resume_candidates, resumed_run, run_of
from sidestep.config.settings import (
    Setting,
    Values,
    build,
    flag_of,
    idle_settings,
    parse_values,
    settings_of,
    show_value,
    values_of,
)
from sidestep.config.shell import shell_line, start_words
from sidestep.config.train import PREPROCESSING, TrainConfig
from sidestep.errors import ConfigError
from sidestep.files import DEVICE_NAMES


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A config, and what the user should know about how it came about."""

    config: TrainConfig
    notices: tuple[str, ...]


def resolve_training(command: str, typed: Values, *, preset: str | None = None, source: Path | None = None) -> Resolved:
    """Lay the settings over each other: defaults, an earlier run's, a preset, what was typed, the recipe's pins.

    ConfigError names every problem: wrong values, contradictions, changes that a resumed run does not allow.
    """
    pins = RECIPE_PINS[command]
    given = parse_values(TrainConfig, typed)
    resumed = _resumed_values(command, given["resume_from"]) if given.get("resume_from") else {}
    earlier = _earlier_values(source) if source else {}
    from_preset = read_preset(preset) if preset else {}
    chosen = {**from_preset, **given}
    _refuse_changes(resumed, chosen)
    config = build(TrainConfig, earlier, resumed, chosen, pins)
    problems = contradictions(config, given)
    if problems:
        raise ConfigError("\n".join(problems))
    notices = idle_settings(config, _without(given, pins)) + _overruled(config, given)
    for origin, values in ((f"Preset {preset}", from_preset), (str(source), earlier)):
        said = idle_settings(config, _without(_meant(values), {**pins, **given}))
        notices += [f"{sentence} {origin} sets it." for sentence in said]
        notices += _pinned(command, values, origin)
    if source and resumed:
        notices.append("--config has no effect with --resume-from: a run goes on with its own settings.")
    return Resolved(config=config, notices=tuple(notices))


def _overruled(config: TrainConfig, given: Values) -> list[str]:
    """Return a sentence for each typed setting that others leave without effect, beyond what its own condition says."""
    notices = []
    if "rank" in given and config.rank_map is not None:
        notices.append("--rank has no effect with --rank-map: the map gives each module its own rank.")
    if "attention_type" in given and not set(config.target_modules) & set(ATTENTION_PROJECTIONS):
        notices.append("--attention-type has no effect here: --target-modules names the MLP's projections alone.")
    if config.preprocess and given.get("dataset_dir") not in (None, config.tensor_output):
        notices.append(
            "--dataset-dir has no effect with --preprocess: training goes on with the tensors of --tensor-output."
        )
    if not config.preprocess:
        notices += [
            f"{setting.flag} has no effect without --preprocess: --dataset-dir is trained on as it is."
            for setting in settings_of(TrainConfig)
            if setting.group == PREPROCESSING and setting.name in given and setting.name != "preprocess"
        ]
    return notices


def _pinned(command: str, values: Values, origin: str) -> list[str]:
    """Return a sentence for each setting of a preset or an earlier run that the recipe has no choice in."""
    return [
        f"{origin} sets {setting.flag} to {show_value(values[setting.name])}: "
        f"{command} trains with {show_value(RECIPE_PINS[command][setting.name])}."
        for setting in settings_of(TrainConfig)
        if setting.name in RECIPE_PINS[command]
        and values.get(setting.name, setting.default) not in (setting.default, RECIPE_PINS[command][setting.name])
    ]


def _earlier_values(source: Path) -> dict[str, Any]:
    """Return what another run takes over from an earlier one: not where it went, not its preprocessing, which is done,
    and not what its recipe pinned."""
    path = source / RUN_CONFIG if source.is_dir() else source
    recipe, values = read_run_config(path)
    values["rank_map"] = kept_map(values, run_of(path.parent))
    return _without(values, {"output_dir", "run_name", "resume_from", "preprocess", *RECIPE_PINS[recipe]})


def contradictions(config: TrainConfig, given: Values) -> list[str]:
    """Return a sentence for every combination of settings that cannot be meant."""
    problems = [
        f"{setting.flag} counts {setting.when}: {setting.help}"
        for setting in settings_of(TrainConfig)
        if setting.name in given
        and setting.when
        and setting.when.is_strict
        and not setting.when.holds(values_of(config))
    ]
    if config.early_stop_patience and not config.val_split:
        problems.append("--early-stop-patience needs --val-split: without held-out songs nothing says when to stop.")
    if config.shard_base and config.quantize != "none":
        problems.append("--shard-base spreads whole weights: it does not go with --quantize.")
    if config.shard_base and config.sample_every_n_epochs:
        problems.append("--sample-every-n-epochs renders in one process: with --shard-base none holds the whole model.")
    if config.rank_map is None and config.rank_map_start:
        problems.append("--rank-map-start needs --rank-map: the directions lie beside the map.")
    if config.rank_map is not None and "rank_map" not in given and config.adapter_type not in PEFT.values:
        problems.append(f"--config brings --rank-map {config.rank_map}, which counts {PEFT}.")
    if config.rank_map is not None:
        problems += [
            f"{flag_of(name)} has no say with --rank-map: the map names the modules."
            for name in ("target_modules", "attention_type")
            if name in given
        ]
    if config.lokr_factor == 0:
        problems.append("--lokr-factor takes -1 (the most square one) or a whole number from 1.")
    if 0 < config.chunk_duration < 1:
        problems.append("--chunk-duration takes 0 (whole songs) or at least 1 second.")
    if config.run_name is not None and (why := _unfit_name(config.run_name)):
        problems.append(f"--run-name {config.run_name} cannot name an adapter: {why}.")
    if config.preprocess and (
        (config.audio_dir is None and config.dataset_json is None) or config.tensor_output is None
    ):
        problems.append("--preprocess needs --audio-dir (or --dataset-json) and --tensor-output.")
    if not config.preprocess:
        problems += [
            f"{flag_of(name)} is required to train: {_help(name)}"
            for name in ("dataset_dir", "output_dir")
            if getattr(config, name) is None
        ]
    return problems


def _unfit_name(name: str) -> str:
    """Say why this cannot be the name of an adapter's folder; empty when it can."""
    if not name.strip():
        return "it is empty"
    if wrong := next((sign for sign in name if sign in './\\:*?"<>|' or not sign.isprintable()), ""):
        return f"programs or systems refuse {wrong!a} in the name of a folder"
    if name.lower() in DEVICE_NAMES or name != name.strip():
        return "Windows has no folder of that name"
    if name.lower() in RESERVED_NAMES:
        return "the run keeps other files in a folder of that name"
    if len(name.encode()) > LONGEST_NAME:
        return f"it is longer than {LONGEST_NAME} bytes"
    return ""


def _resumed_values(command: str, path: Path) -> dict[str, Any]:
    """Return the settings of the run that is gone on with; its folder may have been moved since."""
    recipe, values = _newest_readable(resume_candidates(path))
    if recipe != command:
        line = shell_line([*start_words(), recipe, "--resume-from", path])
        raise ConfigError(f"{path} was trained with '{recipe}', not '{command}'.", hint=f"Resume it with:\n  {line}")
    run = resumed_run(path)
    own = {"output_dir": run, "rank_map": kept_map(values, run), "resume_from": path, "preprocess": False}
    return {**values, **own}


def _newest_readable(checkpoints: list[Path]) -> tuple[str, dict[str, Any]]:
    """Return the recipe and the settings of the newest checkpoint that can be read; all of a run's hold the same."""
    for checkpoint in checkpoints[:-1]:
        try:
            return read_run_config(checkpoint / RUN_CONFIG)
        except ConfigError:
            continue
    return read_run_config(checkpoints[-1] / RUN_CONFIG)


def _refuse_changes(resumed: Values, chosen: Values) -> None:
    """Raise ConfigError for a setting that would change what the run computes; its own value, typed, is no change."""
    before = dict(resumed)
    if resumed and resumed["learning_rate"] is None:
        before["learning_rate"] = learning_rate_of(build(TrainConfig, resumed))
    problems = [
        f"{setting.flag} was {_shown(setting, before[setting.name])} in that run and cannot become "
        f"{show_value(chosen[setting.name])} when it goes on."
        for setting in settings_of(TrainConfig)
        if setting.on_resume == "fixed"
        and setting.name in chosen
        and setting.name in before
        and chosen[setting.name] != before[setting.name]
    ]
    if problems:
        raise ConfigError("\n".join(problems), hint="Leave these flags out, or start a new run with --init-from.")


def _shown(setting: Setting, value: object) -> str:
    return f"left at its default ({setting.shown_default})" if value is None else show_value(value)


def _help(name: str) -> str:
    return next(setting.help for setting in settings_of(TrainConfig) if setting.name == name)


def _meant(values: Values) -> dict[str, Any]:
    """Return what a preset or an earlier run sets for its own kind of adapter, and not to the default.

    A run's config.json holds every setting, those of preprocessing too, which is done.
    """
    strict = {setting.name: setting.default for setting in settings_of(TrainConfig) if _is_strict(setting)}
    return {name: value for name, value in values.items() if name in strict and value != strict[name]}


def _is_strict(setting: Setting) -> bool:
    return setting.when is not None and setting.when.is_strict


def _without(values: Mapping[str, Any], names: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
