"""An exported adapter does to the weights what the trained one does, wherever it is loaded."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sidestep.errors import ConfigError, ModelError, RunError
from sidestep.exports import acestep_cpp
from sidestep.exports.base import BaseWeights
from sidestep.exports.run import export
from sidestep.exports.source import read_adapter
from sidestep.model.checkpoint import Checkpoint, find_checkpoint
from sidestep.model.loading import load_decoder
from sidestep.model.names import to_diffusers
from sidestep.model.pipeline import load_pipeline
from sidestep.training.adapters import ADAPTERS
from sidestep.training.adapters.base import Adapter, current_values, target_names
from tests.torch.tiny import tiny_config

CPU = torch.device("cpu")
LOSSLESS = 1e-5
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8, "alpha": 16.0},
    "rslora": {"rank": 8, "alpha": 16.0, "use_rslora": True},
    "mlp only": {"rank": 4, "alpha": 3.0, "target_modules": ("gate_proj", "down_proj")},
    "dora": {"adapter_type": "dora", "rank": 8, "alpha": 16.0},
    "lokr": {"adapter_type": "lokr", "rank": 2, "alpha": 4.0},
    "lokr whole": {"adapter_type": "lokr", "rank": 64, "alpha": 128.0},
    "lokr both": {"adapter_type": "lokr", "rank": 2, "alpha": 4.0, "lokr_decompose_both": True, "lokr_factor": 4},
    "lokr scalar": {"adapter_type": "lokr", "rank": 2, "alpha": 4.0, "lokr_use_scalar": True},
    "lokr dora": {"adapter_type": "lokr", "rank": 2, "alpha": 4.0, "lokr_weight_decompose": True},
    "loha": {"adapter_type": "loha", "rank": 4, "alpha": 8.0},
}


def trained(folder: Path, checkpoint: Checkpoint, **settings: Any) -> dict[str, Tensor]:
    """Write an adapter as a run of these settings leaves it; give what it does to each module's weight while it is
    trained, measured on the live decoder.
    """
    decoder = load_decoder(checkpoint, device=CPU, dtype=torch.float32)
    config = tiny_config(**settings)
    modules = target_names(
        len(decoder.layers), attention_type=config.attention_type, target_modules=config.target_modules
    )
    before = {module: response(decoder, module) for module in modules}
    adapter: Adapter = ADAPTERS[config.adapter_type](decoder, modules, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter.parameters.items():
            noise = torch.randn(parameter.shape, generator=generator)
            is_magnitude = "magnitude" in name or "dora_scale" in name
            parameter.copy_(parameter * (1 + 0.1 * noise) if is_magnitude else 0.2 * noise + 0.1)
            if name.endswith("scalar"):
                parameter.fill_(1.5)
    decoder.eval()
    folder.mkdir(parents=True)
    adapter.write(folder, current_values(adapter), about={"sidestep": '{"model_variant": "base"}'})
    return {module: response(decoder, module) - before[module] for module in modules}


@torch.no_grad()
def response(decoder: nn.Module, module: str) -> Tensor:
    """The weight a linear layer acts with, adapter and all, [out, in]: what it makes of each unit vector."""
    layer = decoder.get_submodule(to_diffusers(module))
    weight = layer.base_layer.weight if hasattr(layer, "base_layer") else layer.weight
    bias = layer(torch.zeros(1, weight.shape[1]))
    return (layer(torch.eye(weight.shape[1])) - bias).T.double()


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], limit: float = LOSSLESS) -> None:
    assert found.keys() == wanted.keys()
    largest = max(error(found[module], wanted[module]) for module in wanted)
    print(f"largest relative error {largest:.2g}")
    assert largest < limit


def changes_of(path: Path, checkpoint: Checkpoint) -> dict[str, Tensor]:
    from sidestep.exports.run import _whole

    base = BaseWeights(checkpoint)
    return {module: _whole(change, module, base) for module, change in read_adapter(path, base).changes.items()}


@pytest.mark.parametrize("kind", SETTINGS)
def test_an_adapter_is_read_as_it_was_trained(tmp_path: Path, base: Checkpoint, kind: str):
    wanted = trained(tmp_path / "run", base, **SETTINGS[kind])
    assert_same(changes_of(tmp_path / "run", base), wanted)


@pytest.mark.parametrize("kind", ["lora", "rslora", "mlp only", "dora"])
def test_diffusers_loads_the_export_at_full_strength(tmp_path: Path, base: Checkpoint, kind: str):
    wanted = trained(tmp_path / "run", base, **SETTINGS[kind])
    done = export(tmp_path / "run", base, target_name="diffusers", output=tmp_path / "out")
    assert done.error < LOSSLESS and done.rank is None
    pipeline = load_pipeline(base, device=CPU, dtype=torch.float32)
    before = {module: response(pipeline.transformer, module) for module in wanted}
    pipeline.load_lora_weights(str(tmp_path / "out"))
    assert_same({module: response(pipeline.transformer, module) - before[module] for module in wanted}, wanted)


@pytest.mark.parametrize("kind", ["lora", "rslora", "mlp only", "dora"])
def test_peft_loads_the_export_under_the_original_names(tmp_path: Path, base: Checkpoint, kind: str):
    wanted = trained(tmp_path / "run", base, **SETTINGS[kind])
    done = export(tmp_path / "run", base, target_name="peft", output=tmp_path / "out")
    assert done.error < LOSSLESS
    assert done.read_by == (("peft",) if kind == "dora" else ("peft", "acestep.cpp"))
    original = original_decoder(base)
    before = {module: response_of(original.get_submodule(module)) for module in wanted}
    loaded = PeftModel.from_pretrained(original, str(tmp_path / "out")).base_model.model.eval()
    assert_same({module: response_of(loaded.get_submodule(module)) - before[module] for module in wanted}, wanted)


@torch.no_grad()
def response_of(layer: nn.Module) -> Tensor:
    size = layer.in_features
    return (layer(torch.eye(size)) - layer(torch.zeros(1, size))).T.double()


def original_decoder(checkpoint: Checkpoint) -> nn.Module:
    """The decoder's layers under the original's names, with their weights."""
    weights = BaseWeights(checkpoint)
    root = weights.skeleton().to_empty(device="cpu")
    for module in weights.shapes:
        layer = root.get_submodule(module)
        layer.weight.data = weights.weight(module).float()
        if layer.bias is not None:
            layer.bias.data = weights.tensor(f"{module}.bias").float()
    return root


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_export_for_comfyui_means_the_same_by_its_own_rules(tmp_path: Path, base: Checkpoint, kind: str):
    wanted = trained(tmp_path / "run", base, **SETTINGS[kind])
    done = export(tmp_path / "run", base, target_name="comfyui", output=tmp_path / "song_style")
    assert done.files == ("song_style.safetensors",) and done.rank is None
    assert done.error < LOSSLESS
    tensors = load_file(tmp_path / "song_style" / "song_style.safetensors")
    alphas = [value for name, value in tensors.items() if name.endswith(".alpha")]
    assert alphas and all(alpha.ndim == 0 and alpha.dtype == torch.float32 for alpha in alphas)
    assert_same(dict(as_comfyui(tensors, base)), wanted)


def as_comfyui(tensors: dict[str, Tensor], checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """ComfyUI's rules, written down a second time: alpha over rank, Kronecker products, magnitudes on the base norm."""
    weights = BaseWeights(checkpoint)
    stems = {}
    for module in weights.shapes:
        stems |= {f"base_model.model.{module}": module, f"lycoris_{module.replace('.', '_')}": module}
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        stem = next(stem for stem in stems if name.startswith(stem + "."))
        groups.setdefault(stem, {})[name[len(stem) + 1 :]] = value.double()
    for stem, own in groups.items():
        weight = weights.weight(stems[stem])
        rank = 0
        if "lora_up.weight" in own:
            change, rank = own["lora_up.weight"] @ own["lora_down.weight"], own["lora_down.weight"].shape[0]
        elif "hada_w1_a" in own:
            change = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
            rank = own["hada_w1_b"].shape[0]
        else:
            second = own.get("lokr_w2")
            if second is None:
                second, rank = own["lokr_w2_a"] @ own["lokr_w2_b"], own["lokr_w2_b"].shape[0]
            change = torch.einsum("ab,cd->acbd", own["lokr_w1"], second).reshape(weight.shape)
        change = change * (own["alpha"] / rank if rank else 1.0)
        if "dora_scale" in own:
            assert own["dora_scale"].shape == (weight.shape[0], 1)
            change = (weight + change) * own["dora_scale"] / weight.norm(dim=1, keepdim=True) - weight
        yield stems[stem], change


