"""The strongest input directions of a rank map, in a safetensors file beside it: where lora_A may start."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sidestep.config.rank_map import AGAIN, MapFile, directions_file
from sidestep.errors import DataError
from sidestep.files import write_whole

MAP_KEY = "rank_map"  # In the file's header: the checksum of the map that the directions were written for.


def write_directions(rank_map: Path, directions: Mapping[str, Tensor]) -> None:
    """Write the directions [rank, inputs] of each module beside the map, which is there already, in one move."""
    tensors = {name: value.half().contiguous() for name, value in directions.items()}
    content = save(tensors, {MAP_KEY: _checksum(rank_map.read_bytes())})
    write_whole(directions_file(rank_map), content)


def read_directions(rank_map: MapFile) -> dict[str, Tensor]:
    """Read the directions of a map's modules, unit rows in float32; DataError unless they were written for it.

    A module has no more rows than its rank; it may have fewer, or none.
    """
    path = directions_file(rank_map.path)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            found = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise DataError(
            f"There are no directions beside {rank_map.path.name}: {path} is missing.",
            hint="Make the map with --save-directions, or leave out --rank-map-start.",
        ) from error
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is damaged: {error}.", hint=AGAIN) from error
    ranks = rank_map.rank_map.ranks
    fits = all(len(value) <= ranks.get(name, 0) for name, value in found.items())
    if header.get(MAP_KEY) != _checksum(rank_map.content) or not fits:
        raise DataError(f"{path} belongs to another rank map.", hint=f"{AGAIN} Add --save-directions.")
    return found


def copy_directions(rank_map: Path, target: Path) -> None:
    """Put the directions of a map beside its copy `target`; DataError when they are gone."""
    source = directions_file(rank_map)
    try:
        content = source.read_bytes()
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror}.") from error
    write_whole(directions_file(target), content)


def _checksum(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
