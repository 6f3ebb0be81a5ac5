"""The moving average of the adapter's weights, beside the raw ones."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

from sidestep.events import AdapterSaved
from sidestep.model.checkpoint import Checkpoint
from sidestep.training.ema import Ema
from tests.torch.tiny import RUN_NAME, adapter_tensors, assert_identical, tiny_config, train, write_songs


def test_the_average_follows_the_weights_fast_at_first_and_then_at_its_decay():
    weight = Parameter(torch.zeros(2))
    ema = Ema.of({"w": weight}, decay=0.5, average=None)
    expected = 0.0
    for step in range(1, 30):
        weight.data.fill_(step)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert ema.values()["w"].tolist() == pytest.approx([expected] * 2)
    # At its decay of 0.5 the average is one step behind a weight that rises steadily.
    assert expected == pytest.approx(28, abs=1e-2)


def test_the_average_of_weights_that_stay_is_the_weights():
    weight = Parameter(torch.randn(7, generator=torch.Generator().manual_seed(1)))
    ema = Ema.of({"w": weight}, decay=0.999, average=None)
    for step in range(1, 100):
        ema.update(step)
    assert torch.equal(ema.values()["w"], weight)


def test_the_average_changes_nothing_in_training_and_is_saved_beside_the_raw_weights(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (40, 40, 40))
    config = tiny_config(epochs=3)
    raw = train(config, base, songs, tmp_path / "raw")
    averaged = train(replace(config, ema_decay=0.8), base, songs, tmp_path / "averaged")
    assert_identical(averaged.weights, raw.weights)
    assert_identical(adapter_tensors(tmp_path / "averaged" / RUN_NAME), adapter_tensors(tmp_path / "raw" / RUN_NAME))
    assert [event.kind for event in raw.all_of(AdapterSaved)] == ["final"]
    assert [event.kind for event in averaged.all_of(AdapterSaved)] == ["final", "ema"]
    ema = adapter_tensors(tmp_path / "averaged" / f"{RUN_NAME}_ema")
    final = adapter_tensors(tmp_path / "averaged" / RUN_NAME)
    assert ema.keys() == final.keys()
    # B starts at zero and grows, so its average lags behind.
    names = [name for name in ema if "lora_B" in name]
    assert sum(ema[n].norm() for n in names) < 0.99 * sum(final[n].norm() for n in names)


def test_the_average_is_the_one_its_rule_gives_over_a_run(tmp_path: Path, base: Checkpoint):
    songs = write_songs(tmp_path / "songs", base, (40, 40))
    config = tiny_config(epochs=2, ema_decay=0.3, scheduler_type="constant")
    name = "layers.0.self_attn.q_proj.lora_B.weight"
    expected = torch.zeros(())
    for step in range(1, 5):
        weight = train(replace(config, max_steps=step), base, songs, tmp_path / str(step)).weights[name]
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    trained = train(config, base, songs, tmp_path / "run")
    torch.testing.assert_close(trained.state["ema"][name], expected)
