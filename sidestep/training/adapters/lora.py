"""LoRA, rank-stabilised LoRA and DoRA, by PEFT.

The folder that is written loads at full strength in PEFT under the original names, in diffusers, ComfyUI and
acestep.cpp: the scale is folded into B and `lora_alpha` equals `r`, because most readers see only the tensors.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import Parameter, functional

from sidestep.config.runs import LORA_CONFIG
from sidestep.errors import ModelError
from sidestep.model.fused import Lora
from sidestep.model.names import to_diffusers, to_original
from sidestep.training.adapters.base import (
    diffusers_names,
    freeze,
    pattern_matches,
    target_suffixes,
    trained_parameters,
)
from sidestep.training.adapters.files import LORA_FILE, check_start, find_weights, read_weights, write_weights

PREFIX = "base_model.model."
NOT_FOR_DIFFUSERS = (
    "diffusers will not load this adapter: it looks for q_proj or k_proj, and neither is among the targets."
)
_RANK_AT = {"A.weight": 0, "B.weight": 1}  # A is [rank, in], B is [out, rank].


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraAdapter:
    """A LoRA or DoRA adapter on a decoder. `targets` are the suffixes by which PEFT finds its modules.

    Modules may have ranks and scales of their own. Other programs mis-scale such adapters, so what is written has the
    largest rank everywhere: smaller ones are padded with zeros, which changes nothing.
    """

    modules: Sequence[str]
    parameters: Mapping[str, Parameter]
    remarks: Sequence[str]
    targets: Sequence[str]
    ranks: Mapping[str, int]
    scalings: Mapping[str, float]
    dropout: float
    bias: str
    is_dora: bool

    @property
    def rank(self) -> int:
        """Return the one rank of the adapter that is written."""
        return max(self.ranks.values())

    def write(self, folder: Path, values: Mapping[str, Tensor], *, about: Mapping[str, str]) -> None:
        """Write adapter_config.json and adapter_model.safetensors, the scale folded into B, all of one rank."""
        tensors = {PREFIX + name: self._plain(name, value).contiguous() for name, value in values.items()}
        write_weights(folder / LORA_FILE, tensors, {"format": "pt", **about})
        config = {
            "peft_type": "LORA",
            "task_type": "FEATURE_EXTRACTION",
            "base_model_name_or_path": "",
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.rank,
            "lora_dropout": self.dropout,
            "target_modules": list(self.targets),
            "bias": self.bias,
            "use_dora": self.is_dora,
            "use_rslora": False,
        }
        (folder / LORA_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _plain(self, name: str, value: Tensor) -> Tensor:
        """Return a tensor as it is written: B times the module's scale, A and B padded to the common rank."""
        missing = self.rank - self.ranks.get(_module_of(name), self.rank)
        if name.endswith("lora_A.weight"):
            return functional.pad(value, (0, 0, 0, missing))
        if name.endswith("lora_B.weight"):
            return functional.pad(value * self.scalings[_module_of(name)], (0, missing))
        return value

    def read(self, path: Path) -> None:
        """Take over a PEFT adapter of the same or smaller ranks; its effect is the same whatever its alpha was.

        Ranks beyond those here are no obstacle where they are the zeros of padding.

        Modules that the adapter leaves alone keep their fresh, ineffective weights.
        """
        weights = find_weights(path, LORA_FILE)
        folder = weights.parent
        config, tensors = _read_config(folder), _read_tensors(weights)
        if bool(config.get("use_dora", False)) != self.is_dora:
            kind, choice = ("a LoRA, not a DoRA", "lora") if self.is_dora else ("a DoRA, not a LoRA", "dora")
            raise ModelError(f"{folder} holds {kind}.", hint=f"Set --adapter-type {choice}.")
        foreign = sorted(set(tensors) - set(self.parameters))
        if foreign:
            raise ModelError(
                f"{folder} holds {foreign[0]}, which this run does not train ({len(foreign)} such tensors).",
                hint="Set --target-modules, --attention-type and --bias as they were for that adapter. Where it was "
                "trained with a rank map, give that one: --rank-map FILE.",
            )
        touched = {_module_of(name) for name in tensors}
        missing = [name for name in self.parameters if _module_of(name) in touched and name not in tensors]
        if missing or not tensors:
            raise ModelError(f"{folder} is incomplete: {missing[0] if missing else 'every tensor'} is missing.")
        scales = {name: _scaling_in(config, name) for name in tensors}
        tensors = {name: self._unpadded(name, value) for name, value in tensors.items()}
        for name, value in tensors.items():
            self._check(name, value)
        with torch.no_grad():
            for name, value in tensors.items():
                self._take(name, value, scales[name] / self.scalings.get(_module_of(name), 1.0))

    def _unpadded(self, name: str, value: Tensor) -> Tensor:
        """Return the tensor without ranks beyond the module's own that hold nothing but zeros."""
        rank, rank_at = self.ranks.get(_module_of(name)), _RANK_AT.get(name.rsplit(".lora_", 1)[-1])
        if rank is None or rank_at is None or value.dim() != 2 or value.shape[rank_at] <= rank:
            return value
        kept, surplus = value.split([rank, value.shape[rank_at] - rank], dim=rank_at)
        return value if surplus.any() else kept

    def _check(self, name: str, value: Tensor) -> None:
        """Raise ModelError unless the tensor has its parameter's shape, but for a smaller rank."""
        wanted, rank_at = tuple(self.parameters[name].shape), _RANK_AT.get(name.rsplit(".lora_", 1)[-1])
        found = tuple(value.shape)
        if rank_at is not None and len(found) == 2 and found[rank_at] <= wanted[rank_at]:
            found = tuple(wanted[rank_at] if at == rank_at else size for at, size in enumerate(found))
        if found != wanted:
            raise ModelError(
                f"{name} is {list(value.shape)} in that adapter and {list(wanted)} here.",
                hint="Is its rank larger than --rank, or does it belong to another model?",
            )

    def _take(self, name: str, value: Tensor, scale: float) -> None:
        parameter = self.parameters[name]
        value = value.to(parameter)
        if name.endswith("lora_A.weight"):
            parameter[: value.shape[0]] = value
        elif name.endswith("lora_B.weight"):
            parameter.zero_()
            parameter[:, : value.shape[1]] = value * scale
        else:
            parameter.copy_(value)


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
    ranks: Mapping[str, int] | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> LoraAdapter:
    """Put LoRA on `modules` (original names) of a frozen decoder. B starts at zero, so nothing changes at first.

    `ranks` are modules' own ranks: each module's change is scaled by alpha / its rank (alpha / sqrt(rank) with
    `use_rslora`), so that a small rank does not learn more slowly than a large one. `start` are unit directions
    [rank, inputs] that a module's A starts from, at the length that it would have anyway.
    """
    freeze(decoder)
    ranks = {name: (ranks or {}).get(name, rank) for name in modules}
    config = LoraConfig(
        rank_pattern={to_diffusers(name): own for name, own in ranks.items() if own != rank},
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  PEFT divides it by r, whole or not.
        lora_dropout=dropout,
        target_modules=diffusers_names(modules),
        bias=bias,  # pyright: ignore[reportArgumentType]
        use_rslora=use_rslora,
        use_dora=use_dora,
    )
    targets = target_suffixes(modules, decoder)
    inject_adapter_in_model(config, decoder)
    trained = {_original_name(name): parameter for name, parameter in trained_parameters(decoder).items()}
    if use_dora:
        _set_magnitudes(decoder, modules)
    _start_from(start or {}, trained)
    return LoraAdapter(
        modules=tuple(modules),
        parameters=trained,
        remarks=_remarks(modules, trained, bias=bias, is_dora=use_dora),
        targets=targets,
        ranks=ranks,
        scalings={name: alpha / (own**0.5 if use_rslora else own) for name, own in ranks.items()},
        dropout=dropout,
        bias=bias,
        is_dora=use_dora,
    )


