"""Rendering: the same sound that diffusers gives without us, with any adapter, at any strength."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from diffusers import AceStepPipeline

from sidestep.demo.checkpoint import build_toy_checkpoint
from sidestep.errors import ModelError
from sidestep.exports.base import BaseWeights
from sidestep.exports.run import export
from sidestep.exports.source import read_adapter
from sidestep.listen.attach import Attached
from sidestep.listen.conditions import encode_prompts
from sidestep.listen.prompts import SamplePrompt
from sidestep.listen.render import Renderer, Sampling, decode, usual_sampling
from sidestep.listen.studio import Studio
from sidestep.main import main
from sidestep.model.checkpoint import Checkpoint, find_checkpoint
from sidestep.model.loading import load_decoder, load_vae
from sidestep.model.pipeline import load_pipeline
from tests.torch.test_exports import SETTINGS, response, trained

FLOAT = {"device": torch.device("cpu"), "dtype": torch.float32}
PROMPT = SamplePrompt(
    caption="warm synths", lyrics="[Verse]\nla la", language="en", bpm=96, keyscale="C major", timesignature="4"
)
WORDS = {"prompt": PROMPT.caption, "lyrics": PROMPT.lyrics, "vocal_language": PROMPT.language, "bpm": PROMPT.bpm,
         "keyscale": PROMPT.keyscale, "timesignature": PROMPT.timesignature}  # fmt: skip
FEW = Sampling(steps=3, guidance=4.0)


def by_us(checkpoint: Checkpoint, sampling: Sampling = FEW, *, seconds: float = 1.0, seed: int = 7) -> np.ndarray:
    (wording,) = encode_prompts(checkpoint, [PROMPT], seconds=seconds, seed=seed, **FLOAT)
    decoder = load_decoder(checkpoint, **FLOAT)
    return Renderer(checkpoint, decoder, seconds=seconds, **FLOAT).render(wording, sampling)


def by_pipeline(pipeline: AceStepPipeline, sampling: Sampling = FEW, *, seconds: float = 1.0) -> np.ndarray:
    output = pipeline(
        **WORDS,
        audio_duration=seconds,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        generator=torch.Generator().manual_seed(7),
    )
    return output.audios[0].numpy()


def assert_equal_sound(found: np.ndarray, wanted: np.ndarray, limit: float = 1e-4) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < limit


@pytest.mark.parametrize("variant", ["base", "turbo"])
def test_the_sound_is_what_diffusers_gives_from_the_same_weights_without_us(tmp_path: Path, variant: str):
    ours = find_checkpoint(build_toy_checkpoint(tmp_path / "original", variant=variant), variant)
    theirs = build_toy_checkpoint(tmp_path / "diffusers", variant=variant, layout="diffusers")
    sampling = FEW if variant == "base" else Sampling(steps=3, guidance=1.0)
    assert_equal_sound(by_us(ours, sampling), by_pipeline(AceStepPipeline.from_pretrained(theirs), sampling))


@pytest.mark.parametrize(("variant", "steps", "guidance"), [("turbo", 8, 1.0), ("base", 50, 7.0), ("sft", 50, 7.0)])
def test_every_model_is_sampled_as_it_is_meant_to_be(tmp_path: Path, variant: str, steps: int, guidance: float):
    checkpoint = find_checkpoint(build_toy_checkpoint(tmp_path, variant=variant), variant)
    assert usual_sampling(checkpoint) == Sampling(steps=steps, guidance=guidance, shift=3.0)


def test_xl_goes_through_the_corrected_timbre_encoder(tmp_path: Path):
    xl = find_checkpoint(build_toy_checkpoint(tmp_path / "original", variant="xl-base"), "xl-base")
    stock = build_toy_checkpoint(tmp_path / "diffusers", variant="xl-base", layout="diffusers")
    found = by_us(xl)
    assert_equal_sound(found, by_pipeline(load_pipeline(xl, **FLOAT)))
    assert np.abs(found - by_pipeline(AceStepPipeline.from_pretrained(stock))).max() > 1e-3


def test_tiles_decode_to_the_sound_of_the_whole(base: Checkpoint):
    vae = load_vae(base, **FLOAT)
    latents = torch.randn(1, 64, 60, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = vae.decode(latents).sample[0]
        for tile_frames in (7, 25, 60, 100):
            tiled = decode(vae, latents, tile_frames=tile_frames)
            assert tiled.shape == whole.shape == (2, 60 * 1920)
            assert (tiled - whole).abs().max() < 1e-5 * whole.abs().max()


@pytest.mark.parametrize("kind", SETTINGS)
def test_any_adapter_acts_as_it_was_trained_and_leaves_no_trace(tmp_path: Path, base: Checkpoint, kind: str):
    wanted = trained(tmp_path / "run", base, **SETTINGS[kind])
    decoder = load_decoder(base, **FLOAT)
    before = {module: response(decoder, module) for module in wanted}
    weights = BaseWeights(base)
    attached = Attached(decoder, read_adapter(tmp_path / "run", weights), weights)
    for strength in (1.0, 0.5, 0.0):
        attached.strength = strength
        for module, change in wanted.items():
            found = response(decoder, module) - before[module]
            assert (found - strength * change).norm() <= 1e-5 * change.norm()
    attached.strength = 1.0
    attached.remove()
    assert all(torch.equal(response(decoder, module), before[module]) for module in wanted)


def test_biases_act_too(tmp_path: Path, base: Checkpoint):
    trained(tmp_path / "run", base, **SETTINGS["lora"], bias="all")
    export(tmp_path / "run", base, target_name="merged", output=tmp_path / "models" / "acestep-v15-mine")
    for part in ("vae", "Qwen3-Embedding-0.6B"):
        (tmp_path / "models" / part).symlink_to(base.root / part)
    merged = find_checkpoint(tmp_path / "models", "acestep-v15-mine", base_model="base")
    decoder, whole = load_decoder(base, **FLOAT), load_decoder(merged, **FLOAT)
    weights = BaseWeights(base)
    Attached(decoder, read_adapter(tmp_path / "run", weights), weights)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 10, 64, generator=generator),
        "timestep": torch.tensor([0.5]),
        "timestep_r": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 5, base.encoder_width, generator=generator),
        "context_latents": torch.randn(1, 10, 128, generator=generator),
    }
    with torch.no_grad():
        found, wanted = decoder(**inputs).sample, whole(**inputs).sample
        plain = load_decoder(base, **FLOAT)(**inputs).sample
    assert (found - wanted).abs().max() < 1e-4 < (plain - wanted).abs().max()


def test_exports_of_one_adapter_sound_the_same(tmp_path: Path, base: Checkpoint):
    trained(tmp_path / "run", base, **SETTINGS["dora"])
    paths = [tmp_path / "run"]
    for target in ("diffusers", "comfyui", "peft"):
        export(tmp_path / "run", base, target_name=target, output=tmp_path / target)
        paths.append(tmp_path / target)
    sounds = []
    for path in paths:
        studio = Studio(base, [PROMPT], adapter=path, seconds=1, seed=7, sampling=FEW, **FLOAT)
        sounds.append(studio.renderer.render(studio.wordings[0], FEW))
    for sound in sounds[1:]:
        assert_equal_sound(sound, sounds[0])
    assert np.abs(sounds[0] - by_us(base)).max() > 1e-2


def test_sample_writes_a_file_for_each_strength(tmp_path: Path, base: Checkpoint):
    trained(tmp_path / "run", base, **SETTINGS["lokr"])
    words = ["sample", "--adapter", str(tmp_path / "run"), "-c", str(base.root), "--prompt", "Warm synths!"]
    words += ["--duration", "1", "--steps", "2", "--strengths", "0", "0.5", "1", "--output", str(tmp_path / "out")]
    assert main([*words, "--plain", "--device", "cpu"]) == 0
    paths = [tmp_path / "out" / f"Warm-synths_seed42_x{strength}.flac" for strength in ("0", "0.5", "1")]
    sounds = [soundfile.read(path) for path in paths]
    assert all(rate == 48_000 and sound.shape == (48_000, 2) for sound, rate in sounds)
    assert all(np.abs(sound).max() == pytest.approx(10 ** (-1 / 20), abs=1e-3) for sound, _ in sounds)
    assert np.abs(sounds[0][0] - sounds[1][0]).max() > 1e-3 < np.abs(sounds[1][0] - sounds[2][0]).max()


def test_sample_overwrites_nothing(tmp_path: Path, base: Checkpoint):
    prompts = tmp_path / "prompts.json"
    prompts.write_text('[{"caption": "x", "seed": 1}, {"caption": "x!", "seed": 1, "lyrics": "la la"}]')
    words = ["sample", "-c", str(base.root), "-M", "base", "--prompts", str(prompts), "--duration", "1", "--steps", "2"]
    assert main([*words, "--plain", "--device", "cpu", "--output", str(tmp_path / "out")]) == 0
    first, second = (soundfile.read(tmp_path / "out" / f"x_seed1_x0{end}.flac")[0] for end in ("", "_2"))
    assert np.abs(first - second).max() > 1e-3


def test_sample_refuses_what_cannot_be_meant(tmp_path: Path, turbo: Checkpoint, capsys: pytest.CaptureFixture[str]):
    model = ["-c", str(turbo.root), "-M", "turbo", "--plain"]
    assert main(["sample", *model]) == 2
    assert main(["sample", *model, "--prompt", "x", "--guidance", "7"]) == 2
    assert main(["sample", *model, "--prompt", " "]) == 2
    assert main(["sample", *model, "--prompt", "x", "--seed", str(2**64)]) == 2
    assert main(["sample", *model, "--prompt", "x", "--adapter", str(tmp_path / "no")]) == 1
    shown = capsys.readouterr().err
    assert "Give either --prompt TEXT or --prompts FILE." in shown
    assert "--guidance has no effect on turbo" in shown
    assert "a caption cannot be blank" in shown
    assert "--seed takes a whole number from 0 to" in shown
    assert "There is no adapter" in shown


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, base: Checkpoint):
    xl = find_checkpoint(build_toy_checkpoint(tmp_path / "ck", variant="xl-base"), "xl-base")
    trained(tmp_path / "run", xl, **SETTINGS["lora"])
    with pytest.raises(ModelError, match="does not fit the base model"):
        Studio(base, [PROMPT], adapter=tmp_path / "run", seconds=1, seed=0, sampling=FEW, **FLOAT)
