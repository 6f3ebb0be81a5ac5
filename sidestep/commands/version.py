"""`--version`: which versions of what are at work."""

from importlib.metadata import version

from sidestep.config.places import product_version
from sidestep.ui.console import open_console

PACKAGES = ("torch", "torchaudio", "diffusers", "transformers", "peft", "lycoris-lora")


def show_versions() -> int:
    """Print the versions of Side-Step and of what it builds on; returns 0."""
    from sidestep.model.device import available_devices, device_count, torch_build

    console = open_console(plain=True)
    console.print(f"Side-Step {product_version()}")
    for package in PACKAGES:
        console.print(f"{package} {version(package)}")
    console.print(f"{torch_build()} (GPUs: {sum(device_count(kind) for kind in available_devices()[:-1])})")
    return 0
