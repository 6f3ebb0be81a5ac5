"""TrainConfig: every training setting, once."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sidestep.config.adapter import AdapterConfig
from sidestep.config.settings import Range, When, option

TRAINING = "Training"
OBJECTIVE = "Objective"
LOADING = "Data loading"
SAVING = "Checkpointing and logging"
PREPROCESSING = "Preprocessing"
SAMPLING = When("sample_every_n_epochs", tuple(range(1, 10_001)))
WORKERS = When("num_workers", tuple(range(1, 257)))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(AdapterConfig):
    """Everything a training run depends on. A run's `config.json` holds these fields."""

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
        "Same seed, data and machine: same result; on a GPU up to rounding.",
        group=TRAINING,
        default=42,
        within=Range(at_least=0, at_most=2**53),
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
    gradient_checkpointing_ratio: float = option(
        "Share of the blocks that are recomputed; the rest keep their activations.",
        group=TRAINING,
        default=1.0,
        within=Range(at_least=0, at_most=1),
        when=When("gradient_checkpointing", (True,)),
        on_resume="free",
    )
    quantize: Literal["none", "int8", "nf4"] = option(
        "Hold the frozen weights in fewer bits: int8 halves their memory, nf4 quarters it at some cost in precision.",
        group=TRAINING,
        default="none",
    )
    shard_base: bool = option(
        "Spread the frozen model over the processes that train together: each GPU holds its part and one block whole.",
        group=TRAINING,
        default=False,
        ask="never",
        on_resume="free",
        in_presets=False,
    )
    auto_fit: bool = option(
        "Where a step does not fit the GPU, change settings until it does, and say which.",
        group=TRAINING,
        default=False,
        on_resume="free",
        in_presets=False,
    )
    compile: bool | None = option(
        "Compile the model's blocks; auto: where it can be had and the run is long enough to get the time back.",
        group=TRAINING,
        default=None,
        on_resume="free",
        shown_default="auto",
    )
    offload_encoder: bool = option(
        "Keep the encoders of words and conditions off the GPU: they compute on the CPU, more slowly.",
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
        "Train on random windows of so many seconds, 1 at least; 0 trains on whole songs.",
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
    sample_every_n_epochs: int = option(
        "Epochs between samples: the same prompts with the adapter as it is, and once without it; 0 is off.",
        group=SAVING,
        default=0,
        within=Range(at_least=0, at_most=10_000),
        on_resume="free",
    )
    sample_prompts: Path | None = option(
        "What to sample: a text file with a prompt a line, or JSON (see the README).",
        group=SAVING,
        default=None,
        on_resume="free",
        in_presets=False,
        shown_default="the prompts of two of the songs",
        when=SAMPLING,
    )
    sample_duration: float = option(
        "Seconds of a sample.",
        group=SAVING,
        default=20.0,
        within=Range(at_least=1, at_most=600),
        on_resume="free",
        when=SAMPLING,
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
