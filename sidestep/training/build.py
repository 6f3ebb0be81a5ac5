"""The decoder with its adapter, and the stepper that trains it."""

from typing import Any

import torch
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from torch import nn
from torch.amp.grad_scaler import GradScaler

from sidestep.config.adapter import ATTENTION_PROJECTIONS, MLP_PROJECTIONS
from sidestep.config.processes import Processes
from sidestep.config.rank_map import MapFile, check_modules
from sidestep.config.recipe import Recipe, learning_rate_of
from sidestep.config.train import TrainConfig
from sidestep.errors import NoRoomError
from sidestep.events import Emit, Notice
from sidestep.model.attention import CrossAttention, use_processors
from sidestep.model.checkpoint import Checkpoint
from sidestep.model.device import free_memory, full_memory_alike, reset_memory_peak
from sidestep.model.dropout import seed_dropout
from sidestep.model.fuse import Fused, fuse
from sidestep.model.loading import load_decoder, load_null_condition, widen_stream
from sidestep.model.names import to_diffusers
from sidestep.model.quantize import quantize_blocks
from sidestep.training.accelerate import can_capture, make_passes
from sidestep.training.adapters import ADAPTERS, attach_mapped
from sidestep.training.adapters.base import Adapter, target_names
from sidestep.training.adapters.lora import LoraAdapter, plain_loras
from sidestep.training.objective import MinSnr
from sidestep.training.optimizers import make_optimizer
from sidestep.training.passes import Model
from sidestep.training.sharding import shard
from sidestep.training.step import Stepper
from sidestep.training.timesteps import Sampler

CPU = torch.device("cpu")


def build_stepper(
    config: TrainConfig,
    recipe: Recipe,
    checkpoint: Checkpoint,
    rank_map: MapFile | None,
    processes: Processes,
    *,
    sampler: Sampler,
    device: torch.device,
    dtype: torch.dtype,
    emit: Emit,
) -> tuple[Adapter, Stepper]:
    """Load the decoder, attach the adapter that was asked for, and return it with the stepper that trains it.

    NoRoomError when the device has no room for them.
    """
    reset_memory_peak(device)
    try:
        with full_memory_alike():
            model, adapter = _model(
                config, recipe, checkpoint, rank_map, sampler=sampler, device=device, dtype=dtype, processes=processes
            )
    except torch.OutOfMemoryError as error:
        raise NoRoomError(
            f"The model {checkpoint.variant} does not fit into the free memory of {device}.",
            hint="Close other programs that use it, add --quantize int8 or nf4, train a smaller --model-variant, or "
            "spread it over several GPUs (--shard-base).",
        ) from error
    if config.shard_base and can_capture(device):
        emit(Notice(text="Passes are not captured as graphs: in each one the processes exchange the model's parts."))
    for remark in adapter.remarks:
        emit(Notice(text=remark, level="warning"))
    return adapter, _stepper(config, model, adapter, processes)


def _model(
    config: TrainConfig,
    recipe: Recipe,
    checkpoint: Checkpoint,
    rank_map: MapFile | None,
    *,
    sampler: Sampler,
    device: torch.device,
    dtype: torch.dtype,
    processes: Processes,
) -> tuple[Model, Adapter]:
    decoder = frozen_decoder(
        checkpoint, quantize=config.quantize, device=CPU if config.shard_base else device, dtype=dtype
    )
    layers = len(decoder.layers)
    modules = target_names(layers, attention_type=config.attention_type, target_modules=config.target_modules)
    if rank_map:
        check_modules(rank_map, _shapes(decoder))
    torch.manual_seed(config.seed)
    attach = ADAPTERS[config.adapter_type]
    adapter = attach_mapped(decoder, rank_map, config) if rank_map else attach(decoder, modules, config)
    # A run that goes on has its weights in its checkpoint; the adapter it once started from may be gone.
    if config.init_from and config.resume_from is None:
        adapter.read(config.init_from)
    sharded = shard(decoder, adapter.parameters.values(), processes, device=device) if config.shard_base else None
    decoder.train()
    cross_attention, dropout_seed = (
        use_processors(decoder, device=device, dtype=dtype),
        seed_dropout(decoder, config.dropout),
    )
    model = Model(
        decoder=decoder,
        cross_attention=cross_attention,
        null_condition=load_null_condition(checkpoint, device=device, dtype=dtype),
        weighting=MinSnr.normed(recipe.snr_gamma, sampler) if recipe.loss_weighting == "min_snr" else None,
        recompute=recomputed_blocks(
            layers, config.gradient_checkpointing_ratio if config.gradient_checkpointing else 0.0
        ),
        dropout_seed=dropout_seed,
        # Fused layers lie in memory that blocks share, where none can be gathered by itself.
        fused=None if sharded else fused_blocks(decoder, adapter, cross_attention),
        device=device,
        dtype=dtype,
        sharded=sharded,
    )
    free_memory(device)  # Weights that were moved or packed leave holes.
    return model, adapter


def _shapes(decoder: AceStepTransformer1DModel) -> dict[str, tuple[int, int]]:
    """Return (outputs, inputs) of every module that an adapter can go on."""
    projections = (*ATTENTION_PROJECTIONS, *MLP_PROJECTIONS)
    names = target_names(len(decoder.layers), attention_type="both", target_modules=projections)
    layers: dict[str, Any] = {name: decoder.get_submodule(to_diffusers(name)) for name in names}
    return {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}


def fused_blocks(decoder: AceStepTransformer1DModel, adapter: Adapter, cross_attention: CrossAttention) -> Fused | None:
    """Fuse the blocks where there is plain LoRA on plain linear layers: whole weights, no biases."""
    loras = plain_loras(adapter, decoder) if isinstance(adapter, LoraAdapter) else {}
    linears = [module for block in decoder.layers for module in block.modules() if isinstance(module, nn.Linear)]
    if not loras or any(type(linear) is not nn.Linear or linear.bias is not None for linear in linears):
        return None
    return fuse(decoder, loras, cross_attention)


def frozen_decoder(
    checkpoint: Checkpoint, *, quantize: str, device: torch.device, dtype: torch.dtype
) -> AceStepTransformer1DModel:
    """Load the decoder, its blocks' weights in as few bits as asked for."""
    decoder = load_decoder(checkpoint, device=device if quantize == "none" else CPU, dtype=dtype)
    if quantize != "none":
        quantize_blocks(decoder, quantize, device=device)
    widen_stream(decoder, dtype=dtype)
    return decoder


def _stepper(config: TrainConfig, model: Model, adapter: Adapter, processes: Processes) -> Stepper:
    optimizer = make_optimizer(
        config.optimizer_type,
        adapter.parameters,
        lr=learning_rate_of(config),
        weight_decay=config.weight_decay,
        device=model.device,
    )
    scaler = GradScaler(model.device.type, enabled=model.dtype == torch.float16)
    return Stepper(
        model=model,
        passes=make_passes(model, list(adapter.parameters.values()), scaler),
        parameters=adapter.parameters,
        modules=adapter.modules,
        optimizer=optimizer,
        max_grad_norm=config.max_grad_norm,
        scaler=scaler,
        # With float16's loss scaling a step has to wait anyhow: the scale, and whether to skip, are decided on the CPU.
        guards_itself=config.optimizer_type == "adamw" and can_capture(model.device) and not scaler.is_enabled(),
        processes=processes,
    )


def recomputed_blocks(blocks: int, ratio: float) -> list[bool]:
    """Say of each block whether the backward pass recomputes it; a part of them is spread evenly."""
    count = round(blocks * ratio)
    return [place * count // blocks < (place + 1) * count // blocks for place in range(blocks)]
