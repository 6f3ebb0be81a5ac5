"""The optimizers; a missing one is an error with the remedy, never another optimizer."""

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from sidestep.errors import ConfigError

Make = Callable[[Sequence[Parameter], float, float, torch.device], Optimizer]


def _adamw(parameters: Sequence[Parameter], lr: float, weight_decay: float, device: torch.device) -> Optimizer:
    # Fused: one kernel for all tensors where the device has it.
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=device.type in ("cuda", "xpu"))


def _adamw8bit(parameters: Sequence[Parameter], lr: float, weight_decay: float, device: torch.device) -> Optimizer:
    if device.type == "mps":
        raise ConfigError("adamw8bit does not run on MPS.", hint="Use --optimizer-type adamw or adafactor.")
    return _package("bitsandbytes", "adamw8bit").optim.AdamW8bit(parameters, lr=lr, weight_decay=weight_decay)


def _adafactor(parameters: Sequence[Parameter], lr: float, weight_decay: float, device: torch.device) -> Optimizer:
    # A fixed learning rate, as with the others: Adafactor's own relative step would ignore --lr and the schedule.
    adafactor = _package("transformers.optimization", "adafactor").Adafactor
    return adafactor(
        parameters, lr=lr, weight_decay=weight_decay, scale_parameter=False, relative_step=False, warmup_init=False
    )


def _prodigy(parameters: Sequence[Parameter], lr: float, weight_decay: float, device: torch.device) -> Optimizer:
    # Settings its authors recommend for diffusion models: bias correction and a guarded warm-up.
    return _package("prodigyopt", "prodigy").Prodigy(
        parameters, lr=lr, weight_decay=weight_decay, use_bias_correction=True, safeguard_warmup=True
    )


OPTIMIZERS: dict[str, Make] = {"adamw": _adamw, "adamw8bit": _adamw8bit, "adafactor": _adafactor, "prodigy": _prodigy}


def make_optimizer(
    name: str, parameters: Sequence[Parameter], *, lr: float, weight_decay: float, device: torch.device
) -> Optimizer:
    """Return the optimizer of that name over `parameters`; ConfigError when its package is missing."""
    return OPTIMIZERS[name](parameters, lr, weight_decay, device)


def _package(module: str, optimizer: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ConfigError(
            f"{optimizer} needs the package {package}, which cannot be loaded here: {error}.",
            hint="Run 'uv sync', or choose --optimizer-type adamw.",
        ) from error
