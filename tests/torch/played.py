"""Devices that are not here, as far as they can be played."""

from collections.abc import Callable
from types import SimpleNamespace

import torch

GIB = 2**30


class Module:
    """torch's module of a device that is not here; notes what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def max_memory_allocated(self, device: torch.device) -> int:
        return 3 * GIB

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(total_memory=16 * GIB)

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 6 * GIB, 16 * GIB

    def get_device_name(self, device: torch.device) -> str:
        return f"Made-up {device.type}"

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *device: self.calls.append(name)
