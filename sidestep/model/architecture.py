"""The sizes a config.json states, as the arguments of diffusers' ACE-Step classes, key by key."""

import math
from collections.abc import Mapping
from typing import Any

from sidestep.errors import ModelError

# What ACE-Step's own configuration class takes for a key that config.json leaves out.
_DEFAULTS: dict[str, int | float | bool] = {
    "head_dim": 128,
    "in_channels": 192,
    "audio_acoustic_hidden_dim": 64,
    "patch_size": 2,
    "text_hidden_dim": 1024,
    "timbre_hidden_dim": 64,
    "num_lyric_encoder_hidden_layers": 8,
    "num_timbre_encoder_hidden_layers": 4,
    "sliding_window": 128,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "timestep_mu": -0.4,
    "timestep_sigma": 1.0,
}
_SHARED_KEYS = ("head_dim", "sliding_window", "rms_norm_eps", "attention_bias", "attention_dropout")
_WIDTH_KEYS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
_XL_WIDTH = 2560


def setting(config: Mapping[str, Any], key: str) -> int | float | bool:
    """Give a number of config.json, or ACE-Step's default for it. Raises ModelError when it is absent or no number."""
    value = config.get(key, _DEFAULTS.get(key))
    if key == "rope_theta" and key not in config and isinstance(config.get("rope_parameters"), dict):
        value = config["rope_parameters"].get("rope_theta", value)  # Where transformers 5 writes it.
    if not isinstance(value, int | float) or not math.isfinite(value):
        state = f"{value!r}, not a number" if key in config else "missing"
        raise ModelError(
            f"In the model's config.json, {key} is {state}.", hint="Download config.json of this checkpoint again."
        )
    return value


def decoder_width(config: Mapping[str, Any]) -> int:
    """The number of channels inside the decoder: 2048, XL 2560."""
    return int(setting(config, "hidden_size"))


def encoder_width(config: Mapping[str, Any]) -> int:
    """The number of channels D of the condition rows: 2048, for XL too."""
    return int(_encoder_setting(config, "hidden_size"))


def is_xl(config: Mapping[str, Any]) -> bool:
    """Whether the decoder is the 4B one: wider than its condition encoder."""
    return encoder_width(config) != decoder_width(config) or decoder_width(config) == _XL_WIDTH


def decoder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `AceStepTransformer1DModel`; `config` is that of the original or of diffusers' transformer/."""
    layers = int(setting(config, "num_hidden_layers"))
    keys = (*_WIDTH_KEYS, *_SHARED_KEYS, "in_channels", "audio_acoustic_hidden_dim", "patch_size", "rope_theta")
    return {
        **{key: setting(config, key) for key in keys},
        "num_hidden_layers": layers,
        "layer_types": layer_types(config, layers),
        "encoder_hidden_size": encoder_width(config),
        "is_turbo": config.get("is_turbo") is True,
        "model_version": config.get("model_version"),
    }


def condition_encoder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `AceStepConditionEncoder`; `config` is the original's or that of diffusers' condition_encoder/.

    XL states the encoder's sizes in `encoder_*` keys; elsewhere the encoder is as wide as the decoder.
    """
    lyric_layers = int(setting(config, "num_lyric_encoder_hidden_layers"))
    timbre_layers = int(setting(config, "num_timbre_encoder_hidden_layers"))
    if layer_types(config, timbre_layers) != _alternating(timbre_layers):
        raise ModelError(
            "config.json asks for a timbre encoder whose layer_types do not alternate; that is not supported.",
            hint="Use a checkpoint of ACE-Step 1.5, or a fine-tune that keeps its layers.",
        )
    keys = (*_SHARED_KEYS, "text_hidden_dim", "timbre_hidden_dim", "rope_theta")
    return {
        **{key: setting(config, key) for key in keys},
        **{key: _encoder_setting(config, key) for key in _WIDTH_KEYS},
        "num_lyric_encoder_hidden_layers": lyric_layers,
        "num_timbre_encoder_hidden_layers": timbre_layers,
        "layer_types": layer_types(config, lyric_layers),
    }


def layer_types(config: Mapping[str, Any], layers: int) -> list[str]:
    """Which attention each of `layers` layers has: `layer_types` of config.json, else sliding and full in turn."""
    stated = config.get("layer_types")
    if stated is None:
        return _alternating(layers)
    kinds = ("sliding_attention", "full_attention")
    if not isinstance(stated, list) or len(stated) < layers or any(kind not in kinds for kind in stated):
        raise ModelError(
            f"In the model's config.json, layer_types does not list {layers} times one of {' and '.join(kinds)}.",
            hint="Download config.json of this checkpoint again.",
        )
    return stated[:layers]


def _alternating(layers: int) -> list[str]:
    return ["full_attention" if index % 2 else "sliding_attention" for index in range(layers)]


def _encoder_setting(config: Mapping[str, Any], key: str) -> int | float | bool:
    encoder_key = f"encoder_{key}"
    return setting(config, key if config.get(encoder_key) is None else encoder_key)
