"""rank_map.json: which modules get an adapter and of which rank, as `estimate` found and `--rank-map` takes it.

The file says which model, songs and objective it was made for; a map that was made for others is refused. It holds no
time and no path: the same estimate writes the same bytes.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

from sidestep.config.recipe import Recipe
from sidestep.config.shell import shell_line, start_words
from sidestep.errors import DataError, ModelError
from sidestep.files import write_whole

RANK_MAP_FILE = "rank_map.json"
RANK_MAP_FORMAT = 1
DIRECTIONS_SUFFIX = ".safetensors"
MAP_LIMIT = 10_000_000  # bytes; XL has 352 modules at 300 bytes each
MAX_RANK = 4096
ORIGIN_WORDS = ("model_variant", "model", "dataset", "recipe", "objective", "method")
MEASURES_GAINS = ("cross-fit",)  # Methods that measure what ranks gain and test it; the others only order modules.
_ESTIMATE = shell_line([*start_words(), "estimate"])
AGAIN = f"Make it anew: {_ESTIMATE} with the same --model-variant and --dataset-dir as this run."


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRank:
    """One module: `rank` (0 excludes it), the parameters a rank costs (in + out), and what was measured.

    `score` is what the method ranks by, `low` and `high` its 95 % interval over songs (None where the method has none).
    `stands_out`: the score is beyond chance, also among so many modules; None where the method does not test it.
    `gradient_norm` is the mean over draws.
    """

    name: str
    rank: int
    cost: int
    score: float
    low: float | None = None
    high: float | None = None
    stands_out: bool | None = None
    gradient_norm: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a map was made for and how. The fingerprints decide whether it fits a run; the rest is for people."""

    sidestep_version: str
    method: str
    granularity: str
    seed: int
    draws: int
    songs: int
    timestep_range: tuple[float, float]
    model_variant: str
    model: str
    dataset: str
    recipe: str
    objective: str

    @property
    def measures_gains(self) -> bool:
        """Return whether the method measured gains and held them against chance."""
        return self.method in MEASURES_GAINS


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The parameters a map may spend and does spend, and the bounds of its ranks.

    `suggested_rank` and `suggested_parameters`: the smallest uniform rank, and the smallest size of a map, that capture
    90 % of the usable signal; None where nothing usable was found, or the method does not measure it.
    """

    parameters: int
    spent: int
    rank_min: int
    rank_max: int
    suggested_rank: int | None = None
    suggested_parameters: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """Which share of the usable signal, from 0 to 1, a map captures, and a uniform adapter of the budget's size."""

    by_map: float
    by_uniform: float
    uniform_rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMap:
    """All modules that were looked at, in the model's order."""

    origin: Origin
    budget: Budget
    modules: tuple[ModuleRank, ...]

    @property
    def ranks(self) -> dict[str, int]:
        """Return the modules that get an adapter, and its rank."""
        return {module.name: module.rank for module in self.modules if module.rank}

    def check_fits(self, *, model: str, dataset: str, recipe: str, source: Path) -> None:
        """Refuse a map that was made for another model, other songs or another objective."""
        if self.origin.model != model:
            raise ModelError(f"{source} was made for another model ({self.origin.model_variant}).", hint=AGAIN)
        if self.origin.dataset != dataset:
            raise DataError(
                f"{source} was made for other songs ({self.origin.songs} of them), or they changed since.", hint=AGAIN
            )
        if self.origin.recipe != recipe:
            raise DataError(
                f"{source} was made for another objective ({self.origin.objective}).",
                hint=f"{AGAIN} Give it this run's --recipe, --timestep-mode, --shift, --cfg-ratio, --loss-weighting "
                "and --snr-gamma as well.",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MapFile:
    """A rank map as it lies on disk: its file, the bytes that were read, and what they say."""

    path: Path
    content: bytes
    rank_map: RankMap


def recipe_fingerprint(recipe: Recipe) -> str:
    """Identify an objective by its numbers; two recipes that train alike have the same."""
    numbers = {name: value for name, value in asdict(recipe).items() if name != "name"}
    if recipe.timestep_mode != "discrete":
        del numbers["shift"]
    if recipe.loss_weighting == "none":
        del numbers["snr_gamma"]
    return f"sha256:{hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()}"


def write_rank_map(path: Path, rank_map: RankMap) -> None:
    """Write a map in one move; the same map gives the same bytes."""
    content = {"format_version": RANK_MAP_FORMAT, **asdict(rank_map)}
    write_whole(path, json.dumps(_rounded(content), indent=1, allow_nan=False) + "\n")


def read_rank_map(path: Path) -> RankMap:
    """Read a map; DataError when it is missing, damaged, of another format or self-contradictory."""
    return open_rank_map(path).rank_map


def open_rank_map(path: Path) -> MapFile:
    """Read a map and keep its bytes; a folder stands for the rank_map.json in it. Errors are those of reading."""
    if path.is_dir():
        path = path / RANK_MAP_FILE
    if not path.is_file():
        raise DataError(f"There is no rank map {path}.", hint=f"Make it: {_ESTIMATE} --dataset-dir TENSORS")
    if path.stat().st_size > MAP_LIMIT:
        raise DataError(f"{path} is too large to be a rank map.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    return MapFile(path=path, content=content, rank_map=_parsed(content, path))


def _parsed(data: bytes, path: Path) -> RankMap:
    content = _object(data, path)
    if "format_version" not in content:
        raise DataError(f"{path} is no rank map.", hint=AGAIN)
    if content["format_version"] != RANK_MAP_FORMAT:
        raise DataError(
            f"{path} has format {content['format_version']}; this Side-Step reads {RANK_MAP_FORMAT}.", hint=AGAIN
        )
    try:
        rank_map = RankMap(
            origin=_origin(content["origin"]),
            budget=Budget(**content["budget"]),
            modules=tuple(ModuleRank(**module) for module in content["modules"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a rank map: {error}.", hint=AGAIN) from error
    _check(rank_map, path)
    return rank_map


def check_modules(rank_map: MapFile, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a map with modules, costs or ranks that the model does not have: it was changed by hand.

    `shapes` are (outputs, inputs) of every module that can have an adapter.
    """
    for module in rank_map.rank_map.modules:
        if module.name not in shapes:
            raise DataError(f"{rank_map.path} names {module.name}, which is no module that can be trained.", hint=AGAIN)
        shape = shapes[module.name]
        if module.cost != sum(shape):
            raise DataError(
                f"{rank_map.path} says that a rank of {module.name} costs {module.cost} parameters, not {sum(shape)}.",
                hint=AGAIN,
            )
        if module.rank > min(shape):
            raise DataError(
                f"{rank_map.path} gives {module.name} the rank {module.rank}; its weight has {min(shape)} at most.",
                hint=AGAIN,
            )


def kept_map(settings: Mapping[str, Any], run: Path) -> Path | None:
    """Return where the rank map of a run lies, by the settings in its config.json.

    A run keeps its map in its own folder, which is `run` now; one of an earlier Side-Step says where it was.
    """
    if settings.get("rank_map") is None:
        return None
    path, kept = Path(settings["rank_map"]), run / RANK_MAP_FILE
    is_its_own = settings.get("output_dir") is not None and path == Path(settings["output_dir"]) / RANK_MAP_FILE
    return kept if is_its_own and kept.is_file() else path


def directions_file(path: Path) -> Path:
    """Return where the input directions of a map lie: beside it."""
    return path.with_suffix(DIRECTIONS_SUFFIX)


def _object(data: bytes, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}.", hint=AGAIN) from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a rank map.", hint=AGAIN)
    return content


def _origin(content: Mapping[str, Any]) -> Origin:
    low, high = content["timestep_range"]
    return Origin(**{**content, "timestep_range": (low, high)})


def _check(rank_map: RankMap, path: Path) -> None:
    modules, budget = rank_map.modules, rank_map.budget
    good = (
        all(_is_good(module) for module in modules)
        and len({module.name for module in modules}) == len(modules)
        and all(isinstance(getattr(rank_map.origin, key), str) for key in ORIGIN_WORDS)
        and all(_is_whole(value) for value in (budget.parameters, budget.spent, budget.rank_min, budget.rank_max))
        and all(value is None or _is_whole(value) for value in (budget.suggested_rank, budget.suggested_parameters))
        and sum(module.rank * module.cost for module in modules) == budget.spent <= budget.parameters
    )
    if not good:
        raise DataError(f"{path} contradicts itself: it was changed by hand or damaged.", hint=AGAIN)
    if not rank_map.ranks:
        raise DataError(f"{path} leaves no module to train.", hint=AGAIN)


def _is_good(module: ModuleRank) -> bool:
    return (
        isinstance(module.name, str)
        and _is_whole(module.rank)
        and 0 <= module.rank <= MAX_RANK
        and _is_whole(module.cost)
        and module.cost > 0
        and (module.stands_out is None or isinstance(module.stands_out, bool))
        and _is_number(module.score)
        and all(value is None or _is_number(value) for value in (module.low, module.high, module.gradient_norm))
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _rounded(value: Any) -> Any:
    """Round numbers to eight digits: the last ones of a sum depend on the machine, not on the music."""
    match value:
        case float() if math.isfinite(value):
            return float(f"{value:.8g}")
        case dict():
            return {key: _rounded(item) for key, item in value.items()}
        case list() | tuple():
            return [_rounded(item) for item in value]
        case _:
            return value
