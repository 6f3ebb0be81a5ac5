"""For PEFT under the original's names: what ACE-Step's own app, PEFT itself and acestep.cpp load.

The scale is folded into B and `lora_alpha` equals `r`, so that readers that see only the tensors agree.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from sidestep.config.runs import LORA_CONFIG, LORA_FILE
from sidestep.exports.base import BaseWeights
from sidestep.exports.changes import LowRank
from sidestep.exports.target import Content, layer_change, loaded_layers
from sidestep.training.adapters.base import target_suffixes

PREFIX = "base_model.model."
_ADAPTER = "export"
_WRAPPED = ".base_layer."


class Peft:
    """A folder with adapter_config.json and adapter_model.safetensors."""

    forms: ClassVar[tuple[type, ...]] = (LowRank,)
    reads_biases: ClassVar[bool] = True

    def write(self, folder: Path, content: Content, base: BaseWeights) -> None:
        """Write the two files."""
        tensors = {f"{PREFIX}{_in_peft(name, content)}": value.contiguous() for name, value in content.biases.items()}
        for module, change in content.low_rank():
            tensors[f"{PREFIX}{module}.lora_A.weight"] = change.down
            tensors[f"{PREFIX}{module}.lora_B.weight"] = change.up
            if change.magnitude is not None:
                tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = change.magnitude
        save_file(tensors, folder / LORA_FILE, metadata={"format": "pt", **content.header})
        config = {
            "peft_type": "LORA",
            "task_type": "FEATURE_EXTRACTION",
            "base_model_name_or_path": "",
            "inference_mode": True,
            "r": content.rank,
            "lora_alpha": content.rank,
            "lora_dropout": 0.0,
            "target_modules": target_suffixes(list(content.changes), base.skeleton()),
            "bias": "all" if content.biases else "none",
            "use_dora": content.is_dora,
            "use_rslora": False,
        }
        (folder / LORA_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def read(self, folder: Path, base: BaseWeights) -> Iterator[tuple[str, Tensor]]:
        """Load the folder with PEFT onto a model that has the original's names."""
        skeleton = base.skeleton()
        PeftModel.from_pretrained(skeleton, str(folder), adapter_name=_ADAPTER, low_cpu_mem_usage=True)
        for module, layer in loaded_layers(skeleton, _ADAPTER):
            yield (module, layer_change(layer, _ADAPTER, module, base))
        for name, parameter in skeleton.named_parameters():
            if name.endswith(".bias") and not parameter.isnan().any():
                own = name.replace(_WRAPPED, ".")
                yield own, parameter.double() - base.tensor(own)


def _in_peft(bias: str, content: Content) -> str:
    """Return a bias's name in PEFT, which wraps the modules that it puts an adapter on."""
    module = bias.removesuffix(".bias")
    return f"{module}{_WRAPPED}bias" if module in content.changes else bias
