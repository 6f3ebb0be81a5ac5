"""The optimizers, and that every registry offers what the settings declare."""

import importlib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch.nn import Parameter

from sidestep.config.shell import INSTALLER
from sidestep.config.train import TrainConfig
from sidestep.errors import ConfigError
from sidestep.events import Metrics, Notice
from sidestep.model.checkpoint import Checkpoint
from sidestep.training.adapters import ADAPTERS
from sidestep.training.optimizers import OPTIMIZERS
from sidestep.training.schedules import SCHEDULES
from sidestep.training.timesteps import SAMPLERS
from tests.torch.tiny import prepare, tiny_config, train, write_songs


def declared(setting: str) -> set[str]:
    """Give the choices that a setting declares."""
    kind = get_type_hints(TrainConfig)[setting]
    assert get_origin(kind) is Literal
    return set(get_args(kind))


def test_every_registry_offers_exactly_what_its_setting_declares():
    assert set(ADAPTERS) == declared("adapter_type")
    assert set(OPTIMIZERS) == declared("optimizer_type")
    assert set(SCHEDULES) == declared("scheduler_type")
    assert set(SAMPLERS) == declared("timestep_mode") - {"auto"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_a_song(tmp_path: Path, base: Checkpoint, name: str):
    songs = write_songs(tmp_path / "songs", base, (30,))
    # Prodigy begins with steps of a millionth and finds their size by itself.
    rate, epochs = (None, 80) if name == "prodigy" else (0.02, 25)
    config = tiny_config(
        optimizer_type=name,
        learning_rate=rate,
        rank=16,
        epochs=epochs,
        batch_size=4,
        dataset_repeats=4,
        timestep_mode="discrete",
        cfg_ratio=0.0,
    )
    losses = train(config, base, songs, tmp_path / "run").losses
    # Fresh noise every step: means of five are compared, not single losses.
    assert sum(losses[-5:]) < 0.93 * sum(losses[:5])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_given_the_weight_decay(tmp_path: Path, base: Checkpoint, name: str):
    songs = write_songs(tmp_path / "songs", base, (30,))
    run = prepare(tiny_config(optimizer_type=name, weight_decay=0.03), base, songs, tmp_path / "run")
    assert [group["weight_decay"] for group in run.stepper.optimizer.param_groups] == [0.03]


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor"])
def test_weight_decay_pulls_a_weight_that_has_no_gradient_towards_zero(tmp_path: Path, base: Checkpoint, name: str):
    songs = write_songs(tmp_path / "songs", base, (30,))
    moved: list[float] = []
    for decay in (0.0, 0.5):
        config = tiny_config(optimizer_type=name, weight_decay=decay, attention_type="self", learning_rate=0.1)
        run = prepare(config, base, songs, tmp_path / "run")
        parameter: Parameter = next(p for n, p in run.adapter.parameters.items() if "lora_A" in n)
        before = parameter.detach().clone()
        for group in run.stepper.optimizer.param_groups:
            group["lr"] = 0.1
        for each in run.adapter.parameters.values():
            each.grad = torch.zeros_like(each)
        run.stepper.optimizer.step()
        moved.append((parameter.norm() / before.norm()).item())
    assert moved == pytest.approx([1, 0.95], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"adapter_type": "dora"}, "lora_magnitude_vector"),
        ({"adapter_type": "lokr", "lokr_weight_decompose": True, "lokr_use_scalar": True}, ("dora_scale", "scalar")),
        ({"bias": "all"}, "bias"),
    ],
    ids=["dora", "lokr", "biases"],
)
def test_magnitudes_scalars_and_biases_are_not_decayed(
    tmp_path: Path, base: Checkpoint, changes: dict[str, Any], kept: str | tuple[str, ...]
):
    songs = write_songs(tmp_path / "songs", base, (30,))
    run = prepare(tiny_config(weight_decay=0.03, **changes), base, songs, tmp_path / "run")
    decay = {id(p): group["weight_decay"] for group in run.stepper.optimizer.param_groups for p in group["params"]}
    found = {name: decay[id(parameter)] for name, parameter in run.adapter.parameters.items()}
    assert found == {name: 0.0 if name.endswith(kept) else 0.03 for name in found}
    assert set(found.values()) == {0.0, 0.03}


def test_prodigy_paces_itself_and_says_so(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (30, 30))
    config = tiny_config(optimizer_type="prodigy", learning_rate=None, warmup_steps=3, scheduler_type="cosine")
    trained = train(config, base, songs, tmp_path / "run")
    assert [event.lr for event in trained.all_of(Metrics)] == [1.0] * 4
    assert "prodigy sets its own pace: the schedule is constant." in [event.text for event in trained.all_of(Notice)]


def test_prodigy_with_the_learning_rate_of_another_optimizer_is_warned_of(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (30,))
    texts: list[list[str]] = []
    for lr in (1e-4, 0.5, None):
        events: list[object] = []
        config = tiny_config(optimizer_type="prodigy", learning_rate=lr)
        prepare(config, base, songs, tmp_path / "run", emit=events.append)
        texts.append([e.text for e in events if isinstance(e, Notice) and e.level == "warning"])
    assert texts == [
        [
            "Prodigy finds the step size itself and multiplies it by --lr: with 0.0001 the adapter hardly learns. "
            "Usual is 1."
        ],
        [],
        [],
    ]


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("adamw8bit", "bitsandbytes", "bitsandbytes"),
        ("adafactor", "transformers.optimization", "transformers"),
        ("prodigy", "prodigyopt", "prodigyopt"),
    ],
)
def test_a_missing_package_is_an_error_with_the_remedy_and_never_another_optimizer(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch, name: str, module: str, package: str
):
    load = importlib.import_module

    def without(wanted: str, *more: Any) -> Any:
        if wanted == module:
            raise ImportError(f"No module named {wanted!r}")
        return load(wanted, *more)

    monkeypatch.setattr(importlib, "import_module", without)
    songs = write_songs(tmp_path / "songs", base, (30,))
    with pytest.raises(ConfigError, match=f"{name} needs the package {package}") as caught:
        prepare(tiny_config(optimizer_type=name), base, songs, tmp_path / "run")
    assert INSTALLER in caught.value.hint
    assert "--optimizer-type adamw" in caught.value.hint


def test_a_shift_that_a_continuous_model_has_no_use_for_is_said(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (30,))
    texts: list[list[str]] = []
    for mode in ("auto", "discrete"):
        events: list[object] = []
        prepare(tiny_config(shift=2.0, timestep_mode=mode), base, songs, tmp_path / "run", emit=events.append)
        texts.append([e.text for e in events if isinstance(e, Notice) and "--shift" in e.text])
    assert texts == [["--shift has no effect here: base trains on continuous timesteps."], []]
