"""Puts a checkpoint's parts together into diffusers' pipeline, which turns words into sound."""

import torch
from diffusers.pipelines.ace_step.pipeline_ace_step import AceStepPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from sidestep.model.checkpoint import Checkpoint
from sidestep.model.loading import load_condition_encoder, load_decoder, load_text_encoder, load_vae


def load_pipeline(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> AceStepPipeline:
    """Load the whole model as diffusers' pipeline for text to music, from either layout, with its progress bar off.

    The audio tokenizer, which only covers and audio codes need, is left out. Raises ModelError when a part is missing.
    """
    decoder = load_decoder(checkpoint, device=device, dtype=dtype)
    # The pipeline reads here whether guidance is distilled; a fine-tune's config.json may not say it.
    decoder.register_to_config(is_turbo=checkpoint.is_turbo, model_version=checkpoint.family)
    tokenizer, text_encoder = load_text_encoder(checkpoint, device=device, dtype=dtype)
    pipeline = AceStepPipeline(
        vae=load_vae(checkpoint, device=device, dtype=dtype),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=decoder,
        condition_encoder=load_condition_encoder(checkpoint, device=device, dtype=dtype),
        # The pipeline computes its own timesteps in [0, 1]; these two settings let them pass unchanged.
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
