"""`sample`: music from a prompt with an adapter of any program, at several strengths."""

import time
from dataclasses import replace

from sidestep.commands.libraries import load_libraries
from sidestep.commands.models import chosen_checkpoint
from sidestep.commands.torch_build import warn_of_slowness
from sidestep.config.adapter_tasks import SampleConfig
from sidestep.config.settings import settings_of
from sidestep.errors import ConfigError
from sidestep.exports.find import find_adapter
from sidestep.listen.prompts import SamplePrompt, prompt_of_words, read_prompts
from sidestep.model.checkpoint import check_encoders
from sidestep.ui.console import Console
from sidestep.ui.problems import quiet_libraries

_WORDS = ("lyrics", "language", "bpm", "keyscale", "timesignature")
"""What a prompt says besides its caption: with --prompts, in the file alone."""


def run(config: SampleConfig, *, console: Console) -> int:
    """Render every prompt at every strength; returns the exit code."""
    prompts = _prompts(config)
    for notice in _idle(config):
        console.warning(notice)
    if config.output.exists() and not config.output.is_dir():
        raise ConfigError(f"{config.output} is no folder.", hint="Name one with --output.")
    file = find_adapter(config.adapter) if config.adapter else None
    checkpoint = chosen_checkpoint(config.checkpoint_dir, config.model_variant, config.base_model, adapter=file)
    check_encoders(checkpoint)
    if checkpoint.is_turbo and config.guidance not in (None, 1.0):
        raise ConfigError("--guidance has no effect on turbo: its guidance is part of its weights.")
    quiet_libraries()
    console.print(f"Loading {checkpoint.variant} ...")
    load_libraries()
    warn_of_slowness(config.device, config.precision, console)
    from sidestep.listen.render import usual_sampling
    from sidestep.listen.studio import Studio
    from sidestep.model.device import choose_device, choose_dtype

    device = choose_device(config.device)
    usual = usual_sampling(checkpoint)
    sampling = replace(
        usual, steps=config.steps or usual.steps, guidance=config.guidance or usual.guidance, shift=config.shift
    )
    studio = Studio(
        checkpoint,
        prompts,
        adapter=file,
        seconds=config.duration,
        seed=config.seed,
        sampling=sampling,
        device=device,
        dtype=choose_dtype(config.precision, device),
    )
    strengths = config.strengths if file else (0.0,)
    started = time.monotonic()
    for path in studio.render_all(strengths, folder=config.output):
        console.print(f"{path}  ({time.monotonic() - started:.1f} s)", wrap=False)
        started = time.monotonic()
    return 0


def _idle(config: SampleConfig) -> list[str]:
    """Return a sentence for each setting that differs from its default and that nothing reads."""
    unread = {name: f"{config.prompts} says it" for name in _WORDS} if config.prompts else {}
    if config.adapter is None:
        unread["strengths"] = "it counts only with --adapter"
    return [
        f"{setting.flag} has no effect here: {unread[setting.name]}."
        for setting in settings_of(SampleConfig)
        if setting.name in unread and getattr(config, setting.name) != setting.default
    ]


def _prompts(config: SampleConfig) -> list[SamplePrompt]:
    if (config.prompt is None) == (config.prompts is None):
        raise ConfigError("Give either --prompt TEXT or --prompts FILE.")
    if config.prompts is not None:
        return read_prompts(config.prompts)
    try:
        return [prompt_of_words({"caption": config.prompt, **{name: getattr(config, name) for name in _WORDS}})]
    except ValueError as error:
        raise ConfigError(f"The prompt cannot be used: {error}.") from error
