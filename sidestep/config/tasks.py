"""The settings of the commands that do not train."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sidestep.config.adapter import TARGET_MODULES
from sidestep.config.rank_map import RANK_MAP_FILE
from sidestep.config.recipe import RECIPE_PINS
from sidestep.config.settings import Range, Values, When, flag_of, option, same_as, settings_of, show_value
from sidestep.config.train import TrainConfig
from sidestep.errors import ConfigError

FOCUS = {"balanced": (0.0, 1.0), "texture": (0.0, 0.4), "structure": (0.6, 1.0)}
ESTIMATE = "Estimate"
BUDGET = "Ranks and budget"
RUN = "The run it is for"
VERIFY = When("verify", (True,))


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildDatasetConfig:
    """What `build-dataset` needs to know."""

    input: Path = option("Folder with the songs; searched recursively.", group="Dataset", ask="basic")
    output: Path | None = option(
        "The dataset file to write.", group="Dataset", default=None, shown_default="{input}/dataset.json"
    )
    name: str = option("Name of the dataset.", group="Dataset", default="", shown_default="the folder's name")
    tag: str = option(
        "A word that stands for this music in every prompt (a trigger word).",
        group="Dataset",
        default="",
        ask="basic",
        shown_default="none",
    )
    tag_position: Literal["prepend", "append", "replace"] = option(
        "Where the tag stands: before the caption, after it, or in its place.", group="Dataset", default="prepend"
    )
    genre_ratio: int = option(
        "Percentage of the songs that are trained with their genre in place of their caption.",
        group="Dataset",
        default=0,
        within=Range(at_least=0, at_most=100),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """What `demo` needs to know."""

    folder: Path = option(
        "Where the demo puts its toy checkpoint, songs and results.", group="Demo", default=Path("demo")
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorConfig:
    """What `doctor` needs to know."""

    checkpoint_dir: Path | None = same_as(TrainConfig, "checkpoint_dir", group="Doctor")
    model_variant: str | None = option(
        "The model to examine.", group="Doctor", default=None, short="-M", shown_default="every one in the folder"
    )
    output_dir: Path = option(
        "Where adapters and checkpoints would be written.", group="Doctor", default=Path("output"), short="-o"
    )
    device: str = same_as(TrainConfig, "device", group="Doctor")


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateConfig:
    """What `estimate` needs to know; what it shares with TrainConfig must be as in the run that the map is for."""

    checkpoint_dir: Path | None = same_as(TrainConfig, "checkpoint_dir")
    model_variant: str = same_as(TrainConfig, "model_variant")
    base_model: Literal["turbo", "base", "sft", "xl-turbo", "xl-base", "xl-sft"] | None = same_as(
        TrainConfig, "base_model"
    )
    dataset_dir: Path = option(
        "Folder of preprocessed tensors (.pt files, and manifest.json).",
        group="Model and paths",
        short="-d",
        ask="basic",
        in_presets=False,
    )
    output: Path | None = option(
        "The rank map to write, a name that ends in .json; a heat map (.png) lies beside it.",
        group="Model and paths",
        default=None,
        shown_default="{dataset-dir}/rank_map.json",
    )
    device: str = same_as(TrainConfig, "device")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = same_as(TrainConfig, "precision")

    method: Literal["cross-fit", "eva", "grad-norm"] = option(
        "How modules are scored: the gradient that two halves of the draws agree on; the variance of layer inputs "
        "(EVA, by PEFT); the plain gradient norm.",
        group=ESTIMATE,
        default="cross-fit",
    )
    estimate_batches: int = option(
        "Passes to look at, in both halves together.",
        group=ESTIMATE,
        default=128,
        within=Range(at_least=2, at_most=1_000_000),
        ask="basic",
    )
    batch_size: int = same_as(TrainConfig, "batch_size", group=ESTIMATE)
    seed: int = same_as(TrainConfig, "seed", group=ESTIMATE)
    gradient_checkpointing: bool = same_as(TrainConfig, "gradient_checkpointing", group=ESTIMATE)
    quantize: Literal["none", "int8", "nf4"] = same_as(TrainConfig, "quantize", group=ESTIMATE)
    timestep_focus: str = option(
        "Which timesteps count: balanced (all), texture (0 to 0.4), structure (0.6 to 1), or a range LO,HI.",
        group=ESTIMATE,
        default="balanced",
        ask="basic",
    )
    granularity: Literal["module", "layer"] = option(
        "Give each module a rank of its own, or all modules of a layer the same.", group=ESTIMATE, default="module"
    )
    top_k: int = option(
        "How many of the strongest are listed.", group=ESTIMATE, default=16, within=Range(at_least=1, at_most=1000)
    )
    log_dir: Path | None = option("TensorBoard's folder for the heat map.", group=ESTIMATE, default=None)

    attention_type: Literal["both", "self", "cross"] = same_as(TrainConfig, "attention_type", group=BUDGET)
    target_modules: tuple[str, ...] = option(
        "Which projections are looked at; the last three are the MLP's.",
        group=BUDGET,
        default=TARGET_MODULES,
        choices=TARGET_MODULES,
    )
    rank: int = same_as(
        TrainConfig, "rank", group=BUDGET, help="Rank of the uniform adapter whose size is the budget.", ask="basic"
    )
    uniform_modules: tuple[str, ...] = option(
        "The projections of that uniform adapter.", group=BUDGET, default=TARGET_MODULES[:4], choices=TARGET_MODULES
    )
    parameters: int | None = option(
        "The budget in adapter parameters, in place of the uniform adapter's.",
        group=BUDGET,
        default=None,
        within=Range(at_least=1),
        shown_default="the uniform adapter's",
    )
    rank_min: int = option(
        "Smallest rank of a module that is not left out. Ranks are multiples of 8 where both bounds are.",
        group=BUDGET,
        default=8,
        within=Range(at_least=1, at_most=4096),
    )
    rank_max: int = option(
        "Largest rank of a module.", group=BUDGET, default=128, within=Range(at_least=1, at_most=4096)
    )
    save_directions: bool = option(
        "Keep the strongest input directions beside the map, for --rank-map-start.", group=BUDGET, default=False
    )

    recipe: Literal["fixed", "vanilla"] = option("The recipe of the run.", group=RUN, default="fixed")
    cfg_ratio: float | None = same_as(TrainConfig, "cfg_ratio", group=RUN)
    loss_weighting: Literal["none", "min_snr"] = same_as(TrainConfig, "loss_weighting", group=RUN)
    snr_gamma: float = same_as(TrainConfig, "snr_gamma", group=RUN)
    timestep_mode: Literal["auto", "continuous", "discrete"] = same_as(TrainConfig, "timestep_mode", group=RUN)
    shift: float | None = same_as(TrainConfig, "shift", group=RUN)
    chunk_duration: float = same_as(TrainConfig, "chunk_duration", group=RUN)
    val_split: float = same_as(TrainConfig, "val_split", group=RUN)

    verify: bool = option(
        "Train a uniform adapter, this map and EVA's at equal size, and compare them on held-out songs. "
        "Needs --val-split.",
        group="Proof",
        default=False,
    )
    verify_steps: int = option(
        "Optimizer steps of each of them.", group="Proof", default=100, within=Range(at_least=1), when=VERIFY
    )
    verify_runs: int = option(
        "How often each is trained, with another seed: one run's luck is not the map's merit.",
        group="Proof",
        default=3,
        within=Range(at_least=1, at_most=100),
        when=VERIFY,
    )
    learning_rate: float | None = same_as(TrainConfig, "learning_rate", group="Proof", when=VERIFY)
    alpha: float = same_as(TrainConfig, "alpha", group="Proof", when=VERIFY)
    gradient_accumulation: int = same_as(TrainConfig, "gradient_accumulation", group="Proof", when=VERIFY)


def check_estimate(config: EstimateConfig, given: Values) -> None:
    """Raise ConfigError for settings of `estimate` that cannot be meant together; `given` are those that were typed."""
    focus_range(config.timestep_focus)
    problems = []
    if config.output is not None and (wrong := what_is_wrong_with_map_file(config.output)):
        problems.append(wrong)
    if config.rank_min > config.rank_max:
        problems.append(f"--rank-min {config.rank_min} is larger than --rank-max {config.rank_max}.")
    outside = [name for name in config.uniform_modules if name not in config.target_modules]
    if outside:
        problems.append(
            f"--uniform-modules has {outside[0]}, which --target-modules leaves out: what the budget is taken from "
            "must be among what is looked at."
        )
    if config.verify and not config.val_split:
        problems.append("--verify needs --val-split: adapters are compared on songs that none was trained on.")
    if config.save_directions and config.method == "grad-norm":
        problems.append("--save-directions needs --method cross-fit or eva: a norm has no direction.")
    if 0 < config.chunk_duration < 1:
        problems.append("--chunk-duration takes 0 (whole songs) or at least 1 second.")
    problems += [
        f"{flag_of(name)} is no choice with --recipe {config.recipe}: it trains with {show_value(value)}."
        for name, value in RECIPE_PINS[config.recipe].items()
        if name in given and given[name] != value
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def what_is_wrong_with_map_file(path: Path) -> str:
    """Why a rank map cannot be written under this name; nothing when it can."""
    if path.is_dir():
        return f"--output {path} is a folder: name the file in it, for example {path / RANK_MAP_FILE}"
    if path.suffix.lower() != ".json":
        example = path.with_name(RANK_MAP_FILE)
        return (
            f"--output {path} does not end in .json: the picture and the directions lie beside the map under its name "
            f"with other endings. Name it {example}, for example."
        )
    return ""


def focus_range(text: str) -> tuple[float, float]:
    """Return the timesteps that `--timestep-focus` means: a name, or LO,HI; ConfigError for anything else."""
    if text in FOCUS:
        return FOCUS[text]
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = -1.0
    if not 0 <= low < high <= 1:
        raise ConfigError(
            f"--timestep-focus takes {', '.join(FOCUS)}, or two timesteps like 0.2,0.7; not {text}.",
            hint="Timesteps are numbers from 0 (music) to 1 (noise), the smaller one first.",
        )
    return low, high


def run_of(config: EstimateConfig) -> TrainConfig:
    """Return the settings of the run that an estimate is for, with a uniform adapter."""
    own = {setting.name for setting in settings_of(EstimateConfig)}
    shared = {
        setting.name: getattr(config, setting.name) for setting in settings_of(TrainConfig) if setting.name in own
    }
    return TrainConfig(**{**shared, "target_modules": config.uniform_modules, **RECIPE_PINS[config.recipe]})
