"""`estimate` (Preprocessing++): which modules to train, and how much of each, measured on the songs."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sidestep.commands.libraries import load_libraries
from sidestep.commands.output import log_in
from sidestep.commands.torch_build import warn_of_slowness
from sidestep.commands.train import check_tensors
from sidestep.config.flags import GlobalConfig
from sidestep.config.places import default_checkpoint_dir, product_version
from sidestep.config.rank_map import RANK_MAP_FILE, Captured, RankMap, write_rank_map
from sidestep.config.settings import build, idle_settings, parse_values, settings_of
from sidestep.config.tasks import EstimateConfig, check_estimate
from sidestep.config.train import TrainConfig
from sidestep.model.checkpoint import Checkpoint, find_checkpoint
from sidestep.ui.command_line import Plan, command_line
from sidestep.ui.console import Console, open_console
from sidestep.ui.problems import quiet_libraries
from sidestep.ui.sinks import combine, open_screen, write_log


def run(values: Mapping[str, Any], *, screen: GlobalConfig) -> int:
    """Carry out `estimate` with the typed values; returns the exit code."""
    given = parse_values(EstimateConfig, values)
    config = build(EstimateConfig, given)
    check_estimate(config, given)
    console = open_console(plain=screen.plain)
    for notice in idle_settings(config, given):
        console.print(notice)
    check_tensors(config.dataset_dir)
    checkpoint = find_checkpoint(
        config.checkpoint_dir or default_checkpoint_dir(), config.model_variant, base_model=config.base_model
    )
    output = _output(config)
    quiet_libraries()
    with ExitStack() as stack:
        stack.enter_context(log_in(output.parent))
        load_libraries()
        warn_of_slowness(config.device, config.precision, console)
        emit = combine(stack.enter_context(open_screen(console)), write_log)
        from sidestep.estimate.run import estimate
        from sidestep.training.directions import write_directions

        found = estimate(config, checkpoint=checkpoint, version=product_version(), emit=emit)
        write_rank_map(output, found.rank_map)
        if config.save_directions:
            write_directions(output, found.directions)
    _show(config, given, found.rank_map, found.captured, console)
    if config.verify:
        _verify(config, output, checkpoint, console)
    return 0


def _show(
    config: EstimateConfig, given: Mapping[str, Any], rank_map: RankMap, captured: Captured | None, console: Console
) -> None:
    from sidestep.ui.heatmap import heat_image, show_rank_map, write_heat_image

    output = _output(config)
    show_rank_map(console, rank_map, captured, top=config.top_k)
    image = heat_image(rank_map)
    write_heat_image(output.with_suffix(".png"), image)
    if config.log_dir is not None:
        from sidestep.ui.tensorboard import write_image

        write_image(config.log_dir, "rank_map", image)
    console.print()
    console.print(f"The rank map: {output}")
    console.print("Train with it:")
    console.print(f"  {_next_command(config, given, output)}", wrap=False)


def _verify(config: EstimateConfig, output: Path, checkpoint: Checkpoint, console: Console) -> None:
    from sidestep.estimate.scores import chance_limit
    from sidestep.estimate.verify import verify

    with open_screen(console) as show:
        emit = combine(show, write_log)
        trained = verify(config, output, checkpoint=checkpoint, version=product_version(), emit=emit)
    uniform = trained[0]
    rows = []
    for one in trained:
        gain, error = one.gain_over(uniform)
        better = "" if one is uniform else _with_error(gain, error)
        after = _with_error(one.loss, one.error)
        rows.append((one.name, f"{one.parameters:,}", f"{one.before.mean:.5f}", after, better))
    columns = ("adapter", "parameters", "loss before", f"after {config.verify_steps} steps", "lower than uniform by")
    console.table("Held-out loss (+- standard error over runs and songs)", rows, columns)
    console.print()
    samples = min(len(uniform.after), len(uniform.before.songs))
    console.print(_verdict(*trained[1].gain_over(uniform), limit=chance_limit(samples)))


def _verdict(gain: float, error: float | None, *, limit: float) -> str:
    """Say what the comparison shows, and no more; `limit` is how many standard errors may be chance."""
    if error is None:
        return "One run, or one held-out song, tells nothing: set --verify-runs and --val-split higher."
    if abs(gain) <= limit * error:  # Nothing and nothing where the map is the uniform one.
        return "No difference beyond chance between the map and the uniform adapter."
    return f"The map is {'better' if gain > 0 else 'worse'} than the uniform adapter on these songs, beyond chance."


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.5f}" if error is None else f"{value:.5f} +- {error:.5f}"


def _output(config: EstimateConfig) -> Path:
    return config.output or config.dataset_dir / RANK_MAP_FILE


def _next_command(config: EstimateConfig, given: Mapping[str, Any], output: Path) -> str:
    """Return the training command with what was typed here and counts there."""
    of_the_map = {"target_modules", "attention_type", "rank"}
    shared = {setting.name for setting in settings_of(TrainConfig)} - {*of_the_map, "log_dir"}
    typed = {name: value for name, value in given.items() if name in shared}
    return command_line(Plan(config.recipe, {**typed, "rank_map": output, "output_dir": Path("OUTPUT")}))
