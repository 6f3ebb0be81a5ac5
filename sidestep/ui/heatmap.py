"""A rank map to look at: layers by projections in the terminal and as an image, the strongest modules, the budget."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.text import Text

from sidestep.config.adapter import TARGET_MODULES
from sidestep.config.rank_map import Captured, ModuleRank, Origin, RankMap
from sidestep.files import write_whole
from sidestep.ui.console import Console

ATTENTION, MLP = TARGET_MODULES[:4], TARGET_MODULES[4:]
COLUMNS = (
    *(f"self_attn.{name}" for name in ATTENTION),
    *(f"cross_attn.{name}" for name in ATTENTION),
    *(f"mlp.{name}" for name in MLP),
)
SHORT = {"self_attn": "self", "cross_attn": "cross", "mlp": "mlp"}
CELL = 6  # Terminal cells a column: five letters and a gap.
SCALE = 2  # Pixels of the image are doubled: text stays readable on fine screens.
BLOCK = 34
DARK, BRIGHT = (13, 8, 60), (252, 225, 90)
MIDDLE = (196, 60, 96)

Heat = tuple[int, int, int]


def show_rank_map(console: Console, rank_map: RankMap, captured: Captured | None, *, top: int) -> None:
    """Print the heat map of scores with ranks in it, the `top` strongest, and what the budget buys."""
    console.heading("Ranks by layer and projection (brighter: more to gain)")
    _grid(console, rank_map)
    strongest = sorted(rank_map.modules, key=lambda module: -module.score)[:top]
    total = sum(max(0.0, module.score) for module in rank_map.modules) or 1.0
    columns = ("module", "rank", "share", "95 % interval", "")
    console.table("Strongest", [_row(module, total, rank_map.origin) for module in strongest], columns)
    console.table("Budget", _budget(rank_map, captured))


def heat_image(rank_map: RankMap) -> NDArray[np.uint8]:
    """Draw the heat map as an image, [height, width, 3]."""
    cells = _cells(rank_map)
    layers = _layers(rank_map)
    left, top = 46 * SCALE, 62 * SCALE
    block = BLOCK * SCALE
    size = (left + len(COLUMNS) * block + 8 * SCALE, top + len(layers) * block // 2 + 30 * SCALE)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(10 * SCALE)
    draw.text((8 * SCALE, 6 * SCALE), _title(rank_map), fill="black", font=font)
    for place, column in enumerate(COLUMNS):
        part, projection = column.split(".")
        at = left + place * block + block // 2
        draw.text((at, top - 26 * SCALE), SHORT[part], fill="black", font=font, anchor="ms")
        draw.text((at, top - 8 * SCALE), projection.removesuffix("_proj"), fill="black", font=font, anchor="ms")
    for row, layer in enumerate(layers):
        y = top + row * block // 2
        draw.text((left - 8 * SCALE, y + block // 4), str(layer), fill="black", font=font, anchor="rm")
        for place, column in enumerate(COLUMNS):
            found = cells.get((layer, column))
            if found is None:
                continue
            module, heat = found
            box = (left + place * block + SCALE, y + SCALE, left + (place + 1) * block - SCALE, y + block // 2 - SCALE)
            draw.rectangle(box, fill=_colour(heat))
            ink = "black" if heat > 0.6 else "white"
            middle = ((box[0] + box[2]) // 2, (box[1] + box[3]) // 2)
            draw.text(middle, str(module.rank or "-"), fill=ink, font=font, anchor="mm")
    return np.asarray(image)


def write_heat_image(path: Path, image: NDArray[np.uint8]) -> None:
    """Write the image as PNG, in one move."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    write_whole(path, buffer.getvalue())


def _grid(console: Console, rank_map: RankMap) -> None:
    cells = _cells(rank_map)
    heads = [column.split(".") for column in COLUMNS]
    console.print("  layer " + "".join(f"{SHORT[part]:>{CELL}}" for part, _ in heads), wrap=False)
    console.print("        " + "".join(f"{name.removesuffix('_proj'):>{CELL}}" for _, name in heads), wrap=False)
    for layer in _layers(rank_map):
        line = Text(f"  {layer:>5} ")
        for column in COLUMNS:
            module, heat = cells.get((layer, column), (None, 0.0))
            shown = "" if module is None else str(module.rank or "-")
            red, green, blue = _colour(heat)
            ink = "black" if heat > 0.6 else "white"
            style = "" if module is None else f"{ink} on rgb({red},{green},{blue})"
            line.append(f"{shown:>{CELL}}", style=style)
        if console.is_plain:
            console.print(line.plain)
        else:
            console.rich.print(line, soft_wrap=True)


def _cells(rank_map: RankMap) -> Mapping[tuple[int, str], tuple[ModuleRank, float]]:
    """Return each module by layer and column, and its heat from 0 to 1: the root of its share of the highest score."""
    highest = max((module.score for module in rank_map.modules), default=0.0)
    cells = {}
    for module in rank_map.modules:
        _, layer, column = module.name.split(".", 2)
        heat = (max(0.0, module.score) / highest) ** 0.5 if highest > 0 else 0.0
        cells[int(layer), column] = (module, heat)
    return cells


def _layers(rank_map: RankMap) -> list[int]:
    return sorted({int(module.name.split(".")[1]) for module in rank_map.modules})


def _colour(heat: float) -> Heat:
    """Dark blue over red to yellow; brightness rises all the way, so that it reads without colour as well."""
    start, end, at = (DARK, MIDDLE, heat * 2) if heat < 0.5 else (MIDDLE, BRIGHT, heat * 2 - 1)
    red, green, blue = (round(a + (b - a) * at) for a, b in zip(start, end, strict=True))
    return red, green, blue


def _row(module: ModuleRank, total: float, origin: Origin) -> Sequence[str]:
    interval = (
        "" if module.low is None or module.high is None else f"{module.low / total:.1%} to {module.high / total:.1%}"
    )
    doubt = "not beyond chance" if origin.measures_gains and not module.stands_out else ""
    return module.name, str(module.rank), f"{module.score / total:.1%}", interval, doubt


def _budget(rank_map: RankMap, captured: Captured | None) -> list[tuple[str, str]]:
    budget, ranks = rank_map.budget, rank_map.ranks
    rows = [
        ("parameters", f"{budget.spent:,} of {budget.parameters:,}"),
        ("modules", f"{len(ranks)} of {len(rank_map.modules)}, ranks {min(ranks.values())} to {max(ranks.values())}"),
    ]
    if captured is not None:
        uniform = f"the uniform adapter of rank {captured.uniform_rank} {captured.by_uniform:.1%}"
        rows.append(("captures of what is usable", f"{captured.by_map:.1%}, {uniform}"))
    if budget.suggested_rank is not None:
        rank = f"{budget.suggested_rank}, on all {len(rank_map.modules)} modules"
        rows.append(("uniform rank for 90 % of what is usable", rank))
    if budget.suggested_parameters is not None:
        rows.append(("parameters for 90 % of what is usable", f"about {budget.suggested_parameters:,}"))
    origin = rank_map.origin
    sure = sum(bool(module.stands_out) for module in rank_map.modules)
    if origin.measures_gains:
        rows.append(("beyond chance", f"{sure} of {len(rank_map.modules)} modules, from {origin.draws} draws"))
    return rows


def _title(rank_map: RankMap) -> str:
    origin, budget = rank_map.origin, rank_map.budget
    return f"{origin.model_variant}, {origin.songs} songs, {origin.method}: {budget.spent / 1e6:.2f} M parameters"