@pytest.mark.parametrize("kind", ["lora", "rslora", "mlp only", "lokr", "lokr whole", "lokr both", "lokr scalar"])
def test_acestep_cpp_reads_the_export_for_comfyui(tmp_path: Path, base: Checkpoint, kind: str):
    wanted = trained(tmp_path / "run", base, **SETTINGS[kind])
    done = export(tmp_path / "run", base, target_name="comfyui", output=tmp_path / "out")
    assert done.read_by == ("comfyui", "acestep.cpp")
    assert_same(dict(acestep_cpp.read(tmp_path / "out" / "out.safetensors", BaseWeights(base))), wanted)


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "lokr dora", "loha"])
def test_a_merged_model_is_a_checkpoint_whose_weights_hold_the_change(tmp_path: Path, base: Checkpoint, kind: str):
    wanted = trained(tmp_path / "run", base, **SETTINGS[kind])
    root = tmp_path / "models"
    export(tmp_path / "run", base, target_name="merged", output=root / "acestep-v15-mine")
    for part in ("vae", "Qwen3-Embedding-0.6B"):
        (root / part).symlink_to(base.root / part)
    merged = find_checkpoint(root, "acestep-v15-mine", base_model="base")
    before, after = BaseWeights(base), BaseWeights(merged)
    assert_same({module: after.weight(module) - before.weight(module) for module in wanted}, wanted)
    old, new = (load_file(each.folder / "model.safetensors") for each in (base, merged))
    untouched = new.keys() - {f"decoder.{module}.weight" for module in wanted}
    assert all(torch.equal(old[name], new[name]) for name in untouched)
    assert (merged.folder / "silence_latent.pt").read_bytes() == (base.folder / "silence_latent.pt").read_bytes()
    load_decoder(merged, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("stem", ["model-", "part_"])
def test_a_merged_xl_model_keeps_its_shards(tmp_path: Path, stem: str):
    from sidestep.demo.checkpoint import build_toy_checkpoint

    folder = build_toy_checkpoint(tmp_path / "ck", variant="xl-base") / "acestep-v15-xl-base"
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-', f'"{stem}'))
    for shard in list(folder.glob("model-*")):
        shard.rename(folder / shard.name.replace("model-", stem))
    xl = find_checkpoint(tmp_path / "ck", "xl-base")
    wanted = trained(tmp_path / "run", xl, **SETTINGS["lora"])
    done = export(tmp_path / "run", xl, target_name="merged", output=tmp_path / "ck" / "acestep-v15-xl-mine")
    assert done.error < LOSSLESS
    merged = find_checkpoint(tmp_path / "ck", "acestep-v15-xl-mine", base_model="xl-base")
    names = {path.name for path in xl.folder.iterdir()}
    assert {path.name for path in merged.folder.iterdir()} == names and len(names) > 4
    before, after = BaseWeights(xl), BaseWeights(merged)
    assert_same({module: after.weight(module) - before.weight(module) for module in wanted}, wanted)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float64, 2**-53)])
