"""From songs to a rank map to an adapter of exactly these modules and ranks."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

from sidestep.config.rank_map import Captured, open_rank_map, read_rank_map, write_rank_map
from sidestep.config.runs import CHECKPOINTS, LORA_CONFIG
from sidestep.errors import ConfigError, DataError, ModelError
from sidestep.estimate.question import prepare as prepare_question
from sidestep.estimate.run import estimate
from sidestep.estimate.verify import verify
from sidestep.events import Event, Notice
from sidestep.model.checkpoint import Checkpoint
from sidestep.model.loading import load_decoder
from sidestep.training.directions import read_directions, write_directions
from tests.torch.estimating import FRAMES, config, run
from tests.torch.tiny import RUN_NAME, adapter_tensors, assert_identical, prepare, tiny_config, train, write_songs


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory, base: Checkpoint) -> Path:
    return write_songs(tmp_path_factory.mktemp("songs"), base, FRAMES)


@pytest.fixture(scope="module")
def rank_map(tmp_path_factory: pytest.TempPathFactory, songs: Path, base: Checkpoint) -> Path:
    """A map with its directions; some modules are left out of it."""
    settings = config(songs, estimate_batches=48)
    found = estimate(settings, checkpoint=base, version="0", emit=lambda event: None)
    path = tmp_path_factory.mktemp("map") / "rank_map.json"
    write_rank_map(path, found.rank_map)
    write_directions(path, found.directions)
    assert 0 < len(found.rank_map.ranks) < len(found.rank_map.modules)
    assert len(set(found.rank_map.ranks.values())) > 1
    return path


def test_the_same_seed_gives_the_same_file_and_another_one_another(tmp_path: Path, songs: Path, base: Checkpoint):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_rank_map(tmp_path / name, run(config(songs, seed=seed), base)[0])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def test_the_budget_is_the_uniform_adapters_and_is_kept(songs: Path, base: Checkpoint):
    rank_map, _ = run(config(songs, estimate_batches=48), base)
    costs = {module.name: module.cost for module in rank_map.modules}
    uniform = 4 * sum(cost for name, cost in costs.items() if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")))
    assert rank_map.budget.parameters == uniform
    assert uniform - min(costs.values()) < rank_map.budget.spent <= uniform
    assert run(config(songs, parameters=5000), base)[0].budget.spent <= 5000
    assert rank_map.budget.suggested_rank is not None and rank_map.budget.suggested_parameters is not None


def test_a_map_that_captures_less_than_the_uniform_adapter_is_said(songs: Path, base: Checkpoint):
    def warnings(**changes: Any) -> list[str]:
        _, events = run(config(songs, estimate_batches=48, **changes), base)
        return [event.text for event in events if isinstance(event, Notice) and event.level == "warning"]

    (said,) = warnings(rank=2, rank_min=8, rank_max=16)
    assert "than the uniform adapter of rank 2" in said and "its ranks are 8 to 16. Set a smaller --rank-min" in said
    assert "--rank-max" not in said and "--granularity" not in said
    assert warnings() == []


def test_one_draw_a_half_has_no_interval(songs: Path, base: Checkpoint):
    rank_map, _ = run(config(songs, estimate_batches=2), base)
    assert {(module.low, module.high) for module in rank_map.modules} == {(None, None)}
    assert all(module.low is not None for module in run(config(songs, estimate_batches=4), base)[0].modules)


@pytest.mark.parametrize("granularity", ["module", "layer"])
def test_what_the_map_captures_is_told_beside_the_uniform_adapter(granularity: str, songs: Path, base: Checkpoint):
    def captured(**changes: Any) -> Captured | None:
        settings = config(songs, granularity=granularity, estimate_batches=48, **changes)
        return estimate(settings, checkpoint=base, version="1", emit=lambda event: None).captured

    found, smaller = captured(), captured(rank=2)
    assert found and smaller
    assert (found.uniform_rank, smaller.uniform_rank) == (4, 2)
    assert 0 < smaller.by_uniform < found.by_uniform < 1
    assert smaller.by_map < found.by_map <= 1
    assert found.by_map > found.by_uniform
    assert captured(method="grad-norm") is None


def test_every_projection_of_every_block_is_looked_at(songs: Path, base: Checkpoint):
    rank_map, _ = run(config(songs), base)
    assert len(rank_map.modules) == 4 * 11
    some, _ = run(
        config(songs, attention_type="cross", target_modules=("q_proj", "down_proj"), uniform_modules=("q_proj",)), base
    )
    assert {module.name.split(".", 2)[2] for module in some.modules} == {"cross_attn.q_proj", "mlp.down_proj"}


def test_with_layers_as_the_grain_all_modules_of_a_layer_share_a_rank(songs: Path, base: Checkpoint):
    rank_map, _ = run(config(songs, granularity="layer", estimate_batches=48), base)
    by_layer: dict[str, set[int]] = {}
    for module in rank_map.modules:
        by_layer.setdefault(module.name.split(".")[1], set()).add(module.rank)
    assert all(len(ranks) == 1 for ranks in by_layer.values())


@pytest.mark.parametrize("method", ["eva", "grad-norm"])
def test_the_other_methods_write_the_same_kind_of_map(method: str, songs: Path, base: Checkpoint, tmp_path: Path):
    rank_map, _ = run(config(songs, method=method, rank_max=8), base)
    write_rank_map(tmp_path / "map.json", rank_map)
    read = read_rank_map(tmp_path / "map.json")
    assert read.origin.method == method
    assert {module.stands_out for module in read.modules} == {None}
    assert (read.budget.suggested_rank, read.budget.suggested_parameters) == (None, None)
    assert read.budget.spent <= read.budget.parameters
    assert run(config(songs, method=method, rank_max=8), base)[0] == rank_map


def test_the_focus_chooses_the_timesteps(songs: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    seen: list[float] = []
    from sidestep.estimate import question

    def spied(*arguments: Any, **named: Any):
        for songs_, task in tasks(*arguments, **named):
            seen.extend(task.timesteps_B.tolist())
            yield songs_, task

    tasks = question.tasks
    monkeypatch.setattr(question, "tasks", spied)
    run(config(songs, timestep_focus="texture"), base)
    assert len(seen) == 12 and max(seen) <= 0.4
    assert sorted(seen[:6]) == sorted(seen[6:])  # The same timesteps in both halves.
    assert len(set(seen[:6])) == 6


@pytest.mark.parametrize(("focus", "seen"), [("0,0.3", {0.3}), ("0.9,1", {0.9, 0.9545, 1.0}), ("0.5,0.6", {0.5})])
def test_the_focus_takes_in_the_timesteps_it_begins_and_ends_with(
    focus: str, seen: set[float], songs: Path, base: Checkpoint
):
    question = prepare_question(
        config(songs, timestep_focus=focus, timestep_mode="discrete", estimate_batches=24),
        checkpoint=base,
        emit=lambda event: None,
    )
    assert {round(asked.timestep, 4) for batch in question.first for asked in batch} == seen


def test_songs_that_are_held_out_are_not_looked_at(songs: Path, base: Checkpoint):
    _, events = run(config(songs, val_split=0.5, estimate_batches=24), base)
    names = {event.name for event in events if hasattr(event, "name")}
    assert len(names) == 3


def test_a_map_without_anything_that_stands_out_is_uniform_and_says_so(
    songs: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    from sidestep.estimate import methods

    genuine = methods.cross_fit

    def noise(values: Any, parts: Any, songs_: Any, *, seed: int) -> Any:
        signs = torch.randint(2, parts.shape, generator=torch.Generator().manual_seed(seed)).numpy() * 2 - 1
        return genuine(values, parts * signs, songs_, seed=seed)

    monkeypatch.setattr(methods, "cross_fit", noise)
    events: list[Event] = []
    found = estimate(config(songs), checkpoint=base, version="1", emit=events.append)
    rank_map = found.rank_map
    assert found.captured is None
    assert any(isinstance(event, Notice) and "Nothing stands out" in event.text for event in events)
    assert set(rank_map.ranks.values()) == {4}
    assert len(rank_map.ranks) == 4 * 8
    assert rank_map.budget.spent == rank_map.budget.parameters
    assert set(run(config(songs, rank_max=2), base)[0].ranks.values()) == {2}


def trained(rank_map: Path, songs: Path, base: Checkpoint, output: Path, **changes: Any):
    return train(tiny_config(rank_map=rank_map, **changes), base, songs, output)


def test_exactly_the_listed_modules_are_trained_and_saved(
    rank_map: Path, songs: Path, base: Checkpoint, tmp_path: Path
):
    result = trained(rank_map, songs, base, tmp_path / "out")
    wanted = read_rank_map(rank_map)
    assert dict.fromkeys(result.run.adapter.modules) == dict.fromkeys(wanted.ranks)
    sizes = sum(parameter.numel() for parameter in result.run.adapter.parameters.values())
    assert sizes == wanted.budget.spent
    saved = adapter_tensors(tmp_path / "out" / RUN_NAME)
    modules = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in saved}
    assert modules == set(wanted.ranks)
    assert max(losses := result.losses) < 100 and losses[-1] != losses[0]


def test_what_is_written_has_one_rank_and_the_same_effect(
    rank_map: Path, songs: Path, base: Checkpoint, tmp_path: Path
):
    result = trained(rank_map, songs, base, tmp_path / "out", dropout=0.0)
    folder = tmp_path / "out" / RUN_NAME
    about, saved = json.loads((folder / LORA_CONFIG).read_text()), adapter_tensors(folder)
    ranks = read_rank_map(rank_map).ranks
    uniform = max(ranks.values())
    assert about["r"] == about["lora_alpha"] == uniform
    assert "rank_pattern" not in about
    for name, rank in ranks.items():
        down = saved[f"base_model.model.{name}.lora_A.weight"]
        up = saved[f"base_model.model.{name}.lora_B.weight"]
        assert down.shape[0] == up.shape[1] == uniform
        own = result.weights
        effect = own[f"{name}.lora_B.weight"] @ own[f"{name}.lora_A.weight"] * (8.0 / rank)
        torch.testing.assert_close(up @ down, effect, rtol=1e-5, atol=1e-8)
        assert not down[rank:].any() and not up[:, rank:].any()


def test_peft_puts_the_written_adapter_on_these_modules_alone(
    rank_map: Path, songs: Path, base: Checkpoint, tmp_path: Path
):
    trained(rank_map, songs, base, tmp_path / "out")
    folder = tmp_path / "out" / RUN_NAME
    from sidestep.model.names import to_diffusers

    about = json.loads((folder / LORA_CONFIG).read_text())
    decoder = load_decoder(base, device=torch.device("cpu"), dtype=torch.float32)
    targets = [to_diffusers(name) for name in about["target_modules"]]
    inject_adapter_in_model(LoraConfig(r=about["r"], lora_alpha=about["lora_alpha"], target_modules=targets), decoder)
    saved = {
        to_diffusers(name.removeprefix("base_model.model.")): value for name, value in adapter_tensors(folder).items()
    }
    outcome = set_peft_model_state_dict(decoder, saved)
    assert not outcome.unexpected_keys
    assert get_peft_model_state_dict(decoder).keys() == saved.keys()


def test_a_run_with_a_map_resumes_bit_for_bit(rank_map: Path, songs: Path, base: Checkpoint, tmp_path: Path):
    settings = tiny_config(rank_map=rank_map, dropout=0.1)
    whole = train(settings, base, songs, tmp_path / "whole")
    train(settings, base, songs, tmp_path / "parts", stop_after=4)
    resumed = train(replace(settings, resume_from=tmp_path / "parts"), base, songs, tmp_path / "parts")
    assert_identical(resumed.weights, whole.weights)


def test_a_checkpoint_is_an_adapter_to_start_from(rank_map: Path, songs: Path, base: Checkpoint, tmp_path: Path):
    first = trained(rank_map, songs, base, tmp_path / "out")
    (checkpoint,) = (tmp_path / "out" / CHECKPOINTS).iterdir()
    second = prepare(tiny_config(rank_map=rank_map, init_from=checkpoint), base, songs, tmp_path / "more")
    assert_close(second.adapter.parameters, first.weights)


def assert_close(found: Any, wanted: Any) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].detach(), value, rtol=1e-5, atol=1e-8)


def test_an_adapter_of_larger_ranks_is_refused(rank_map: Path, songs: Path, base: Checkpoint, tmp_path: Path):
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    train(tiny_config(rank=12, target_modules=targets), base, songs, tmp_path / "uniform")
    with pytest.raises(ModelError):
        prepare(tiny_config(rank_map=rank_map, init_from=tmp_path / "uniform" / RUN_NAME), base, songs, tmp_path / "x")


def test_a_stale_or_foreign_map_is_refused(
    rank_map: Path, songs: Path, base: Checkpoint, turbo: Checkpoint, tmp_path: Path
):
    others = write_songs(tmp_path / "others", base, (*FRAMES, 40))
    with pytest.raises(DataError, match="made for other songs"):
        prepare(tiny_config(rank_map=rank_map), base, others, tmp_path / "out")
    with pytest.raises(DataError, match="made for another objective"):
        prepare(tiny_config(rank_map=rank_map, cfg_ratio=0.0), base, songs, tmp_path / "out")
    with pytest.raises(DataError, match="made for another objective"):
        prepare(tiny_config(rank_map=rank_map, timestep_mode="discrete"), base, songs, tmp_path / "out")
    foreign = read_rank_map(rank_map)
    write_rank_map(tmp_path / "foreign.json", replace(foreign, origin=replace(foreign.origin, model="sha256:other")))
    with pytest.raises(ModelError, match="made for another model"):
        prepare(tiny_config(rank_map=tmp_path / "foreign.json"), base, songs, tmp_path / "out")


def test_the_adapter_starts_from_the_strongest_input_directions(
    rank_map: Path, songs: Path, base: Checkpoint, tmp_path: Path
):
    result = prepare(tiny_config(rank_map=rank_map, rank_map_start=True), base, songs, tmp_path / "out")
    directions = read_directions(open_rank_map(rank_map))
    for name, rows in directions.items():
        start = result.adapter.parameters[f"{name}.lora_A.weight"].detach()
        torch.testing.assert_close(start, rows / rows.norm(dim=1, keepdim=True) / 3**0.5, rtol=1e-3, atol=1e-4)
        assert not result.adapter.parameters[f"{name}.lora_B.weight"].any()


@pytest.mark.parametrize("method", ["cross-fit", "eva"])
def test_every_map_with_directions_can_be_started_from(method: str, songs: Path, base: Checkpoint, tmp_path: Path):
    # More parameters than EVA has directions for, and ranks in eights.
    settings = config(songs, method=method, rank=2, rank_min=8, rank_max=24, parameters=40_000)
    found = estimate(settings, checkpoint=base, version="0", emit=lambda event: None)
    path = tmp_path / "map.json"
    write_rank_map(path, found.rank_map)
    write_directions(path, found.directions)
    fewer = [name for name, rank in found.rank_map.ranks.items() if len(found.directions.get(name, ())) < rank]
    assert bool(fewer) == (method == "eva")
    run = prepare(tiny_config(rank_map=path, rank_map_start=True), base, songs, tmp_path / "run")
    for name, rows in read_directions(open_rank_map(path)).items():
        weight = run.adapter.parameters[f"{name}.lora_A.weight"].detach()
        torch.testing.assert_close(weight[: len(rows)], torch.nn.functional.normalize(rows, dim=1) / 3**0.5)
        assert weight.abs().sum(1).min() > 0  # None of the others lies still.


def test_directions_of_another_map_are_refused(rank_map: Path, tmp_path: Path):
    copy = Path(shutil.copy(rank_map, tmp_path))
    with pytest.raises(DataError, match="There are no directions"):
        read_directions(open_rank_map(copy))
    shutil.copy(rank_map.with_suffix(".safetensors"), tmp_path)
    assert read_directions(open_rank_map(copy)).keys() == read_rank_map(copy).ranks.keys()
    # The same ranks of other draws: the directions are others too.
    old = read_rank_map(copy)
    write_rank_map(copy, replace(old, origin=replace(old.origin, seed=old.origin.seed + 1)))
    with pytest.raises(DataError, match="belongs to another rank map"):
        read_directions(open_rank_map(copy))


@pytest.mark.parametrize("parameters", [1500, 6000])
def test_a_budget_that_no_uniform_adapter_has_is_not_compared(parameters: int, songs: Path, base: Checkpoint):
    settings = config(songs, parameters=parameters, rank_min=1, verify=True, val_split=0.3)
    with pytest.raises(ConfigError, match="equal size") as caught:
        run(settings, base)
    told = int(caught.value.hint.split()[2].rstrip(","))
    rank_map, _ = run(replace(settings, parameters=told), base)
    assert rank_map.budget.parameters == told and told - rank_map.budget.spent < 96


def test_verify_trains_all_of_them_alike(rank_map: Path, songs: Path, base: Checkpoint):
    settings = config(
        songs, verify=True, verify_steps=3, verify_runs=2, val_split=0.34, rank_max=8, gradient_accumulation=1
    )
    results = verify(settings, rank_map, checkpoint=base, version="0", emit=lambda event: None)
    assert [one.name for one in results] == ["uniform", "cross-fit", "eva"]
    uniform = results[0]
    budget = read_rank_map(rank_map).budget
    assert uniform.parameters == budget.parameters
    assert all(one.parameters <= budget.parameters for one in results)
    assert len({one.before.mean for one in results}) == 1
    assert len({found.mean for one in results for found in one.after}) == 6
    assert uniform.gain_over(uniform) == (0.0, 0.0)
    assert all(one.error is not None and one.loss < 100 for one in results)


def test_a_quantized_base_is_measured_much_alike(songs: Path, base: Checkpoint):
    whole, quantized = (run(config(songs, quantize=bits), base)[0] for bits in ("none", "int8"))
    for first, second in zip(whole.modules, quantized.modules, strict=True):
        assert second.score == pytest.approx(first.score, rel=0.25, abs=1e-4), first.name


def test_batches_of_several_songs_measure_each_by_itself(songs: Path, base: Checkpoint):
    batched, _ = run(config(songs, batch_size=2, estimate_batches=6, chunk_duration=1.0), base)
    assert batched.origin.draws == 12
    assert all(module.low is not None and module.low <= module.high for module in batched.modules)
