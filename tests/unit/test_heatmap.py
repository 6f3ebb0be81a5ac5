"""A rank map to look at: in the terminal, and as an image."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from sidestep.config.rank_map import Captured, RankMap
from sidestep.ui.console import Console
from sidestep.ui.heatmap import heat_image, show_rank_map, write_heat_image
from tests.unit.test_rank_map import a_map


def shown(rank_map: RankMap | None = None, captured: Captured | None = None, *, top: int = 2) -> str:
    stream = io.StringIO()
    show_rank_map(Console(stream, is_plain=True), rank_map or a_map(), captured, top=top)
    return stream.getvalue()


def test_the_grid_has_a_line_a_layer_and_a_rank_or_a_dash_a_module():
    lines = shown().splitlines()
    row = next(line for line in lines if line.strip().startswith("0 "))
    assert row.split() == ["0", "8", "-", "16"]
    assert row.index("16") > row.index("-") > row.index("8")


def test_the_strongest_come_first_with_their_share_and_how_sure_it_is():
    lines = shown().splitlines()
    at = next(place for place, line in enumerate(lines) if "layers.0.mlp.down_proj" in line)
    assert "85.7%" in lines[at]
    assert "layers.0.self_attn.q_proj" in lines[at + 1]
    assert "4.3% to 25.7%" in lines[at + 1]
    assert "layers.0.self_attn.k_proj" not in shown()


def test_doubt_is_told_where_the_method_tests_against_chance_and_nowhere_else():
    tested = a_map()
    assert shown(tested, top=3).count("not beyond chance") == 1
    assert "2 of 3 modules, from 128 draws" in shown(tested)
    for stands_out in (None, False):  # Older maps say False where nothing was tested.
        modules = tuple(replace(module, stands_out=stands_out) for module in tested.modules)
        untested = replace(tested, modules=modules, origin=replace(tested.origin, method="grad-norm"))
        assert "4.3% to 25.7%" in shown(untested)
        assert "beyond chance" not in shown(untested, top=3)


def test_the_budget_is_told_to_the_parameter():
    assert "3,072 of 4,000" in shown()
    assert "2 of 3, ranks 8 to 16" in shown()


def test_what_the_budget_buys_stands_beside_what_a_uniform_adapter_would_capture():
    captured = Captured(by_map=0.5, by_uniform=0.25, uniform_rank=4)
    assert "50.0%, the uniform adapter of rank 4 25.0%" in shown(captured=captured)
    assert "captures" not in shown()


def test_the_image_is_brighter_where_there_is_more_to_gain(tmp_path: Path):
    image = heat_image(a_map())
    write_heat_image(tmp_path / "map.png", image)
    read = np.asarray(Image.open(tmp_path / "map.png"))
    assert read.shape == image.shape == (*image.shape[:2], 3)
    colours = {tuple(colour) for colour in read.reshape(-1, 3)}
    assert (252, 225, 90) in colours  # The strongest.
    assert (13, 8, 60) in colours  # The one with nothing to gain.
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]
