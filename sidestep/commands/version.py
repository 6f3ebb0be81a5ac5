"""`--version`: which versions of what are at work."""

from importlib.metadata import version

from sidestep.config.places import product_version

PACKAGES = ("torch", "torchaudio", "diffusers", "transformers", "peft", "lycoris-lora")


def show_versions() -> int:
    """Print the versions of Side-Step and of what it builds on; returns 0."""
    import torch

    print(f"Side-Step {product_version()}")
    for package in PACKAGES:
        print(f"{package} {version(package)}")
    print(f"CUDA {torch.version.cuda or 'none'} (GPUs: {torch.cuda.device_count()})")
    return 0