def diffusers_finds(modules: Iterable[str]) -> bool:
    """Say whether diffusers takes a file with the original's names of these modules for an adapter of its model."""
    return any(name.endswith(("q_proj", "k_proj")) for name in modules)


def ranks_in(values: Mapping[str, Tensor]) -> dict[str, int]:
    """Return each module's rank in the weights of a LoRA or DoRA."""
    return {_module_of(name): len(value) for name, value in values.items() if name.endswith("lora_A.weight")}


def plain_loras(adapter: LoraAdapter, decoder: nn.Module) -> dict[str, Lora]:
    """Return each module's LoRA by diffusers' name, where that is all there is: nothing for DoRA or trained biases."""
    count = sum(1 for name in adapter.parameters if name.endswith(("lora_A.weight", "lora_B.weight")))
    if adapter.is_dora or count < len(adapter.parameters):
        return {}
    return {
        to_diffusers(name): Lora(
            adapter.parameters[f"{name}.lora_A.weight"],
            adapter.parameters[f"{name}.lora_B.weight"],
            adapter.scalings[name],
            decoder.get_submodule(f"{to_diffusers(name)}.lora_dropout.default"),
        )
        for name in adapter.modules
    }


def _start_from(start: Mapping[str, Tensor], trained: Mapping[str, Parameter]) -> None:
    """Give A's first rows these directions. A's rows come from U(-1, 1) / sqrt(inputs), of length sqrt(1 / 3)."""
    with torch.no_grad():
        for name, directions in start.items():
            parameter = trained[f"{name}.lora_A.weight"]
            parameter[: len(directions)] = functional.normalize(directions.to(parameter), dim=1) / 3**0.5


