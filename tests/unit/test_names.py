"""Tests of the one table between ACE-Step's names and diffusers'."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestep.model.names import to_diffusers, to_original

MANIFEST = json.loads((Path(__file__).parent.parent / "golden/reference/manifest.json").read_text(encoding="utf-8"))

PAIRS = [
    ("layers.0.self_attn.q_proj", "layers.0.self_attn.to_q"),
    ("layers.11.cross_attn.o_proj.weight", "layers.11.cross_attn.to_out.0.weight"),
    ("layers.3.self_attn.k_norm.weight", "layers.3.self_attn.norm_k.weight"),
    ("proj_in.1.weight", "proj_in_conv.weight"),
    ("proj_out.1", "proj_out_conv"),
    ("v_proj", "to_v"),
    (
        "base_model.model.layers.0.cross_attn.k_proj.lora_A.weight",
        "base_model.model.layers.0.cross_attn.to_k.lora_A.weight",
    ),
]


@pytest.mark.parametrize(("original", "diffusers"), PAIRS)
def test_a_name_is_translated_both_ways(original: str, diffusers: str):
    assert to_diffusers(original) == diffusers
    assert to_original(diffusers) == original


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.mlp.gate_proj",
        "time_embed.time_proj",
        "condition_embedder",
        "layers.10.proj_in.10",
        "my_q_proj",
        "norm_out",
    ],
)
def test_a_name_that_both_share_or_only_resembles_one_of_the_table_is_left_alone(name: str):
    assert to_diffusers(name) == name
    assert to_original(name) == name


def test_the_table_holds_every_rename_of_the_reference_cases():
    renames = MANIFEST["rename"]
    targets = renames["peft_target_modules"].items()
    parts = [tuple(part.strip(".") for part in pair) for pair in renames["checkpoint_original_to_diffusers"][6:]]
    for original, diffusers in (*targets, *parts):
        assert to_diffusers(original) == diffusers
        assert to_original(diffusers) == original


ORIGINAL_PARTS = [
    "layers",
    "0",
    "31",
    "self_attn",
    "cross_attn",
    "mlp",
    "q_proj",
    "o_proj",
    "up_proj",
    "q_norm",
    "weight",
]


@given(st.lists(st.sampled_from([*ORIGINAL_PARTS, "proj_in.1", "proj_out.1", "lora_B"]), min_size=1).map(".".join))
def test_there_and_back_gives_the_same_name(name: str):
    assert to_original(to_diffusers(name)) == name
    assert to_diffusers(to_diffusers(name)) == to_diffusers(name)
