"""The command line: what may be typed, and what is said when it is wrong."""

import re

import pytest

from sidestep.config.flags import COMMANDS, GlobalConfig, describe, parse, parser
from sidestep.config.recipe import RECIPE_PINS
from sidestep.config.settings import flag_of, settings_of
from sidestep.config.shell import shell_line, start_words
from sidestep.config.train import TrainConfig
from sidestep.errors import ConfigError
from tests.unit.surface import PROMISED_DEFAULTS, PROMISED_FLAGS

BARE = {flag_of(s.name) for config in (TrainConfig, GlobalConfig) for s in settings_of(config) if s.kind is bool}


def test_the_parser_holds_no_defaults():
    assert dict(parse(["fixed"]).values) == {}


def test_global_flags_stand_before_or_after_the_subcommand():
    before, after = parse(["--plain", "-y", "fixed"]), parse(["fixed", "--plain", "-y"])
    assert before.values == after.values == {"plain": True, "yes": True}
    for words in (["--version"], ["--version", "fixed"], ["fixed", "--version"]):
        assert parse(words).version


def test_other_spellings_reach_the_same_setting():
    assert parse(["fixed", "--lr", "1"]).values == parse(["fixed", "--learning-rate", "1"]).values
    words = ["-c", "x", "-M", "base", "-d", "y", "-o", "z", "-a", "lora", "-r", "8", "-e", "3"]
    assert parse(["fixed", *words]).values == {
        "checkpoint_dir": "x", "model_variant": "base", "dataset_dir": "y", "output_dir": "z", "adapter_type": "lora",
        "rank": "8", "epochs": "3",
    }  # fmt: skip


@pytest.mark.parametrize("command", ["fixed", "vanilla"])
@pytest.mark.parametrize("flag", PROMISED_FLAGS)
def test_every_promised_flag_exists_or_is_pinned(command: str, flag: str):
    pinned = {flag_of(name) for name in RECIPE_PINS[command]}
    words = [command, flag, *([] if flag.startswith("--no-") or flag in BARE else ["1"])]
    if flag in pinned:
        with pytest.raises(ConfigError, match="is no choice here"):
            parse(words)
    else:
        assert parse(words).values


@pytest.mark.parametrize(("name", "default"), PROMISED_DEFAULTS.items())
def test_defaults_are_the_promised_ones(name: str, default: object):
    assert {setting.name: setting.default for setting in settings_of(TrainConfig)}[name] == default


def test_a_typo_is_met_with_what_was_probably_meant():
    with pytest.raises(ConfigError) as caught:
        parse(["fixed", "--rnk", "8", "--epoch", "3"])
    assert "fixed has no flag --rnk (did you mean --rank?)." in caught.value.message
    assert "fixed has no flag --epoch (did you mean --epochs?)." in caught.value.message
    assert caught.value.hint.endswith("fixed --help")


def test_abbreviations_are_not_taken():
    with pytest.raises(ConfigError, match="no flag --gradient-acc"):
        parse(["fixed", "--gradient-acc", "8"])


def test_a_pinned_setting_is_explained():
    with pytest.raises(ConfigError) as caught:
        parse(["vanilla", "--cfg-ratio", "0.1"])
    assert caught.value.message == "--cfg-ratio is no choice here: vanilla trains with 0. Use 'fixed' to set it."


def test_an_unknown_command_and_a_flag_without_its_value_are_usage_errors():
    with pytest.raises(ConfigError, match="invalid choice: 'trian'"):
        parse(["trian"])
    with pytest.raises(ConfigError, match="expected one argument") as caught:
        parse(["fixed", "--rank"])
    assert caught.value.hint == f"See:\n  {shell_line([*start_words(), 'fixed', '--help'])}"


def test_help_says_the_rule_and_the_default_of_every_setting(capsys: pytest.CaptureFixture[str]):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as left:
            parser().parse_args([command.name, "--help"])
        assert left.value.code == 0
        shown = re.sub(r"\s+", " ", capsys.readouterr().out)
        for config in command.configs:
            for setting in settings_of(config):
                if setting.name not in RECIPE_PINS.get(command.name, {}):
                    assert _joined(describe(setting)) in _joined(shown), setting.name


def test_help_says_of_switches_too_what_they_need():
    settings = {setting.name: setting for setting in settings_of(TrainConfig)}
    assert "Only with --adapter-type lokr." in describe(settings["lokr_use_scalar"])
    assert "Only with --adapter-type lora or dora." in describe(settings["use_rslora"])


def _joined(text: str) -> str:
    """argparse breaks lines at hyphens: compare without white space."""
    return re.sub(r"\s", "", text.replace("%%", "%"))
