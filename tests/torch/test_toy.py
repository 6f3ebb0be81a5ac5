"""Tests of the toy checkpoint and the toy songs: complete, reproducible, and readable by others."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from diffusers import AceStepPipeline
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepAudioTokenizer
from safetensors.torch import load_file

from sidestep.demo.checkpoint import build_toy_checkpoint, build_toy_tokenizer
from sidestep.demo.songs import write_toy_songs
from sidestep.model.checkpoint import check_encoders, find_checkpoint
from sidestep.model.loading import (
    load_condition_encoder,
    load_decoder,
    load_null_condition,
    load_silence_latent,
    load_text_encoder,
    load_vae,
)

CPU = torch.device("cpu")
FLOAT = {"device": CPU, "dtype": torch.float32}


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("variant", ["turbo", "base", "sft", "xl-turbo", "xl-base", "xl-sft"])
def test_every_variant_can_be_made_and_is_found_as_itself(tmp_path: Path, variant: str):
    checkpoint = find_checkpoint(build_toy_checkpoint(tmp_path, variant=variant), variant)
    check_encoders(checkpoint)
    assert checkpoint.variant == variant
    assert checkpoint.family == variant.removeprefix("xl-")
    assert checkpoint.is_xl == variant.startswith("xl-")
    assert (checkpoint.folder / "model.safetensors").is_file() != checkpoint.is_xl


def test_several_variants_live_in_one_folder(tmp_path: Path):
    for variant in ("turbo", "xl-base"):
        build_toy_checkpoint(tmp_path, variant=variant)
    assert find_checkpoint(tmp_path, "turbo").is_turbo
    assert find_checkpoint(tmp_path, "xl-base").is_xl


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_weights(tmp_path: Path, layout):
    first, again, other = (
        files_of(build_toy_checkpoint(tmp_path / name, variant="turbo", seed=seed, layout=layout))
        for name, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    assert first == again
    assert {name for name in first if first[name] != other[name]} >= {
        name for name in first if name.endswith(".safetensors")
    }


def test_it_is_small(tmp_path: Path):
    files = files_of(build_toy_checkpoint(tmp_path))
    assert sum(len(content) for content in files.values()) < 8_000_000


def test_it_holds_the_audio_tokenizer_of_a_real_checkpoint_under_its_names(tmp_path: Path):
    checkpoint = find_checkpoint(build_toy_checkpoint(tmp_path), "base")
    in_file = load_file(checkpoint.folder / "model.safetensors")
    assert "tokenizer.attention_pooler.layers.0.self_attn.q_norm.weight" in in_file
    assert "detokenizer.layers.0.self_attn.o_proj.weight" in in_file
    assert {name.split(".")[0] for name in in_file} == {
        "decoder",
        "encoder",
        "tokenizer",
        "detokenizer",
        "null_condition_emb",
    }


def test_the_tokenizer_ends_a_text_like_qwen3_embedding_and_gives_it_back():
    tokenizer = build_toy_tokenizer()
    ids = tokenizer("Mañana, 120 bpm\n").input_ids
    assert tokenizer.decode(ids) == "Mañana, 120 bpm\n<|endoftext|>"
    assert ids[-1] == tokenizer.pad_token_id == 0
    assert tokenizer("<|endoftext|>").input_ids == [0, 0]


@pytest.mark.parametrize("variant", ["base", "xl-turbo"])
def test_the_whole_way_from_a_song_to_a_velocity_is_finite_and_of_ordinary_size(tmp_path: Path, variant: str):
    checkpoint = find_checkpoint(build_toy_checkpoint(tmp_path, variant=variant), variant)
    (song, *_) = write_toy_songs(tmp_path / "songs", seconds=(0.4, 0.4))
    samples, _ = soundfile.read(song, dtype="float32")
    vae, (tokenizer, text_encoder) = load_vae(checkpoint, **FLOAT), load_text_encoder(checkpoint, **FLOAT)
    ids = tokenizer("# Caption\na bright melody", return_tensors="pt").input_ids
    mask = torch.ones(ids.shape)
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(samples.T).unsqueeze(0)).latent_dist
        latents = posterior.mode().transpose(1, 2)
        text = text_encoder(ids).last_hidden_state
        rows, _ = load_condition_encoder(checkpoint, **FLOAT)(
            text,
            mask,
            text_encoder.embed_tokens(ids),
            mask,
            load_silence_latent(checkpoint, frames=750),
            torch.zeros(1, dtype=torch.long),
        )
        context = torch.cat([load_silence_latent(checkpoint, frames=10), torch.ones(1, 10, 64)], dim=-1)
        velocity = load_decoder(checkpoint, **FLOAT)(
            torch.randn(1, 10, 64, generator=torch.Generator().manual_seed(0)),
            torch.tensor([0.5]),
            torch.tensor([0.5]),
            rows,
            context,
        ).sample
        audio = vae.decode(posterior.mode()).sample
    assert latents.shape == (1, 10, 64)
    assert posterior.std.max() < 0.05
    for tensor in (latents, text, rows, velocity):
        assert 0.3 < tensor.std() < 3
    assert 0.02 < audio.std() < 1


def test_it_learns(tmp_path: Path):
    checkpoint = find_checkpoint(build_toy_checkpoint(tmp_path), "base")
    decoder = load_decoder(checkpoint, **FLOAT).requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(1, 12, 64, generator=generator) for _ in range(2))
    rows = load_null_condition(checkpoint, **FLOAT).expand(1, 5, -1)
    context = torch.cat([load_silence_latent(checkpoint, frames=12), torch.ones(1, 12, 64)], dim=-1)
    t = torch.tensor([0.5])
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = (decoder((x0 + x1) / 2, t, t, rows, context).sample - (x1 - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_diffusers_reads_the_pipeline_and_renders_with_it(tmp_path: Path):
    root = build_toy_checkpoint(tmp_path, variant="turbo", layout="diffusers")
    pipeline = AceStepPipeline.from_pretrained(root, local_files_only=True)
    assert isinstance(pipeline.audio_tokenizer, AceStepAudioTokenizer)
    pipeline.set_progress_bar_config(disable=True)
    audio = pipeline(
        prompt="a bright melody",
        lyrics="[Instrumental]",
        audio_duration=0.4,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).audios
    assert audio.shape[-2:] == (2, 19_200)
    assert torch.isfinite(audio).all()


def test_the_songs_are_reproducible_stereo_and_of_two_lengths(tmp_path: Path):
    first, again, other = (write_toy_songs(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(first, other, strict=True))
    infos = [soundfile.info(path) for path in first]
    assert {(info.samplerate, info.channels) for info in infos} == {(48_000, 2)}
    assert sorted(info.duration for info in infos) == [4.0, 4.0, 5.0, 5.0]
    for path in first:
        samples, _ = soundfile.read(path)
        assert np.abs(samples).max() == pytest.approx(0.7, abs=0.01)
        assert np.abs(samples[:, 0] - samples[:, 1]).max() > 0.05


def test_the_songs_have_sidecars_of_both_conventions_and_one_is_instrumental(tmp_path: Path):
    songs = write_toy_songs(tmp_path, seconds=(0.5, 0.6))
    with_keys = [path for path in songs if path.with_suffix(".txt").is_file()]
    official = [path for path in songs if path.with_suffix(".caption.txt").is_file()]
    assert len(with_keys) == len(official) == 2
    texts = [path.with_suffix(".txt").read_text(encoding="utf-8") for path in with_keys]
    assert all(text.startswith("caption: ") and "\nbpm: " in text for text in texts)
    assert sum("is_instrumental: true" in text for text in texts) == 1
    for path in official:
        assert path.with_suffix(".lyrics.txt").read_text(encoding="utf-8").startswith("[Verse]")
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        assert facts.keys() == {"bpm", "keyscale", "timesignature", "language"}
