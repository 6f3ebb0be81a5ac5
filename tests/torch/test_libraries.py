"""What a start loads, and what it leaves alone."""

import json
import subprocess
import sys

from sidestep.commands.libraries import UNUSED

START = """
import json, sys
from sidestep.commands.libraries import load_libraries
load_libraries()
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
