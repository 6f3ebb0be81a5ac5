"""The reference case `prep_song_a_lora`, part by part: a complete run of the official preprocessing of one song.

Ours differs on purpose in three things: target latents are the posterior's mode, lyrics carry the language header, and
the timbre reference is silence. Each part is compared with the original's words or numbers where they are the same.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sidestep.data.dataset_file import Dataset, Track
from sidestep.data.prompts import Prompt, prompts_of
from sidestep.model.checkpoint import Checkpoint, find_checkpoint
from sidestep.model.loading import load_condition_encoder, load_silence_latent, load_text_encoder, load_vae
from sidestep.preprocess.encode_audio import Loudness, encode_wave, load_wave
from sidestep.preprocess.encode_condition import context_latents, encode_condition
from sidestep.preprocess.encode_text import encode_prompt, tokenize
from sidestep.preprocess.tensors import read_sample, sample_frames, sample_paths
from tests.golden.reference_cases import REFERENCE, cases

CASE = next(case.entry for case in cases("preprocess") if str(case) == "acestep-v15-turbo/prep_song_a_lora")
CPU = torch.device("cpu")
HIDDEN = {"atol": CASE["tol"]["hidden_atol"], "rtol": 1e-4}
LATENTS = {"atol": CASE["tol"]["latents_atol"], "rtol": 1e-4}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return find_checkpoint(REFERENCE / "checkpoints", "turbo")


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(REFERENCE / CASE["file"])


def official_dataset() -> Dataset:
    fields = {key: value for key, value in CASE["sample"].items() if key != "labeled"}
    track = Track(id="0" * 8, audio_path=REFERENCE / CASE["audio"], name="song_a.wav", **fields)
    return Dataset(folder=REFERENCE, tracks=(track,), tag_position="prepend")


def valid_ids(expected: dict[str, torch.Tensor], kind: str) -> list[int]:
    count = int(expected[f"out.{kind}_attention_mask"].sum())
    return expected[f"out.{kind}_input_ids"][0, :count].tolist()


def test_the_prompt_is_the_officials_to_the_letter() -> None:
    (prompt,) = prompts_of(official_dataset())
    assert prompt.text == CASE["text_prompt"]


def test_the_lyrics_are_the_officials_under_a_language_header() -> None:
    (prompt,) = prompts_of(official_dataset())
    assert prompt.lyrics == f"# Languages\nen\n\n# Lyric\n{CASE['lyrics_text']}<|endoftext|>"


@torch.inference_mode()
def test_latents_are_the_mean_the_original_sampled_around(checkpoint: Checkpoint, expected: dict) -> None:
    vae = load_vae(checkpoint, device=CPU, dtype=torch.float32)
    unchanged = Loudness(mode="none", target_db=-1.0, target_lufs=-14.0)
    latents = encode_wave(vae, load_wave(REFERENCE / CASE["audio"], max_seconds=240.0, loudness=unchanged))
    torch.testing.assert_close(latents, expected["out.latent_mean"], **LATENTS)
    sampled = latents + expected["out.latent_std"] * expected["in.vae_noise"]
    torch.testing.assert_close(sampled, read_sample(REFERENCE / CASE["pt"]).target_latents, **LATENTS)


@torch.inference_mode()
def test_tokens_and_hidden_states_are_the_originals(checkpoint: Checkpoint, expected: dict) -> None:
    tokenizer, encoder = load_text_encoder(checkpoint, device=CPU, dtype=torch.float32)
    # The official run encodes the bare lyrics; the same words give the same numbers.
    encoded = encode_prompt(tokenizer, encoder, Prompt(text=CASE["text_prompt"], lyrics=CASE["lyrics_text"]))
    assert tokenize(tokenizer, CASE["text_prompt"], limit=256).ids[0].tolist() == valid_ids(expected, "text")
    assert tokenize(tokenizer, CASE["lyrics_text"], limit=2048).ids[0].tolist() == valid_ids(expected, "lyric")
    assert encoded.counts == {
        "caption_tokens": CASE["facts"]["n_text"],
        "lyric_tokens": CASE["facts"]["n_lyric"],
        "caption_truncated": 0,
        "lyrics_truncated": 0,
    }
    torch.testing.assert_close(encoded.text, expected["out.text_hidden_states"][:, : encoded.text.shape[1]], **HIDDEN)
    torch.testing.assert_close(
        encoded.lyrics, expected["out.lyric_hidden_states"][:, : encoded.lyrics.shape[1]], **HIDDEN
    )


@torch.inference_mode()
def test_conditions_are_the_valid_rows_of_the_official_file(checkpoint: Checkpoint, expected: dict) -> None:
    encoder = load_condition_encoder(checkpoint, device=CPU, dtype=torch.float32)
    count_text, count_lyrics = CASE["facts"]["n_text"], CASE["facts"]["n_lyric"]
    states = encode_condition(
        encoder,
        text=expected["out.text_hidden_states"][:, :count_text],
        lyrics=expected["out.lyric_hidden_states"][:, :count_lyrics],
        timbre=torch.zeros(1, 1, 64),  # The official trainer's reference; ours is silence.
    )
    official = read_sample(REFERENCE / CASE["pt"])
    assert official.encoder_hidden_states.shape[0] == CASE["facts"]["valid"] == states.shape[0]
    torch.testing.assert_close(states, official.encoder_hidden_states, **HIDDEN)


def test_silence_as_timbre_is_that_of_inference(checkpoint: Checkpoint) -> None:
    case = load_file(REFERENCE / "cases/acestep-v15-turbo/cond_silence_timbre.safetensors")
    rows = {kind: case[f"in.{kind}_hidden_states"] for kind in ("text", "lyric")}
    masks = {kind: case[f"in.{kind}_attention_mask"][0].bool() for kind in ("text", "lyric")}
    with torch.inference_mode():
        states = encode_condition(
            load_condition_encoder(checkpoint, device=CPU, dtype=torch.float32),
            text=rows["text"][:, masks["text"]],
            lyrics=rows["lyric"][:, masks["lyric"]],
            timbre=load_silence_latent(checkpoint, frames=750),
        )
    valid = case["out.encoder_attention_mask"][0].bool()
    torch.testing.assert_close(states, case["out.encoder_hidden_states"][0][valid], **HIDDEN)


def test_the_context_is_silence_and_ones_as_in_the_official_file(checkpoint: Checkpoint) -> None:
    official = read_sample(REFERENCE / CASE["pt"])
    frames = official.target_latents.shape[0]
    assert torch.equal(context_latents(load_silence_latent(checkpoint, frames=frames)), official.context_latents)


def test_the_official_folder_is_read_as_it_is_and_trimmed() -> None:
    (path,) = sample_paths((REFERENCE / CASE["pt"]).parent)
    sample = read_sample(path)
    stored = torch.load(path, weights_only=True)
    assert stored["encoder_hidden_states"].shape == (769, 40)
    assert sample.encoder_hidden_states.shape == (143, 40)
    kept = np.flatnonzero(stored["encoder_attention_mask"].numpy())
    assert torch.equal(sample.encoder_hidden_states, stored["encoder_hidden_states"][kept])
    assert sample_frames(path) == 22
    assert sample.metadata["preprocess_mode"] == "lora"
