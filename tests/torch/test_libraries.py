"""What a start loads, and what it leaves alone."""

import json
import subprocess
import sys
from dataclasses import replace
from threading import current_thread, main_thread

import pytest
import torch

from sidestep.commands import libraries
from sidestep.commands.libraries import UNUSED, load_libraries
from sidestep.errors import ConfigError
from sidestep.model import warm_up as module
from sidestep.model.capabilities import CAPABILITIES
from sidestep.model.warm_up import warm_up

START = """
import gc, json, sys
from sidestep.commands import libraries
from sidestep.commands.libraries import load_libraries
load_libraries()
assert gc.isenabled() and gc.get_freeze_count() > 100_000
import sidestep.listen.samples, sidestep.training.fit, sidestep.training.run, sidestep.ui.tensorboard
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(4, 4)))
loaded = sorted(sys.modules)
import bitsandbytes.optim
print(json.dumps(loaded))
"""


def test_training_starts_without_what_it_does_not_use_and_others_can_load_it_afterwards():
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert "peft.tuners.lora" in loaded and "transformers" in loaded
    assert UNUSED not in loaded


def test_what_is_done_meanwhile_is_over_when_the_libraries_are_there():
    done: list[bool] = []
    load_libraries(lambda: done.append(current_thread() is not main_thread()))
    assert done == [True]


def test_what_fails_meanwhile_is_left_to_the_run_to_tell(monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise ConfigError("--device cuda:7 is not available here.")

    told: list[str] = []
    monkeypatch.setattr(libraries.LOGGER, "info", lambda text, *values: told.append(text % values))
    load_libraries(fail)
    assert told == ["Not prepared: --device cuda:7 is not available here."]


@pytest.mark.parametrize("captures", [True, False])
def test_only_a_device_that_captures_is_warmed_up(captures: bool, monkeypatch: pytest.MonkeyPatch):
    played = replace(CAPABILITIES["cpu"], captures=captures)
    monkeypatch.setattr(module, "capabilities", lambda device: played)
    counted: list[torch.device] = []
    monkeypatch.setattr(module, "synchronize", counted.append)
    warm_up(torch.device("cpu"), "bf16")
    assert len(counted) == captures
