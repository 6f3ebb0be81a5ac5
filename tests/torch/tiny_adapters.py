"""Every kind of adapter on a decoder of two layers, and a few steps of training for it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import Parameter

from sidestep.config.train import TrainConfig
from sidestep.demo.checkpoint import toy_config
from sidestep.model import architecture
from sidestep.model.names import to_diffusers, to_original
from sidestep.training.adapters import ADAPTERS
from sidestep.training.adapters.base import (
    ATTENTION_PROJECTIONS,
    MLP_PROJECTIONS,
    Adapter,
    current_values,
    target_names,
)

LAYERS = 2
PROJECTIONS = ATTENTION_PROJECTIONS + MLP_PROJECTIONS
KINDS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"adapter_type": "lora"},
    "lora, rank-stabilised": {"adapter_type": "lora", "use_rslora": True},
    "lora with all biases": {"adapter_type": "lora", "bias": "all"},
    "dora": {"adapter_type": "dora"},
    "dora, rank-stabilised": {"adapter_type": "dora", "use_rslora": True},
    "lokr of whole factors": {"adapter_type": "lokr", "rank": 64},
    "lokr": {"adapter_type": "lokr"},
    "lokr with factor 4": {"adapter_type": "lokr", "lokr_factor": 4},
    "lokr, both factors decomposed": {"adapter_type": "lokr", "lokr_decompose_both": True},
    "lokr with scalars": {"adapter_type": "lokr", "lokr_use_scalar": True, "lokr_use_tucker": True},
    "lokr with magnitudes": {"adapter_type": "lokr", "lokr_weight_decompose": True},
    "lokr with everything": {
        "adapter_type": "lokr",
        "lokr_decompose_both": True,
        "lokr_use_scalar": True,
        "lokr_weight_decompose": True,
    },
    "loha": {"adapter_type": "loha"},
}


def tiny_decoder(*, dtype: torch.dtype = torch.float32) -> AceStepTransformer1DModel:
    """Give a decoder with always the same random weights, frozen and in evaluation mode."""
    config = {**toy_config("base"), "num_hidden_layers": LAYERS}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = AceStepTransformer1DModel(**architecture.decoder_arguments(config))
        for name, parameter in decoder.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
    for parameter in decoder.parameters():
        parameter.data = parameter.data.to(dtype)
    return decoder.eval().requires_grad_(False)


def attach(
    decoder: nn.Module, kind: str = "lora", *, targets: Sequence[str] = PROJECTIONS, seed: int = 1, **changes: Any
) -> Adapter:
    """Put an adapter of this kind on the decoder: rank 2, alpha 6, no dropout unless said otherwise."""
    config = TrainConfig(**{"rank": 2, "alpha": 6.0, "dropout": 0.0, **KINDS[kind], **changes})
    modules = target_names(LAYERS, attention_type=config.attention_type, target_modules=targets)
    torch.manual_seed(seed)
    return ADAPTERS[config.adapter_type](decoder, modules, config)


def inputs(*, seed: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Give what a decoder is called with: 6 latent frames and 5 condition rows."""
    generator = torch.Generator().manual_seed(seed)
    timestep = torch.tensor([0.4])
    tensors = {
        "hidden_states": torch.randn(1, 6, 64, generator=generator),
        "timestep": timestep,
        "timestep_r": timestep,
        "encoder_hidden_states": torch.randn(1, 5, 48, generator=generator),
        "context_latents": torch.randn(1, 6, 128, generator=generator),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def output(decoder: nn.Module) -> Tensor:
    """Give the decoder's velocity in evaluation mode, [1, 6, 64]."""
    with torch.no_grad():
        return decoder.eval()(**inputs()).sample


def loss_of(decoder: nn.Module) -> Tensor:
    """Give a loss that depends on every element of the output."""
    target = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(3))
    return (decoder(**inputs()).sample - target).square().mean()


def train_a_little(decoder: nn.Module, parameters: Mapping[str, Parameter], *, steps: int = 3) -> list[float]:
    """Make a few large steps, leave the gradient of the next one in the parameters, and give all losses."""
    optimizer = torch.optim.AdamW(parameters.values(), lr=2e-2)
    losses = []
    decoder.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(decoder)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    optimizer.zero_grad()
    loss = loss_of(decoder)
    loss.backward()
    return [*losses, loss.item()]


def train_and_write(folder: Path, kind: str, **options: Any) -> tuple[AceStepTransformer1DModel, Adapter]:
    """Train an adapter a little and write it; give its decoder, in evaluation mode, and the adapter."""
    decoder = tiny_decoder()
    adapter = attach(decoder, kind, **options)
    train_a_little(decoder, adapter.parameters)
    folder.mkdir(exist_ok=True)
    adapter.write(folder, current_values(adapter), about={"sidestep": '{"version": "0"}'})
    return decoder.eval(), adapter


def original_decoder() -> nn.Module:
    """Give the layers of a fresh decoder in a tree that bears the original's names; it cannot run as a whole."""
    root = nn.Module()
    for name, part in tiny_decoder().named_modules():
        if not isinstance(part, nn.Linear | nn.Conv1d | nn.ConvTranspose1d):
            continue
        *parents, last = to_original(name).split(".")
        at = root
        for parent in parents:
            if not hasattr(at, parent):
                at.add_module(parent, nn.Module())
            at = at.get_submodule(parent)
        at.add_module(last, part)
    return root


def assert_same_layers(original: nn.Module, decoder: nn.Module) -> None:
    """Assert that every projection gives the same output in both, and print the largest error."""
    worst = 0.0
    for module in target_names(LAYERS, attention_type="both", target_modules=PROJECTIONS):
        layer = decoder.get_submodule(to_diffusers(module))
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found, wanted = original.get_submodule(module)(x), layer(x)
        worst = max(worst, (found - wanted).abs().max().item())
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    print(f"largest error {worst:.2g}")


def header_of(path: Path) -> dict[str, str]:
    """Give the header of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata()
