"""What a tensor or a module is called: ACE-Step's own names on disk, diffusers' in memory, one table between them."""

import re

# Source: the rename table of the reference cases; diffusers' ACE-Step conversion agrees with it.
_ORIGINAL_TO_DIFFUSERS = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "o_proj": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
    "proj_in.1": "proj_in_conv",
    "proj_out.1": "proj_out_conv",
}
_DIFFUSERS_TO_ORIGINAL = {diffusers: original for original, diffusers in _ORIGINAL_TO_DIFFUSERS.items()}

DECODER_PREFIX = "decoder."
CONDITION_ENCODER_PREFIX = "encoder."
NULL_CONDITION = "null_condition_emb"
SILENCE_LATENT = "silence_latent"
# The parts of an original checkpoint that turn audio into 5 Hz tokens and back: covers need them, training never does.
AUDIO_TOKEN_PREFIXES = ("tokenizer.", "detokenizer.")

# Which linear layers of a block read the same input: diffusers' names, part by part.
SAME_INPUT = {
    "self_attn": (("to_q", "to_k", "to_v"), ("to_out.0",)),
    "cross_attn": (("to_q",), ("to_k", "to_v"), ("to_out.0",)),
    "mlp": (("gate_proj", "up_proj"), ("down_proj",)),
}


def _whole_parts(table: dict[str, str]) -> re.Pattern[str]:
    """Match any of the table's names where it is one or more whole dot-separated parts of a longer name."""
    return re.compile(rf"(?<![^.])(?:{'|'.join(map(re.escape, table))})(?![^.])")


_ORIGINAL_PARTS = _whole_parts(_ORIGINAL_TO_DIFFUSERS)
_DIFFUSERS_PARTS = _whole_parts(_DIFFUSERS_TO_ORIGINAL)


def to_diffusers(name: str) -> str:
    """Give diffusers' name for a module or parameter: `layers.0.self_attn.q_proj` becomes `layers.0.self_attn.to_q`.

    A bare target (`q_proj`) and a name with prefix or suffix (`base_model.model.….q_proj.lora_A.weight`) work alike;
    a name that is the same in both worlds (`mlp.gate_proj`) comes back unchanged.
    """
    return _ORIGINAL_PARTS.sub(lambda match: _ORIGINAL_TO_DIFFUSERS[match.group()], name)


def to_original(name: str) -> str:
    """Give ACE-Step's name for a module or parameter: the inverse of `to_diffusers`."""
    return _DIFFUSERS_PARTS.sub(lambda match: _DIFFUSERS_TO_ORIGINAL[match.group()], name)