def test_a_merged_model_is_the_sum_in_the_models_own_format_and_says_what_that_costs(
    tmp_path: Path, base: Checkpoint, dtype: torch.dtype, rounding: float
):
    root = tmp_path / "ck"
    folder = root / base.folder.name
    folder.mkdir(parents=True)
    for path in base.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    half = find_checkpoint(root, "base")
    wanted = trained(tmp_path / "run", half, **SETTINGS["lora"])
    done = export(tmp_path / "run", half, target_name="merged", output=root / "acestep-v15-mine")
    assert done.rounding_error < 5 * rounding and (done.rounding_error > 0 or dtype == torch.float64)
    merged = load_file(root / "acestep-v15-mine" / "model.safetensors")
    for module, change in wanted.items():
        name = f"decoder.{module}.weight"
        assert merged[name].dtype == dtype
        # What the change should be is known from factors in float32.
        assert error(merged[name].double(), tensors[name].double() + change) < max(rounding, 1e-6)


@pytest.mark.parametrize("target", ["diffusers", "peft"])
@pytest.mark.parametrize("kind", ["lokr", "loha", "lokr dora"])
def test_what_a_target_lacks_becomes_a_lora_and_the_cost_is_said(
    tmp_path: Path, base: Checkpoint, target: str, kind: str
):
    trained(tmp_path / "run", base, **SETTINGS[kind])
    costs = [
        export(tmp_path / "run", base, target_name=target, output=tmp_path / str(rank), rank=rank).conversion_error
        for rank in (2, 8, 48)
    ]
    assert costs[0] > costs[1] > 1e-3
    assert costs[2] < LOSSLESS  # 48 is the full rank of the toy's smallest side.


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "loha"])
def test_the_lora_is_the_best_of_its_rank(tmp_path: Path, base: Checkpoint, kind: str):
    wanted = trained(tmp_path / "run", base, **SETTINGS[kind])
    done = export(tmp_path / "run", base, target_name="peft", output=tmp_path / "out", rank=3)
    found = changes_of(tmp_path / "out", base)
    for module, change in wanted.items():
        lost = torch.linalg.svdvals(change)[3:].norm().item()
        assert (found[module] - change).norm().item() == pytest.approx(lost, rel=1e-3)
    assert done.rank == 3 and done.conversion_error == pytest.approx(
        max(error(found[module], wanted[module]) for module in wanted), rel=1e-4
    )


