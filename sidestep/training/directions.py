"""The strongest input directions of a rank map, in a safetensors file beside it: where lora_A may start."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sidestep.config.rank_map import AGAIN, directions_file
from sidestep.errors import DataError
from sidestep.files import write_whole


def write_directions(rank_map: Path, directions: Mapping[str, Tensor]) -> None:
    """Write the directions [rank, inputs] of each module beside the map, in one move."""
    content = save({name: value.half().contiguous() for name, value in directions.items()})
    write_whole(directions_file(rank_map), content)


def read_directions(rank_map: Path, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """Read the directions of these modules, unit rows in float32; DataError unless all are there at these ranks."""
    path = directions_file(rank_map)
    try:
        found = load(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"There are no directions beside {rank_map.name}: {path} is missing.",
            hint="Make the map with --save-directions, or leave out --rank-map-start.",
        ) from error
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is damaged: {error}.", hint=AGAIN) from error
    if {name: value.shape[0] for name, value in found.items()} != dict(ranks):
        raise DataError(f"{path} belongs to another rank map.", hint=AGAIN)
    return {name: value.float() for name, value in found.items()}
