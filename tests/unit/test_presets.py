"""Presets: the shipped ones are sound, the user's own win, and no mistake in one goes unnoticed."""

import errno
import json
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import pytest

from sidestep.commands.train import _remember as remember_checkpoints
from sidestep.config.places import default_checkpoint_dir
from sidestep.config.presets import (
    SHIPPED,
    delete_preset,
    is_own_preset,
    preset_description,
    preset_folders,
    preset_names,
    read_preset,
    read_run_config,
    run_config_text,
    save_preset,
)
from sidestep.config.recipe import RECIPE_PINS, learning_rate_of
from sidestep.config.resolve import resolve_training
from sidestep.config.runs import STATE_FILE
from sidestep.config.settings import settings_of
from sidestep.config.train import TrainConfig
from sidestep.errors import ConfigError, RunError
from sidestep.ui.console import open_console
from sidestep.ui.machine import PRESETS_BY_MEMORY

PROMISED = {
    "recommended", "high_quality", "quick_test", "vram_24gb_plus", "vram_16gb", "vram_12gb", "vram_10gb", "vram_8gb",
    "vram_6gb",
}  # fmt: skip
FOLDERS = {"dataset_dir": "tensors", "output_dir": "out"}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A settings folder of the test's own; returns where the user's presets are."""
    for variable in ("XDG_CONFIG_HOME", "APPDATA", "HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    folder = preset_folders()[0]
    folder.mkdir(parents=True)
    return folder


def config(**values: object) -> TrainConfig:
    return resolve_training("fixed", {**FOLDERS, **values}).config


def write(folder: Path, name: str, content: object) -> None:
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def test_the_promised_presets_are_shipped():
    assert {path.stem for path in SHIPPED.glob("*.json")} >= PROMISED
    assert {name for _, name in PRESETS_BY_MEMORY} <= PROMISED


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.json")))
def test_a_shipped_preset_is_sound(name: str):
    values = read_preset(name)
    preset = resolve_training("fixed", FOLDERS, preset=name).config
    assert {key: getattr(preset, key) for key in values} == values
    assert preset.alpha == 2 * preset.rank
    assert preset.epochs % preset.save_every == 0
    description = preset_description(name)
    assert description.endswith(".") and len(description) <= 60
    assert json.loads((SHIPPED / f"{name}.json").read_text(encoding="utf-8"))["name"] == name


def test_a_shipped_preset_leaves_the_learning_rate_to_the_optimizer():
    for name in sorted(PROMISED - {"quick_test"}):
        preset = resolve_training("fixed", {**FOLDERS, "optimizer_type": "prodigy"}, preset=name).config
        assert learning_rate_of(preset) == 1.0, name


def test_less_memory_never_asks_for_more():
    presets = [resolve_training("fixed", FOLDERS, preset=name).config for _, name in PRESETS_BY_MEMORY]
    for larger, smaller in pairwise(presets):
        assert smaller.rank <= larger.rank and smaller.batch_size <= larger.batch_size
        assert smaller.offload_encoder >= larger.offload_encoder
    assert all(preset.gradient_checkpointing for preset in presets)


def test_a_preset_is_saved_and_read_again_with_what_differs_from_the_defaults():
    path = save_preset(
        "夜の歌", config(rank=24, target_modules=("q_proj", "down_proj"), learning_rate=3e-4, use_rslora=True)
    )
    assert path.parent == preset_folders()[0]
    expected = {"rank": 24, "target_modules": ("q_proj", "down_proj"), "learning_rate": 3e-4, "use_rslora": True}
    assert read_preset("夜の歌") == expected
    assert resolve_training("fixed", FOLDERS, preset="夜の歌").config == config(**expected)


def test_folders_and_devices_are_no_part_of_a_saved_preset():
    save_preset("mine", config(device="cpu", precision="fp32", checkpoint_dir="models", audio_dir="songs"))
    assert read_preset("mine") == {}


def test_flags_win_over_the_preset_and_the_preset_over_the_defaults(own_folder: Path):
    write(own_folder, "mine", {"rank": 24, "epochs": 7})
    resolved = resolve_training("fixed", {**FOLDERS, "epochs": "9"}, preset="mine").config
    assert (resolved.rank, resolved.epochs, resolved.alpha) == (24, 9, 128.0)


def test_the_recipes_pins_win_over_the_preset(own_folder: Path):
    write(own_folder, "mine", {"cfg_ratio": 0.5, "timestep_mode": "continuous"})
    resolved = resolve_training("vanilla", FOLDERS, preset="mine").config
    assert (resolved.cfg_ratio, resolved.timestep_mode) == (0.0, "discrete")


def test_the_users_own_preset_wins_over_a_shipped_one_until_it_is_deleted(own_folder: Path):
    shipped = read_preset("recommended")
    write(own_folder, "recommended", {"description": "Mine.", "rank": 5})
    assert read_preset("recommended") == {"rank": 5}
    assert preset_description("recommended") == "Mine."
    assert is_own_preset("recommended") and not is_own_preset("quick_test")
    delete_preset("recommended")
    assert read_preset("recommended") == shipped
    delete_preset("quick_test")
    assert "quick_test" in preset_names()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rnk": 8}, "Preset mine: There is no setting 'rnk' (did you mean rank?)."),
        ({"rank": 0}, "--rank takes a whole number from 1 to 4096, not 0."),
        ({"rank": "many"}, "--rank takes"),
        ({"rank": True}, "--rank takes"),
        ({"rank": [8]}, "--rank takes"),
        ({"adapter_type": "lorra"}, "(did you mean lora?)"),
        ({"target_modules": ["q_porj"]}, "(did you mean q_proj?)"),
        ({"target_modules": []}, "--target-modules takes"),
        ({"output_dir": "there"}, "output_dir cannot be part of a preset."),
        ({"rank": 0, "epochs": -1}, "--epochs takes"),
        ([1], "does not hold settings"),
    ],
)
def test_a_mistake_in_a_preset_is_an_error_that_names_it(own_folder: Path, content: object, message: str):
    write(own_folder, "mine", content)
    with pytest.raises(ConfigError) as caught:
        read_preset("mine")
    assert message in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize("text", ["{", '{"rank": 1e999}', "\udcff".encode("utf-8", "surrogatepass").decode("latin-1")])
def test_a_damaged_preset_is_an_error(own_folder: Path, text: str):
    (own_folder / "mine.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError):
        read_preset("mine")


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(ConfigError) as caught:
        read_preset("recomended")
    assert caught.value.message == "There is no preset 'recomended' (did you mean recommended?)."
    assert "quick_test" in caught.value.hint


@pytest.mark.parametrize("name", ["", " ", "a/b", "..", "a\\b", "nul", "x:y", "."])
def test_a_name_that_no_file_can_have_is_refused(name: str):
    with pytest.raises(ConfigError, match="cannot be the name of a preset"):
        save_preset(name, config())


def test_a_preset_is_read_by_the_name_it_was_saved_under():
    save_preset("Größe für 8 GB", config(rank=5))
    assert read_preset("Größe für 8 GB") == read_preset("Größe_für_8_GB") == {"rank": 5}


def refuse(path: Path, *words: object, **options: object) -> NoReturn:
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def test_a_preset_that_may_not_be_read_is_no_bug(own_folder: Path, monkeypatch: pytest.MonkeyPatch):
    write(own_folder, "secret", {"rank": 6})
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ConfigError, match=r"secret\.json cannot be read: Permission denied\."):
        read_preset("secret")


def test_a_settings_folder_that_may_not_be_opened_is_no_bug_and_no_reason_not_to_train(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(Path, "is_file", refuse)
    monkeypatch.setattr(Path, "glob", refuse)
    with pytest.raises(RunError, match="presets cannot be read: Permission denied") as caught:
        preset_names()
    assert "HOME" in caught.value.hint
    with pytest.raises(RunError, match=r"settings\.json cannot be read"):
        default_checkpoint_dir()
    remember_checkpoints(Path("models"), open_console(plain=True))
    assert "The next start will not know this checkpoint folder" in capsys.readouterr().out


def test_a_preset_file_with_spaces_in_its_name_wins_over_one_with_underscores(own_folder: Path):
    write(own_folder, "my preset", {"rank": 6})
    write(own_folder, "my_preset", {"rank": 7})
    assert (read_preset("my preset"), read_preset("my_preset")) == ({"rank": 6}, {"rank": 7})


def test_a_runs_config_is_read_back_as_it_was(tmp_path: Path):
    before = config(rank=24, learning_rate=1 / 3)
    path = tmp_path / "config.json"
    path.write_text(run_config_text(before, recipe="vanilla", version="1", objective=""), encoding="utf-8")
    recipe, values = read_run_config(path)
    assert recipe == "vanilla"
    assert values["learning_rate"] == 1 / 3 and values["output_dir"] == Path("out").resolve()
    assert set(values) == {setting.name for setting in settings_of(TrainConfig)} - {"resume_from"}


def test_what_vanilla_pins_is_neither_saved_as_a_preset_nor_taken_over_by_fixed(tmp_path: Path):
    before = resolve_training("vanilla", {**FOLDERS, "rank": 24}).config
    save_preset("mine", before, without=RECIPE_PINS["vanilla"])
    assert read_preset("mine") == {"rank": 24}
    path = tmp_path / "config.json"
    path.write_text(run_config_text(before, recipe="vanilla", version="1", objective=""), encoding="utf-8")
    after = resolve_training("fixed", FOLDERS, source=path).config
    assert (after.rank, after.timestep_mode, after.shift, after.cfg_ratio) == (24, "auto", None, None)
    assert resolve_training("vanilla", FOLDERS, source=path).config == before


def test_the_songs_of_an_earlier_run_are_not_preprocessed_again(tmp_path: Path):
    before = config(preprocess=True, audio_dir="songs", tensor_output="tensors")
    path = tmp_path / "config.json"
    path.write_text(run_config_text(before, recipe="fixed", version="1", objective=""), encoding="utf-8")
    after = resolve_training("fixed", {**FOLDERS, "dataset_dir": "others"}, source=path).config
    assert not after.preprocess and after.dataset_dir == Path("others")
    # The run's folder stands for its config.json.
    assert resolve_training("fixed", {**FOLDERS, "dataset_dir": "others"}, source=tmp_path).config == after


def test_what_a_preset_or_an_earlier_run_sets_for_another_kind_of_adapter_is_said(own_folder: Path, tmp_path: Path):
    lokr = {**FOLDERS, "adapter_type": "lokr"}
    write(own_folder, "mine", {"use_rslora": True, "bias": "none", "rank": 8})
    sentence = "--use-rslora has no effect here: it counts only with --adapter-type lora or dora."
    assert resolve_training("fixed", lokr, preset="mine").notices == (f"{sentence} Preset mine sets it.",)
    assert resolve_training("fixed", FOLDERS, preset="mine").notices == ()
    # Preprocessing is done, and what was set for it is no news.
    before = config(use_rslora=True, preprocess=True, audio_dir="songs", tensor_output="tensors", normalize="peak")
    path = tmp_path / "config.json"
    path.write_text(run_config_text(before, recipe="fixed", version="1", objective=""), encoding="utf-8")
    assert resolve_training("fixed", lokr, source=path).notices == (f"{sentence} {path} sets it.",)


def test_a_rank_map_of_an_earlier_run_is_refused_for_an_adapter_that_has_no_ranks_of_its_own(tmp_path: Path):
    path = tmp_path / "config.json"
    text = run_config_text(config(rank_map=str(tmp_path / "map.json")), recipe="fixed", version="1", objective="")
    path.write_text(text, encoding="utf-8")
    assert resolve_training("fixed", FOLDERS, source=path).config.rank_map == tmp_path / "map.json"
    with pytest.raises(
        ConfigError, match=r"--config brings --rank-map .*, which counts only with --adapter-type lora or dora"
    ):
        resolve_training("fixed", {**FOLDERS, "adapter_type": "lokr"}, source=path)


def test_a_dataset_beside_songs_that_are_preprocessed_is_said_to_have_no_effect():
    songs = {"preprocess": True, "audio_dir": "songs", "tensor_output": "tensors", "output_dir": "b"}
    (said,) = resolve_training("fixed", {**songs, "dataset_dir": "others"}).notices
    assert (
        said == "--dataset-dir has no effect with --preprocess: training goes on with the tensors of --tensor-output."
    )
    assert resolve_training("fixed", {**songs, "dataset_dir": "tensors"}).notices == ()
    assert resolve_training("fixed", songs).notices == ()


def test_what_is_typed_for_preprocessing_is_said_to_have_no_effect_without_it():
    typed = {**FOLDERS, "normalize": "peak", "audio_dir": "songs"}
    without = "has no effect without --preprocess: --dataset-dir is trained on as it is."
    assert resolve_training("fixed", typed).notices == (f"--audio-dir {without}", f"--normalize {without}")
    songs = {"preprocess": True, "audio_dir": "songs", "tensor_output": "tensors", "normalize": "peak"}
    assert resolve_training("fixed", songs).notices == ()


def test_what_a_preset_or_an_earlier_run_sets_and_vanilla_pins_is_said(own_folder: Path, tmp_path: Path):
    write(own_folder, "mine", {"loss_weighting": "min_snr", "cfg_ratio": 0.0, "rank": 8})
    said = "sets --loss-weighting to min_snr: vanilla trains with none."
    assert resolve_training("vanilla", FOLDERS, preset="mine").notices == (f"Preset mine {said}",)
    assert resolve_training("fixed", FOLDERS, preset="mine").notices == ()
    path = tmp_path / "config.json"
    before = config(loss_weighting="min_snr")
    path.write_text(run_config_text(before, recipe="fixed", version="1", objective=""), encoding="utf-8")
    assert resolve_training("vanilla", FOLDERS, source=path).notices == (f"{path} {said}",)
    assert resolve_training("fixed", FOLDERS, source=path).notices == ()


def test_an_earlier_run_beside_one_that_is_gone_on_with_is_said_to_have_no_effect(tmp_path: Path):
    checkpoint = tmp_path / "run" / "checkpoints" / "epoch_1"
    checkpoint.mkdir(parents=True)
    (checkpoint / STATE_FILE).touch()
    text = run_config_text(config(rank=8), recipe="fixed", version="1", objective="")
    (checkpoint / "config.json").write_text(text, encoding="utf-8")
    other = tmp_path / "config.json"
    other.write_text(text.replace('"rank": 8', '"rank": 16'), encoding="utf-8")
    resumed = {"resume_from": tmp_path / "run"}
    assert resolve_training("fixed", resumed).notices == ()
    found = resolve_training("fixed", resumed, source=other)
    assert found.config.rank == 8
    assert found.notices == ("--config has no effect with --resume-from: a run goes on with its own settings.",)


def test_a_choice_of_attention_without_attention_among_the_targets_is_said():
    def notices(*targets: str) -> tuple[str, ...]:
        values = {**FOLDERS, "attention_type": "self", "target_modules": targets}
        return resolve_training("fixed", values).notices

    sentence = "--attention-type has no effect here: --target-modules names the MLP's projections alone."
    assert notices("gate_proj", "up_proj") == (sentence,)
    assert notices("gate_proj", "q_proj") == ()
