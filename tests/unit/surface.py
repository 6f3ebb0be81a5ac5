"""The promised surface of the command line: names and defaults that scripts rely on."""

PROMISED_DEFAULTS = {
    "model_variant": "turbo", "device": "auto", "precision": "auto", "adapter_type": "lora", "rank": 64, "alpha": 128,
    "dropout": 0.1, "attention_type": "both", "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "bias": "none", "use_rslora": False, "lokr_factor": -1, "lokr_decompose_both": False, "lokr_use_tucker": False,
    "lokr_use_scalar": False, "lokr_weight_decompose": False, "batch_size": 1, "gradient_accumulation": 4,
    "epochs": 100, "max_steps": 0, "warmup_steps": 100, "weight_decay": 0.01, "max_grad_norm": 1.0, "seed": 42,
    "optimizer_type": "adamw", "scheduler_type": "cosine", "gradient_checkpointing": True, "offload_encoder": False,
    "ema_decay": 0, "val_split": 0, "early_stop_patience": 0, "save_best": True, "loss_weighting": "none",
    "snr_gamma": 5.0, "timestep_mode": "auto", "chunk_duration": 0, "pin_memory": True, "prefetch_factor": 2,
    "persistent_workers": True, "dataset_repeats": 1, "save_every": 10, "log_every": 10, "log_heavy_every": 50,
    "sample_every_n_epochs": 0,
    "preprocess": False, "max_duration": 240, "normalize": "none", "target_db": -1.0, "target_lufs": -14.0,
}  # fmt: skip

PROMISED_FLAGS = (
    "--checkpoint-dir", "-c", "--model-variant", "-M", "--base-model", "--dataset-dir", "-d", "--output-dir", "-o",
    "--run-name", "--device", "--precision", "--adapter-type", "-a", "--rank", "-r", "--alpha", "--dropout",
    "--attention-type", "--target-modules", "--bias", "--use-rslora", "--lokr-factor", "--lokr-decompose-both",
    "--lokr-use-tucker", "--lokr-use-scalar", "--lokr-weight-decompose", "--init-from", "--lr", "--learning-rate",
    "--batch-size", "--gradient-accumulation", "--epochs", "-e", "--max-steps", "--warmup-steps", "--weight-decay",
    "--max-grad-norm", "--seed", "--optimizer-type", "--scheduler-type", "--gradient-checkpointing",
    "--no-gradient-checkpointing", "--offload-encoder", "--no-offload-encoder", "--ema-decay", "--val-split",
    "--early-stop-patience", "--save-best", "--cfg-ratio", "--loss-weighting", "--snr-gamma", "--timestep-mode",
    "--shift", "--chunk-duration", "--num-workers", "--pin-memory", "--no-pin-memory", "--prefetch-factor",
    "--persistent-workers", "--no-persistent-workers", "--dataset-repeats", "--save-every", "--resume-from",
    "--log-dir", "--log-every", "--log-heavy-every", "--sample-every-n-epochs",
    "--preset", "--save-preset", "--config", "--preprocess",
    "--audio-dir", "--dataset-json", "--tensor-output", "--max-duration", "--normalize", "--target-db", "--target-lufs",
    "--plain", "--yes",
)  # fmt: skip
