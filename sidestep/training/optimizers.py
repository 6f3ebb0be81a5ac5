"""The optimizers; a missing one is an error with the remedy, never another optimizer."""

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from sidestep.config.shell import INSTALLER
from sidestep.errors import ConfigError
from sidestep.model.capabilities import capabilities

Groups = list[dict[str, Any]]
Make = Callable[[Groups, float, torch.device], Optimizer]


def _adamw(groups: Groups, lr: float, device: torch.device) -> Optimizer:
    # Fused: one kernel for all tensors where the device has it.
    return torch.optim.AdamW(groups, lr=lr, fused=capabilities(device).fused_adamw)


def _adamw8bit(groups: Groups, lr: float, device: torch.device) -> Optimizer:
    return _package("bitsandbytes", "adamw8bit").optim.AdamW8bit(groups, lr=lr)


def _adafactor(groups: Groups, lr: float, device: torch.device) -> Optimizer:
    # A fixed learning rate, as with the others: Adafactor's own relative step would ignore --lr and the schedule.
    adafactor = _package("transformers.optimization", "adafactor").Adafactor
    return adafactor(groups, lr=lr, scale_parameter=False, relative_step=False, warmup_init=False)


def _prodigy(groups: Groups, lr: float, device: torch.device) -> Optimizer:
    # Settings its authors recommend for diffusion models: bias correction and a guarded warm-up.
    return _package("prodigyopt", "prodigy").Prodigy(groups, lr=lr, use_bias_correction=True, safeguard_warmup=True)


OPTIMIZERS: dict[str, Make] = {"adamw": _adamw, "adamw8bit": _adamw8bit, "adafactor": _adafactor, "prodigy": _prodigy}


def make_optimizer(
    name: str, parameters: Mapping[str, Parameter], *, lr: float, weight_decay: float, device: torch.device
) -> Optimizer:
    """Return the optimizer of that name over an adapter's parameters; ConfigError when its package is missing.

    Weight decay pulls matrices towards no change. Magnitudes, scalars and biases are not decayed: for them zero is no
    rest but another model.
    """
    decayed = [p for key, p in parameters.items() if _is_matrix(key, p)]
    kept = [p for key, p in parameters.items() if not _is_matrix(key, p)]
    groups: Groups = [{"params": decayed, "weight_decay": weight_decay}]
    if kept:
        groups.append({"params": kept, "weight_decay": 0.0})
    return OPTIMIZERS[name](groups, lr, device)


def _is_matrix(name: str, parameter: Parameter) -> bool:
    return parameter.dim() > 1 and not name.endswith("dora_scale")


def _package(module: str, optimizer: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ConfigError(
            f"{optimizer} needs the package {package}, which cannot be loaded here: {error}.",
            hint=f"Run {INSTALLER}, or choose --optimizer-type adamw.",
        ) from error
