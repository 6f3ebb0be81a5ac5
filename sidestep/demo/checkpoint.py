"""Makes a toy checkpoint from a seed: every file of a real one, in its own layout, with random weights of tiny size."""

import json
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from diffusers.pipelines.ace_step.modeling_ace_step import (
    AceStepAudioTokenDetokenizer,
    AceStepAudioTokenizer,
    AceStepConditionEncoder,
)
from diffusers.pipelines.ace_step.pipeline_ace_step import AceStepPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from sidestep.model import architecture, names
from sidestep.model.checkpoint import SILENCE_FILE
from sidestep.model.loading import SILENCE_FRAMES

_TEXT_WIDTH = 32
_VOCABULARY = 400
_CHANNELS = 64
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# How Qwen cuts text into words before it looks for byte pairs.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SHARDS = 3
_LATENT_GAIN = 3.0


def build_toy_checkpoint(
    root: Path, *, variant: str = "base", seed: int = 0, layout: Literal["original", "diffusers"] = "original"
) -> Path:
    """Write a checkpoint of `variant` (turbo, base, sft, xl-...) into `root` and give `root` back.

    The same seed and variant give the same weights in both layouts. Audio is 48 kHz stereo and a latent frame lasts
    1920 samples, as in the real model; only the sizes are small. XL comes in shards and with `encoder_*` sizes.
    """
    generator = torch.Generator().manual_seed(seed)
    config = toy_config(variant)
    parts = _model_parts(config)
    vae = _build_vae()
    text_encoder = Qwen3Model(_text_config())
    for module in (*parts.values(), text_encoder):
        _randomize(module, generator)
    _randomize_vae(vae, generator)
    silence = _silence(generator)
    parts["condition_encoder"].silence_latent.copy_(silence.transpose(1, 2))
    root.mkdir(parents=True, exist_ok=True)
    if layout == "diffusers":
        _write_pipeline(root, {**parts, "vae": vae}, text_encoder)
        return root
    folder = root / f"acestep-v15-{variant}"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    _write_weights(folder, _original_tensors(parts), shards=_SHARDS if architecture.is_xl(config) else 1)
    torch.save(silence, folder / SILENCE_FILE)
    _write_part(root / "vae", vae)
    _write_text_encoder(text_encoder, root / "Qwen3-Embedding-0.6B", root / "Qwen3-Embedding-0.6B")
    return root


