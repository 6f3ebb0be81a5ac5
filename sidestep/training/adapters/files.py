"""Finds and reads the weights files of adapters, ours and other trainers'."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sidestep.config.runs import COPY_AGAIN, LOHA_FILE, LOKR_FILE, LORA_CONFIG, LORA_FILE, final_of_run
from sidestep.errors import ModelError

_KINDS = {LORA_FILE: ("LoRA", "lora (or dora)"), LOKR_FILE: ("LoKr", "lokr"), LOHA_FILE: ("LoHa", "loha")}


# Ways to start a LoRA for which PEFT takes something out of the model's weights, and again each time it loads one.
_STARTS_IN_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")


def write_weights(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a safetensors file; the same tensors and header give the same bytes.

    The library writes the header's entries in an order that changes from start to start; here they are sorted.
    """
    data = save(dict(tensors), dict(header))
    length = int.from_bytes(data[:8], "little")
    names = json.loads(data[8 : 8 + length])
    names["__metadata__"] = dict(sorted(names["__metadata__"].items()))
    text = json.dumps(names, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # The format aligns the tensors to 8 bytes.
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def find_weights(path: Path, name: str) -> Path:
    """Return the weights file called `name` in an adapter's folder, ours and Side-Step 1's, or in adapter/ below it.

    `path` may also be that file or its config, or the output folder of a run, which means its final adapter. ModelError
    says what else lies there; another file's neighbour is not taken for it.
    """
    folder, label = path.parent if path.is_file() else path, _KINDS[name][0]
    places = (folder, folder / "adapter", *final_of_run(folder))
    for place in places:
        if (place / name).is_file():
            if path.is_file() and path.name not in (name, LORA_CONFIG):
                raise ModelError(
                    f"{path} is not read: a {label} is read from {name}.",
                    hint=f"Give {place / name}, if that is the one you mean; it lies beside it.",
                )
            return place / name
    if not path.exists():
        raise ModelError(f"There is no adapter {path}: no such file or folder.")
    for other, (other_label, choice) in _KINDS.items():
        if any((place / other).is_file() for place in places):
            raise ModelError(f"{path} holds a {other_label}, not a {label}.", hint=f"Set --adapter-type {choice}.")
    raise ModelError(f"There is no {label} in {path}.", hint=f"Give a folder that holds {name}.")


def read_weights(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Return all tensors of a safetensors file, and its header; ModelError when it is damaged or not finite."""
    try:
        with safe_open(path, framework="pt") as file:
            header: Mapping[str, str] = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged: {error}.", hint=COPY_AGAIN) from error
    broken = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if broken:
        raise ModelError(f"{path} holds numbers that are not finite, in {broken[0]} first.")
    return tensors, header


def check_start(stated_in: Path, settings: Mapping[str, Any]) -> None:
    """Raise ModelError for a LoRA that is a change of other weights than the model's own."""
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_STARTS_IN_THE_MODEL):
        raise ModelError(
            f"{stated_in} states init_lora_weights {start!r}: it changes weights that PEFT made of the model's.",
            hint="PEFT makes a plain LoRA of it: save_pretrained with path_initial_model_for_weight_conversion.",
        )


def _is_finite(tensor: Tensor) -> bool:
    # torch compares no numbers of 8 bits.
    return bool((tensor.float() if tensor.dtype.itemsize == 1 else tensor).isfinite().all())