def test_ranks_of_a_map_are_padded_to_one(tmp_path: Path, base: Checkpoint):
    wanted = trained(tmp_path / "run", base, **SETTINGS["lora"])
    path = tmp_path / "run" / "adapter_model.safetensors"
    tensors = load_file(path)
    module = "layers.0.self_attn.q_proj"
    stem = f"base_model.model.{module}"
    up, down = tensors[f"{stem}.lora_B.weight"][:, :3], tensors[f"{stem}.lora_A.weight"][:3]
    tensors |= {f"{stem}.lora_B.weight": up.contiguous(), f"{stem}.lora_A.weight": down.contiguous()}
    save_file(tensors, path)
    config = (tmp_path / "run" / "adapter_config.json").read_text()
    patterns = '"rank_pattern": {"layers.0.self_attn.q_proj": 3}, "alpha_pattern": {"layers.0.self_attn.q_proj": 6}'
    (tmp_path / "run" / "adapter_config.json").write_text(config.replace('"r": 8', f'"r": 8, {patterns}'))
    wanted[module] = (up @ down).double() * 2
    for target in ("diffusers", "peft", "comfyui"):
        export(tmp_path / "run", base, target_name=target, output=tmp_path / target)
        assert_same(changes_of(tmp_path / target, base), wanted)


