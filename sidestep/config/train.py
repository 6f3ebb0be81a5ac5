"""TrainConfig: every training setting, once."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sidestep.config.settings import Range, When, option

MODEL = "Model and paths"
DEVICE = "Device and precision"
ADAPTER = "Adapter"
TRAINING = "Training"
OBJECTIVE = "Objective"
LOADING = "Data loading"
SAVING = "Checkpointing and logging"
PREPROCESSING = "Preprocessing"

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WORKERS = When("num_workers", tuple(range(1, 257)))
LOKR = When("adapter_type", ("lokr",), is_strict=True)
PEFT = When("adapter_type", ("lora", "dora"), is_strict=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Everything a training run depends on. A run's `config.json` holds these fields."""

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
        default=TARGET_MODULES[:4],
        choices=TARGET_MODULES,
    )
    bias: Literal["none", "all", "lora_only"] = option(
        "Which biases are trained as well.", group=ADAPTER, default="none", when=PEFT
    )
    use_rslora: bool = option(
        "Scale by alpha / sqrt(rank) (rank-stabilised LoRA).", group=ADAPTER, default=False, when=PEFT
    )
    lokr_factor: int = option(
        "Size of LoKr's first Kronecker factor; -1 chooses the most square one.",
        group=ADAPTER,
        default=-1,
        within=Range(at_least=-1),
        when=LOKR,
    )
    lokr_decompose_both: bool = option("Factorise both Kronecker factors.", group=ADAPTER, default=False, when=LOKR)
    lokr_use_tucker: bool = option("Tucker decomposition for convolutions.", group=ADAPTER, default=False, when=LOKR)
    lokr_use_scalar: bool = option("Train a scalar for each module.", group=ADAPTER, default=False, when=LOKR)
    lokr_weight_decompose: bool = option("DoRA on top of LoKr.", group=ADAPTER, default=False, when=LOKR)
    init_from: Path | None = option(
        "Start from the weights of this adapter: ours, the official trainer's, or Side-Step 1's.",
        group=ADAPTER,
        default=None,
        in_presets=False,
    )

    learning_rate: float | None = option(
        "Learning rate at the end of the warm-up.",
        group=TRAINING,
        default=None,
        shown_default="0.0001; prodigy: 1",
        other_flag="--lr",
        within=Range(above=0),
        ask="basic",
    )
    batch_size: int = option(
        "Songs (or windows) in one pass; only of equal length, never padded.",
        group=TRAINING,
        default=1,
        within=Range(at_least=1, at_most=1024),
        ask="basic",
    )
    gradient_accumulation: int = option(
        "Passes per optimizer step.", group=TRAINING, default=4, within=Range(at_least=1, at_most=4096), ask="basic"
    )
    epochs: int = option(
        "How often every song is seen.",
        group=TRAINING,
        default=100,
        short="-e",
        within=Range(at_least=1, at_most=1_000_000),
        ask="basic",
        on_resume="free",
    )
    max_steps: int = option(
        "Stop after this many optimizer steps; 0 goes by epochs.",
        group=TRAINING,
        default=0,
        within=Range(at_least=0),
        on_resume="free",
    )
    warmup_steps: int = option(
        "Steps in which the learning rate rises from 10 % to 100 %.",
        group=TRAINING,
        default=100,
        within=Range(at_least=0),
    )
    weight_decay: float = option(
        "Weight decay of the optimizer.", group=TRAINING, default=0.01, within=Range(at_least=0)
    )
    max_grad_norm: float = option(
        "Gradients are clipped to this norm; 0 leaves them.", group=TRAINING, default=1.0, within=Range(at_least=0)
    )
    seed: int = option(
        "Same seed, data and machine: same result.", group=TRAINING, default=42, within=Range(at_least=0, at_most=2**53)
    )
    optimizer_type: Literal["adamw", "adamw8bit", "adafactor", "prodigy"] = option(
        "Optimizer.", group=TRAINING, default="adamw"
    )
    scheduler_type: Literal["cosine", "cosine_restarts", "linear", "constant", "constant_with_warmup"] = option(
        "How the learning rate goes on after the warm-up (constant has none). Prodigy is always constant.",
        group=TRAINING,
        default="cosine",
    )
    gradient_checkpointing: bool = option(
        "Recompute activations in the backward pass: much less memory, about a third more time.",
        group=TRAINING,
        default=True,
        on_resume="free",
    )
    offload_encoder: bool = option(
        "Keep what is not in use off the GPU between the steps of preprocessing.",
        group=TRAINING,
        default=False,
        on_resume="free",
    )
    ema_decay: float = option(
        "Keep a moving average of the adapter with this decay, 0.999 say, beside the raw weights; 0 is off.",
        group=TRAINING,
        default=0.0,
        within=Range(at_least=0, below=1),
    )
    val_split: float = option(
        "Share of the songs held out to measure a loss that can be compared between epochs and runs.",
        group=TRAINING,
        default=0.0,
        within=Range(at_least=0, at_most=0.5),
    )
    early_stop_patience: int = option(
        "Stop after so many epochs without a better held-out loss; 0 is off. Needs --val-split.",
        group=TRAINING,
        default=0,
        within=Range(at_least=0),
        on_resume="free",
    )
    save_best: bool = option(
        "Keep the adapter with the best held-out loss, when --val-split holds songs out.",
        group=TRAINING,
        default=True,
        on_resume="free",
    )

    cfg_ratio: float | None = option(
        "Share of the samples that are trained without their prompt, so that guidance works.",
        group=OBJECTIVE,
        default=None,
        within=Range(at_least=0, at_most=1),
        shown_default="0.15; turbo: 0",
    )
    loss_weighting: Literal["none", "min_snr"] = option(
        "How the loss is weighted over timesteps.", group=OBJECTIVE, default="none"
    )
    snr_gamma: float = option(
        "Clamp of the min-SNR weight.",
        group=OBJECTIVE,
        default=5.0,
        within=Range(above=0),
        when=When("loss_weighting", ("min_snr",)),
    )
    timestep_mode: Literal["auto", "continuous", "discrete"] = option(
        "How timesteps are drawn; auto: turbo discrete, base and sft continuous.", group=OBJECTIVE, default="auto"
    )
    shift: float | None = option(
        "Shift of the eight discrete timesteps.",
        group=OBJECTIVE,
        default=None,
        within=Range(above=0),
        shown_default="3",
        when=When("timestep_mode", ("auto", "discrete")),
    )
    chunk_duration: float = option(
        "Train on random windows of so many seconds; 0 trains on whole songs.",
        group=OBJECTIVE,
        default=0.0,
        within=Range(at_least=0),
        ask="basic",
    )

    num_workers: int = option(
        "Processes that read tensors; 0 reads in the main one.",
        group=LOADING,
        default=0 if os.name == "nt" else 4,
        within=Range(at_least=0, at_most=256),
        on_resume="free",
        shown_default="4; Windows: 0",
    )
    pin_memory: bool = option("Copy to the GPU from pinned memory.", group=LOADING, default=True, on_resume="free")
    prefetch_factor: int = option(
        "Batches each worker reads ahead.",
        group=LOADING,
        default=2,
        within=Range(at_least=1, at_most=1024),
        on_resume="free",
        when=WORKERS,
    )
    persistent_workers: bool = option(
        "Keep the workers from epoch to epoch.", group=LOADING, default=True, on_resume="free", when=WORKERS
    )
    dataset_repeats: int = option(
        "How often every song counts in an epoch.", group=LOADING, default=1, within=Range(at_least=1, at_most=10_000)
    )

    save_every: int = option(
        "Epochs between full checkpoints.",
        group=SAVING,
        default=10,
        within=Range(at_least=1),
        ask="basic",
        on_resume="free",
    )
    resume_from: Path | None = option(
        "Go on from this checkpoint, or from the newest good one of this run folder.",
        group=SAVING,
        default=None,
        on_resume="free",
        in_presets=False,
        ask="never",
    )
    log_dir: Path | None = option(
        "TensorBoard's folder.",
        group=SAVING,
        default=None,
        on_resume="free",
        in_presets=False,
        shown_default="{output-dir}/runs",
    )
    log_every: int = option(
        "Steps between readings of loss and learning rate.",
        group=SAVING,
        default=10,
        within=Range(at_least=1),
        on_resume="free",
    )
    log_heavy_every: int = option(
        "Steps between gradient norms of every layer; 0 is off.",
        group=SAVING,
        default=50,
        within=Range(at_least=0),
        on_resume="free",
    )

    preprocess: bool = option(
        "Turn audio into tensors first; without --output-dir, stop after that.",
        group=PREPROCESSING,
        default=False,
        ask="never",
        on_resume="free",
        in_presets=False,
    )
    audio_dir: Path | None = option(
        "Folder with the songs; searched recursively.",
        group=PREPROCESSING,
        default=None,
        ask="basic",
        on_resume="free",
        in_presets=False,
    )
    dataset_json: Path | None = option(
        "The dataset file.",
        group=PREPROCESSING,
        default=None,
        on_resume="free",
        in_presets=False,
        shown_default="{audio-dir}/dataset.json if there",
    )
    tensor_output: Path | None = option(
        "Where the tensors go.", group=PREPROCESSING, default=None, ask="basic", on_resume="free", in_presets=False
    )
    max_duration: float = option(
        "Seconds; longer songs are cut.", group=PREPROCESSING, default=240.0, within=Range(above=0), on_resume="free"
    )
    normalize: Literal["none", "peak", "lufs"] = option(
        "Bring songs to the same peak or loudness.", group=PREPROCESSING, default="none", ask="basic", on_resume="free"
    )
    target_db: float = option(
        "Peak level in dBFS.",
        group=PREPROCESSING,
        default=-1.0,
        within=Range(at_least=-60, at_most=0),
        when=When("normalize", ("peak",)),
        on_resume="free",
    )
    target_lufs: float = option(
        "Loudness in LUFS.",
        group=PREPROCESSING,
        default=-14.0,
        within=Range(at_least=-70, at_most=0),
        when=When("normalize", ("lufs",)),
        on_resume="free",
    )
