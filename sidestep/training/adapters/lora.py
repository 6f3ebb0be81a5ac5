"""LoRA, rank-stabilised LoRA and DoRA, by PEFT.

The folder that is written loads at full strength in PEFT under the original names, in diffusers, ComfyUI and
acestep.cpp: the scale is folded into B and `lora_alpha` equals `r`, because most readers see only the tensors.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import Parameter

from sidestep.errors import ModelError
from sidestep.model.names import to_original
from sidestep.training.adapters.base import diffusers_names, freeze, target_suffixes, trained_parameters

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraAdapter:
    """A LoRA or DoRA adapter on a decoder."""

    modules: Sequence[str]
    parameters: Mapping[str, Parameter]
    rank: int
    scaling: float
    dropout: float
    bias: str
    is_dora: bool

    def write(self, folder: Path, values: Mapping[str, Tensor], *, about: Mapping[str, str]) -> None:
        """Write adapter_config.json and adapter_model.safetensors, the scale folded into B."""
        tensors = {
            PREFIX + name: (value * self.scaling if name.endswith("lora_B.weight") else value).contiguous()
            for name, value in values.items()
        }
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt", **about})
        config = {
            "peft_type": "LORA",
            "task_type": "FEATURE_EXTRACTION",
            "base_model_name_or_path": "",
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.rank,
            "lora_dropout": self.dropout,
            "target_modules": target_suffixes(self.modules),
            "bias": self.bias,
            "use_dora": self.is_dora,
            "use_rslora": False,
        }
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def read(self, path: Path) -> None:
        """Take over a PEFT adapter of the same or a smaller rank; its effect is the same whatever its alpha was."""
        folder = _adapter_folder(path)
        config, tensors = _read_config(folder), _read_tensors(folder)
        if bool(config.get("use_dora", False)) != self.is_dora:
            raise ModelError(f"{folder} is {'a DoRA' if not self.is_dora else 'no DoRA'} adapter.")
        foreign = sorted(set(tensors) - set(self.parameters))
        if foreign:
            raise ModelError(
                f"{folder} adapts {foreign[0]}, which this run does not ({len(foreign)} such tensors).",
                hint="Set --target-modules, --attention-type and --bias as they were for that adapter.",
            )
        if not tensors:
            raise ModelError(f"{folder} holds no LoRA tensors.")
        with torch.no_grad():
            for name, value in tensors.items():
                self._take(name, value, _scaling_in(config, name) / self.scaling)

    def _take(self, name: str, value: Tensor, scale: float) -> None:
        parameter = self.parameters[name]
        value = value.to(parameter)
        if name.endswith("lora_A.weight") and value.shape[0] <= self.rank and value.shape[1:] == parameter.shape[1:]:
            parameter[: value.shape[0]] = value
        elif name.endswith("lora_B.weight") and value.shape[1] <= self.rank and value.shape[:1] == parameter.shape[:1]:
            parameter.zero_()
            parameter[:, : value.shape[1]] = value * scale
        elif value.shape == parameter.shape:
            parameter.copy_(value)
        else:
            raise ModelError(
                f"{name} is {list(value.shape)} in that adapter and {list(parameter.shape)} here.",
                hint="Is its rank larger than --rank, or does it belong to another model?",
            )


def attach_lora(
    decoder: nn.Module,
    modules: Sequence[str],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    bias: str = "none",
    use_rslora: bool = False,
    use_dora: bool = False,
) -> LoraAdapter:
    """Put LoRA on `modules` (original names) of a frozen decoder. B starts at zero, so nothing changes at first."""
    freeze(decoder)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  PEFT divides it by r, whole or not.
        lora_dropout=dropout,
        target_modules=diffusers_names(modules),
        bias=bias,  # pyright: ignore[reportArgumentType]
        use_rslora=use_rslora,
        use_dora=use_dora,
    )
    inject_adapter_in_model(config, decoder)
    trained = {_original_name(name): parameter for name, parameter in trained_parameters(decoder).items()}
    return LoraAdapter(
        modules=tuple(modules),
        parameters=trained,
        rank=rank,
        scaling=alpha / rank**0.5 if use_rslora else alpha / rank,
        dropout=dropout,
        bias=bias,
        is_dora=use_dora,
    )


def _original_name(name: str) -> str:
    """Turn `layers.0.self_attn.to_q.lora_A.default.weight` into `layers.0.self_attn.q_proj.lora_A.weight`."""
    bare = name.replace(".default", "").replace(".base_layer", "")
    return to_original(re.sub(r"lora_magnitude_vector\.weight$", "lora_magnitude_vector", bare))


def _adapter_folder(path: Path) -> Path:
    """Return the folder with the adapter's files: ours and Side-Step's are flat, the official trainer's in adapter/."""
    for folder in (path, path / "adapter", path.parent):
        if (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file():
            return folder
    raise ModelError(f"There is no LoRA adapter in {path}.", hint=f"It needs {CONFIG_FILE} and {WEIGHTS_FILE}.")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / CONFIG_FILE} is not valid JSON: {error}.") from error
    if not isinstance(config, dict) or not {"r", "lora_alpha"} <= config.keys():
        raise ModelError(f"{folder / CONFIG_FILE} does not describe a LoRA: r and lora_alpha are missing.")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    try:
        stored = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / WEIGHTS_FILE} is damaged: {error}.") from error
    return {to_original(name.removeprefix(PREFIX).removeprefix("decoder.")): value for name, value in stored.items()}


def _scaling_in(config: Mapping[str, Any], name: str) -> float:
    """Return the scale PEFT applies to a tensor's module; patterns match the end of its name."""
    module = name.split(".lora_")[0]
    rank = _pattern_value(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _pattern_value(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
