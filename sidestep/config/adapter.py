"""The settings of what is trained: model and paths, device, adapter."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sidestep.config.settings import Range, When, option

MODEL = "Model and paths"
DEVICE = "Device and precision"
ADAPTER = "Adapter"

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION_PROJECTIONS, MLP_PROJECTIONS = TARGET_MODULES[:4], TARGET_MODULES[4:]
LOKR = When("adapter_type", ("lokr",), is_strict=True)
PEFT = When("adapter_type", ("lora", "dora"), is_strict=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """Which model, where, on which device, and what kind of adapter."""

    checkpoint_dir: Path | None = option(
        "Folder with acestep-v15-*/, vae/ and Qwen3-Embedding-0.6B/, or a model in diffusers' layout.",
        group=MODEL,
        default=None,
        short="-c",
        ask="basic",
        on_resume="free",
        in_presets=False,
        shown_default="SIDESTEP_CHECKPOINT_DIR, else the last used, else ./checkpoints",
    )
    model_variant: str = option(
        "turbo, base, sft, xl-turbo, xl-base, xl-sft, or the name of any folder under the checkpoint folder.",
        group=MODEL,
        default="turbo",
        short="-M",
        ask="basic",
        in_presets=False,
    )
    base_model: Literal["turbo", "base", "sft", "xl-turbo", "xl-base", "xl-sft"] | None = option(
        "What a fine-tune descends from, where its folder does not say.",
        group=MODEL,
        default=None,
        in_presets=False,
        shown_default="read from config.json",
    )
    dataset_dir: Path | None = option(
        "Folder of preprocessed tensors (.pt files, and manifest.json).",
        group=MODEL,
        default=None,
        short="-d",
        ask="basic",
        on_resume="free",
        in_presets=False,
        shown_default="required to train",
    )
    output_dir: Path | None = option(
        "Where the run puts its adapter, checkpoints and logs.",
        group=MODEL,
        default=None,
        short="-o",
        ask="basic",
        on_resume="free",
        in_presets=False,
        shown_default="required to train",
    )
    run_name: str | None = option(
        "Name of the adapter's folder; other programs show it. No dots.",
        group=MODEL,
        default=None,
        in_presets=False,
        shown_default="adapter type and time",
    )

    device: str = option(
        "auto, cuda, cuda:N, mps, xpu or cpu; auto takes the first there is: CUDA or ROCm, MPS, XPU, CPU.",
        group=DEVICE,
        default="auto",
        on_resume="free",
        in_presets=False,
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "Number format of the frozen model; auto: bf16 on CUDA and XPU, fp16 on MPS, fp32 on CPU.",
        group=DEVICE,
        default="auto",
        in_presets=False,
    )

    adapter_type: Literal["lora", "dora", "lokr", "loha"] = option(
        "Kind of adapter.", group=ADAPTER, default="lora", short="-a", ask="basic"
    )
    rank: int = option(
        "Rank of the adapter (LoKr and LoHa: linear dim).",
        group=ADAPTER,
        default=64,
        short="-r",
        within=Range(at_least=1, at_most=4096),
        ask="basic",
    )
    alpha: float = option(
        "Strength of the adapter: its change is scaled by alpha / rank. Usually twice the rank.",
        group=ADAPTER,
        default=128.0,
        within=Range(above=0),
        ask="basic",
    )
    dropout: float = option(
        "Share of the adapter's inputs that is dropped in training.",
        group=ADAPTER,
        default=0.1,
        within=Range(at_least=0, at_most=0.5),
        on_resume="free",
    )
    attention_type: Literal["both", "self", "cross"] = option(
        "Which attention blocks get an adapter.", group=ADAPTER, default="both"
    )
    target_modules: tuple[str, ...] = option(
        "Which projections get an adapter; the last three are the MLP's.",
        group=ADAPTER,
        default=ATTENTION_PROJECTIONS,
        choices=TARGET_MODULES,
    )
    bias: Literal["none", "all", "lora_only"] = option(
        "Which biases are trained as well.", group=ADAPTER, default="none", when=PEFT
    )
    use_rslora: bool = option(
        "Scale by alpha / sqrt(rank) (rank-stabilised LoRA).", group=ADAPTER, default=False, when=PEFT
    )
    lokr_factor: int = option(
        "Size of LoKr's first Kronecker factor, 1 at least; -1 chooses the most square one.",
        group=ADAPTER,
        default=-1,
        within=Range(at_least=-1),
        when=LOKR,
    )
    lokr_decompose_both: bool = option("Factorise both Kronecker factors.", group=ADAPTER, default=False, when=LOKR)
    lokr_use_tucker: bool = option("Tucker decomposition for convolutions.", group=ADAPTER, default=False, when=LOKR)
    lokr_use_scalar: bool = option("Train a scalar for each module.", group=ADAPTER, default=False, when=LOKR)
    lokr_weight_decompose: bool = option("DoRA on top of LoKr.", group=ADAPTER, default=False, when=LOKR)
    rank_map: Path | None = option(
        "Train exactly the modules of this rank map, each with its own rank (train.py estimate makes one).",
        group=ADAPTER,
        default=None,
        when=PEFT,
        on_resume="free",
        in_presets=False,
    )
    rank_map_start: bool = option(
        "Start lora_A from the map's strongest input directions. Needs --rank-map.",
        group=ADAPTER,
        default=False,
        when=PEFT,
    )
    init_from: Path | None = option(
        "Start from the weights of this adapter: ours, the official trainer's, or Side-Step 1's.",
        group=ADAPTER,
        default=None,
        in_presets=False,
    )