def _set_magnitudes(decoder: nn.Module, modules: Sequence[str]) -> None:
    """Set DoRA's magnitudes to the row norms of the weights, in float32.

    PEFT computes them in the weights' own format: in bfloat16 the untrained adapter would change rows by up to 0.4 %.
    """
    for name in modules:
        base = decoder.get_submodule(f"{to_diffusers(name)}.base_layer")
        magnitude = decoder.get_parameter(f"{to_diffusers(name)}.lora_magnitude_vector.default.weight")
        magnitude.data = cast("nn.Linear", base).weight.detach().float().norm(dim=1)


def _remarks(modules: Sequence[str], trained: Mapping[str, Parameter], *, bias: str, is_dora: bool) -> list[str]:
    remarks = [] if diffusers_finds(modules) else [NOT_FOR_DIFFUSERS]
    if is_dora:
        remarks.append("ComfyUI and acestep.cpp ignore DoRA's magnitudes; ACE-Step's app, PEFT and diffusers use them.")
    biases = sum(name.endswith(".bias") for name in trained)
    if biases:
        remarks.append(
            f"{biases} biases of the model are trained too: PEFT and ACE-Step's app load them, ComfyUI and acestep.cpp "
            "leave them out, and diffusers refuses the adapter."
        )
    elif bias != "none":
        remarks.append(f"--bias {bias} has no effect: the adapted modules have no biases.")
    return remarks


def _original_name(name: str) -> str:
    """Turn `layers.0.self_attn.to_q.lora_A.default.weight` into `layers.0.self_attn.q_proj.lora_A.weight`."""
    bare = name.replace(".default", "").replace(".base_layer", "")
    return to_original(re.sub(r"lora_magnitude_vector\.weight$", "lora_magnitude_vector", bare))


def _module_of(name: str) -> str:
    return name.split(".lora_")[0]


def _read_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json; ModelError unless it describes a LoRA, with patterns that can be applied."""
    path = folder / LORA_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing: without it the adapter's strength is unknown.") from error
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}.") from error
    if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
        raise ModelError(f"{path} does not describe a LoRA.")
    check_start(path, config)
    patterns = {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    sizes = [config.get("r"), config.get("lora_alpha")]
    for pattern in patterns.values():
        sizes += pattern.values() if isinstance(pattern, dict) else [None]
    if not all(isinstance(size, int | float) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise ModelError(f"{path}: r, lora_alpha and their patterns must be numbers above 0.")
    return {**config, **patterns}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    tensors, _ = read_weights(path)
    return {to_original(name.removeprefix(PREFIX).removeprefix("decoder.")): value for name, value in tensors.items()}


def _scaling_in(config: Mapping[str, Any], name: str) -> float:
    """Return the scale PEFT applies to a tensor's module."""
    module = _module_of(name)
    rank = _pattern_value(config["rank_pattern"], module, config["r"])
    alpha = _pattern_value(config["alpha_pattern"], module, config["lora_alpha"])
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _pattern_value(patterns: Mapping[str, float], module: str, default: float) -> float:
    for pattern, value in patterns.items():
        try:
            is_match = pattern_matches(pattern, module)
        except re.error as error:
            raise ModelError(f"'{pattern}' in {LORA_CONFIG} is no pattern: {error}.") from error
        if is_match:
            return value
    return default