def test_files_of_other_programs_are_read_at_their_own_scale(tmp_path: Path, base: Checkpoint):
    down, up = torch.randn(4, 48), torch.randn(64, 4)
    module, wanted = "layers.1.self_attn.q_proj", (up @ down).double()
    cases = {
        "comfyui": ({f"diffusion_model.decoder.{module}.lora_down.weight": down,
                     f"diffusion_model.decoder.{module}.lora_up.weight": up,
                     f"diffusion_model.decoder.{module}.alpha": torch.tensor(8.0)}, None, 2.0),
        "kohya": ({"lora_unet_decoder_layers_1_self_attn_q_proj.lora_down.weight": down,
                   "lora_unet_decoder_layers_1_self_attn_q_proj.lora_up.weight": up}, None, 1.0),
        "diffusers": ({"transformer.layers.1.self_attn.to_q.lora_A.weight": down,
                       "transformer.layers.1.self_attn.to_q.lora_B.weight": up},
                      {"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 12}'}, 3.0),
        "doubled": ({f"base_model.model.base_model.model.{module}.lora_A.default.weight": down,
                     f"base_model.model.base_model.model.{module}.lora_B.default.weight": up}, None, 1.0),
    }  # fmt: skip
    for name, (tensors, header, scale) in cases.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path, metadata=header)
        assert_same(changes_of(path, base), {module: wanted * scale}, limit=1e-6)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (b'{"r": 4, "lora_alpha": "8"}', "states '8' as the alpha"),
        (b'{"r": 4, "lora_alpha": null}', "states None as the alpha"),
        (b'{"r": 4, "alpha_pattern": {"(": 3}}', "an unreadable alpha_pattern"),
        (b'{"r": 4, "alpha_pattern": [3]}', "an unreadable alpha_pattern"),
        (b'{"r": "\xe9', "is not valid JSON"),
    ],
)
def test_a_damaged_config_beside_an_adapter_is_named(tmp_path: Path, base: Checkpoint, config: bytes, said: str):
    trained(tmp_path / "run", base, **SETTINGS["lora"])
    (tmp_path / "run/adapter_config.json").write_bytes(config)
    with pytest.raises(ModelError, match=rf"adapter_config\.json .*{re.escape(said)}"):
        read_adapter(tmp_path / "run", BaseWeights(base))


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, base: Checkpoint):
    from sidestep.demo.checkpoint import build_toy_checkpoint

    xl = find_checkpoint(build_toy_checkpoint(tmp_path / "ck", variant="xl-base"), "xl-base")
    trained(tmp_path / "run", xl, **SETTINGS["lora"])
    with pytest.raises(ModelError, match="does not fit the base model"):
        export(tmp_path / "run", base, target_name="peft", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_does_not_mean_the_same_is_removed(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    from sidestep.exports import comfyui

    trained(tmp_path / "run", base, **SETTINGS["dora"])
    # What a naive conversion does: the magnitudes as they are.
    monkeypatch.setattr(comfyui, "_scale", lambda change, module, base: {"dora_scale": change.magnitude[:, None]})
    with pytest.raises(ModelError, match="would not sound the same: comfyui reads"):
        export(tmp_path / "run", base, target_name="comfyui", output=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_folder_that_holds_something_is_never_touched(tmp_path: Path, base: Checkpoint):
    trained(tmp_path / "run", base, **SETTINGS["lora"])
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "mine.safetensors").write_text("precious")
    with pytest.raises(ConfigError, match="holds something already"):
        export(tmp_path / "run", base, target_name="comfyui", output=tmp_path / "loras")
    assert (tmp_path / "loras" / "mine.safetensors").read_text() == "precious"


def test_an_export_that_cannot_be_written_says_so(tmp_path: Path, base: Checkpoint):
    trained(tmp_path / "run", base, **SETTINGS["lora"])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="could not be written") as raised:
        export(tmp_path / "run", base, target_name="peft", output=tmp_path / "file" / "out")
    assert raised.value.hint.endswith("then run it again.")


def test_biases_go_where_they_are_read(tmp_path: Path, base: Checkpoint):
    trained(tmp_path / "run", base, **SETTINGS["lora"], bias="all")
    for target in ("peft", "comfyui", "merged"):
        export(tmp_path / "run", base, target_name=target, output=tmp_path / target)
    with pytest.raises(ModelError, match="diffusers reads none"):
        export(tmp_path / "run", base, target_name="diffusers", output=tmp_path / "diffusers")