def toy_config(variant: str) -> dict[str, Any]:
    """Give the config.json of the toy: the keys of a real one, which tells XL by its `encoder_*` sizes."""
    encoder = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    decoder = dict(encoder)
    if variant.startswith("xl-"):
        decoder = {"hidden_size": 64, "intermediate_size": 120, "num_attention_heads": 6, "num_key_value_heads": 2}
        decoder |= {f"encoder_{key}": size for key, size in encoder.items()}
    return {
        **decoder,
        "architectures": ["AceStepConditionGenerationModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "audio_acoustic_hidden_dim": _CHANNELS,
        "auto_map": {"AutoModel": "modeling_acestep_v15.AceStepConditionGenerationModel"},
        "data_proportion": 0.5,
        "dtype": "float32",
        "fsq_dim": encoder["hidden_size"],
        "fsq_input_levels": [8, 8, 8, 5, 5, 5],
        "fsq_input_num_quantizers": 1,
        "head_dim": 16,
        "in_channels": 3 * _CHANNELS,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "model_type": "acestep",
        "model_version": variant.removeprefix("xl-"),
        "num_attention_pooler_hidden_layers": 1,
        "num_hidden_layers": 4,
        "num_lyric_encoder_hidden_layers": 2,
        "num_timbre_encoder_hidden_layers": 2,
        "patch_size": 2,
        "pool_window_size": 5,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "sliding_window": 16,
        "text_hidden_dim": _TEXT_WIDTH,
        "timbre_fix_frame": 750,
        "timbre_hidden_dim": _CHANNELS,
        "timestep_mu": -0.4,
        "timestep_sigma": 1.0,
        **({"is_turbo": True} if variant.endswith("turbo") else {}),  # Real base and sft models leave it out.
    }


def build_toy_tokenizer() -> PreTrainedTokenizerFast:
    """Give a byte-level BPE tokenizer made on the spot; like Qwen3-Embedding's it ends a text with `<|endoftext|>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(), trainer)
    end = _SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"$A {end}", pair=f"$A {end} $B:1 {end}:1", special_tokens=[(end, tokenizer.token_to_id(end))]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=end,
        eos_token=_SPECIAL_TOKENS[2],
        additional_special_tokens=list(_SPECIAL_TOKENS[1:]),
        model_max_length=32_768,
        padding_side="right",
    )


def _training_text() -> Iterable[str]:
    yield "# Instruction\nFill the audio semantic mask based on the given conditions:\n\n# Caption\n\n# Metas\n"
    yield "- bpm: 120\n- timesignature: 4\n- keyscale: A minor\n- duration: 30 seconds\n"
    yield "# Languages\nen\n\n# Lyric\n[Verse]\n[Chorus]\n[Instrumental]\n"
    yield "a bright melody over a warm bass and a steady beat, light drums, slow and calm, fast and loud"


def _build_vae() -> AutoencoderOobleck:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Diffusers builds it with the old weight_norm.
        return AutoencoderOobleck(
            encoder_hidden_size=2 * _CHANNELS,  # The posterior's mean and scale: it cannot be narrower than this.
            downsampling_ratios=[10, 8, 6, 4],  # The largest first: what runs at 48 kHz costs the most.
            channel_multiples=[1, 1, 1, 1],
            decoder_channels=2,
            sampling_rate=48_000,
        )


def _text_config() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=_VOCABULARY,
        hidden_size=_TEXT_WIDTH,
        intermediate_size=2 * _TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000},
        tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
    )


def _model_parts(config: Mapping[str, Any]) -> dict[str, Any]:
    encoder = architecture.condition_encoder_arguments(config)
    shared = ("head_dim", "rope_theta", "attention_bias", "attention_dropout", "rms_norm_eps", "sliding_window")
    widths = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    tokens = {key: encoder[key] for key in (*shared, *widths)} | {
        key: config[key]
        for key in ("audio_acoustic_hidden_dim", "pool_window_size", "num_attention_pooler_hidden_layers")
    }
    quantizer = {key: config[key] for key in ("fsq_dim", "fsq_input_levels", "fsq_input_num_quantizers")}
    return {
        "transformer": AceStepTransformer1DModel(**architecture.decoder_arguments(config)),
        "condition_encoder": AceStepConditionEncoder(**encoder),
        "audio_tokenizer": AceStepAudioTokenizer(**tokens, **quantizer),
        "audio_token_detokenizer": AceStepAudioTokenDetokenizer(**tokens),
    }


@torch.no_grad()
def _randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter so that activations keep a size of about 1: matrices by fan-in, gains near 1."""
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() >= 2 and name.endswith("weight"):
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
        elif name.endswith("weight"):
            parameter.copy_(1 + 0.1 * noise)
        elif name.endswith("scale_shift_table"):
            parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
        else:  # Biases, and the tokens that stand in for something.
            parameter.copy_(noise * (0.02 if name.endswith("bias") else 0.5))


@torch.no_grad()
def _randomize_vae(vae: AutoencoderOobleck, generator: torch.Generator) -> None:
    """Draw the autoencoder's weights: rows of norm 1 and damped branches, so that latents and audio stay finite.

    As in the real one the posterior's scale is tiny beside its mean, and latents have a standard deviation near 1.
    """
    for name, parameter in vae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("weight_v"):
            parameter.copy_(noise)
        elif name.endswith("weight_g"):
            parameter.fill_(0.3 if "res_unit" in name and ".conv2" in name else 1.0)
        else:
            parameter.copy_(0.02 * noise)
    drawn = dict(vae.named_parameters())
    drawn["encoder.conv2.weight_g"][:_CHANNELS] = _LATENT_GAIN
    drawn["encoder.conv2.weight_g"][_CHANNELS:] = 0.1
    drawn["encoder.conv2.bias"][_CHANNELS:] = -6.0


def _silence(generator: torch.Generator) -> Tensor:
    """The latent of silence, [1, 64, 15000]: a strided view of few numbers, so that the file stays small."""
    step = 97
    numbers = 0.5 * torch.randn(step * (_CHANNELS - 1) + SILENCE_FRAMES, generator=generator)
    return numbers.as_strided((1, _CHANNELS, SILENCE_FRAMES), (numbers.numel(), step, 1))


def _original_tensors(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Give all tensors of the four parts under the names of the original checkpoint."""
    prefixes = (names.DECODER_PREFIX, names.CONDITION_ENCODER_PREFIX, *names.AUDIO_TOKEN_PREFIXES)
    tensors = {
        prefix + names.to_original(name): tensor.detach().contiguous()
        for prefix, part in zip(prefixes, parts.values(), strict=True)
        for name, tensor in part.state_dict().items()
        if name != names.SILENCE_LATENT
    }
    tensors[names.NULL_CONDITION] = tensors.pop(names.CONDITION_ENCODER_PREFIX + names.NULL_CONDITION)
    return tensors


def _write_weights(folder: Path, tensors: Mapping[str, Tensor], *, shards: int) -> None:
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        shard = {name: tensors[name] for name in sorted(tensors)[number::shards]}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")


def _write_pipeline(root: Path, parts: Mapping[str, Any], text_encoder: Qwen3Model) -> None:
    for name, part in parts.items():
        _write_part(root / name, part)
    _write_text_encoder(text_encoder, root / "text_encoder", root / "tokenizer")
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0)
    scheduler.save_pretrained(root / "scheduler")
    tokenizer = build_toy_tokenizer()
    AceStepPipeline(text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler, **parts).save_config(root)


def _write_part(folder: Path, part: Any) -> None:
    """Write one of diffusers' modules as diffusers does: config and weights; the autoencoder in float16."""
    part.save_config(folder)
    dtype = torch.float16 if isinstance(part, AutoencoderOobleck) else torch.float32
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in part.state_dict().items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def _write_text_encoder(text_encoder: Qwen3Model, folder: Path, tokenizer_folder: Path) -> None:
    text_encoder.config.save_pretrained(folder)
    _write_weights(folder, text_encoder.state_dict(), shards=1)
    build_toy_tokenizer().save_pretrained(tokenizer_folder)
