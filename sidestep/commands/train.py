"""`fixed` and `vanilla`: preprocess where asked, then train.

Everything that can be checked without torch is checked before the door to it opens.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidestep.commands.interrupts import Interrupts
from sidestep.commands.libraries import load_libraries
from sidestep.commands.output import alone_in, log_in
from sidestep.commands.torch_build import warn_of_slowness
from sidestep.config.flags import GlobalConfig, LayersConfig
from sidestep.config.places import default_checkpoint_dir, product_version, remember
from sidestep.config.presets import is_run_config, save_preset
from sidestep.config.processes import ALONE, Processes
from sidestep.config.rank_map import RANK_MAP_FILE, open_rank_map, read_rank_map
from sidestep.config.recipe import RECIPE_PINS
from sidestep.config.resolve import resolve_training
from sidestep.config.runs import (
    RUN_CONFIG,
    check_adapter_folders,
    checkpoints_in,
    is_of_run,
    named_folder,
    run_of,
    set_aside_newer,
)
from sidestep.config.settings import build, parse_values, settings_of
from sidestep.config.shell import shell_line, start_words
from sidestep.config.train import TrainConfig
from sidestep.data.audio import AUDIO_SUFFIXES
from sidestep.data.dataset_file import load_dataset
from sidestep.errors import ConfigError, DataError, RunError
from sidestep.events import Emit, Event, Notice, TrackSkipped
from sidestep.exports.find import find_adapter
from sidestep.files import write_whole
from sidestep.listen.prompts import read_prompts
from sidestep.model.checkpoint import Checkpoint, check_encoders, decoder_tensors, find_checkpoint
from sidestep.model.weights import read_ahead
from sidestep.ui.console import Console, open_console
from sidestep.ui.problems import quiet_libraries
from sidestep.ui.sinks import combine, open_screen, write_log

if TYPE_CHECKING:
    from sidestep.training.assemble import Run

EXIT_SKIPPED = 1
EXIT_INTERRUPTED = 130


def run(
    command: str,
    values: Mapping[str, Any],
    *,
    screen: GlobalConfig,
    remembers: bool = True,
    processes: Processes = ALONE,
) -> int:
    """Carry out `fixed` or `vanilla` with the typed values; returns the exit code.

    `remembers` keeps the checkpoint folder as the user's default for the next start. Of several `processes` the first
    one alone writes; what it would refuse for what is in its folders, it refuses for all.
    """
    layer_names = {setting.name for setting in settings_of(LayersConfig)}
    layers = build(LayersConfig, parse_values(LayersConfig, {k: v for k, v in values.items() if k in layer_names}))
    typed = {name: value for name, value in values.items() if name not in layer_names}
    resolved = resolve_training(command, typed, preset=layers.preset, source=layers.config)
    config = resolved.config
    console = open_console(plain=screen.plain)
    for notice in resolved.notices:
        console.print(notice)
    if layers.save_preset and processes.is_first:
        path = save_preset(layers.save_preset, config, without=RECIPE_PINS[command])
        console.print(f"Saved as preset: {path}")
    # Before anything is done in common: all of them have to do it.
    processes.must_agree("arguments", repr((command, config.preprocess, config.output_dir is None)))
    if config.shard_base and processes.count == 1:
        raise ConfigError(
            "--shard-base spreads the model over several processes, and there is one.",
            hint="Leave it out (--no-shard-base), or start them:\n"
            f"  {shell_line(start_words(processes=2))} {command} ...",
        )
    checkpoint = _checkpoint(config)
    if remembers and config.checkpoint_dir is not None and processes.is_first:
        _remember(config.checkpoint_dir, console)
    if config.output_dir is not None:
        _check_what_is_read(config, renders=processes.is_first)
        run_name = config.run_name or f"{config.adapter_type}_{time.strftime('%Y%m%d_%H%M%S')}"
        if processes.is_first:
            _check_output(config, config.output_dir, run_name)
            _check_kept_map(config, config.output_dir)
        config = replace(config, run_name=processes.text_of_first(run_name))
    skipped = 0
    if config.preprocess and processes.is_first:
        skipped = _preprocess(config, checkpoint, console)
    if config.output_dir is not None:
        processes.meet()
        outcome = _train(command, config, checkpoint, config.output_dir, console, processes)
        return outcome or (EXIT_SKIPPED if skipped else 0)
    return EXIT_SKIPPED if skipped else 0


def _remember(checkpoint_dir: Path, console: Console) -> None:
    try:
        remember("checkpoint_dir", str(checkpoint_dir.resolve()))
    except RunError as error:
        # No reason not to train.
        console.warning(f"The next start will not know this checkpoint folder: {error.message}")


def _checkpoint(config: TrainConfig) -> Checkpoint:
    root = config.checkpoint_dir or default_checkpoint_dir()
    checkpoint = find_checkpoint(root, config.model_variant, base_model=config.base_model)
    if config.preprocess or config.sample_every_n_epochs:
        check_encoders(checkpoint)
    return checkpoint


def _preprocess(config: TrainConfig, checkpoint: Checkpoint, console: Console) -> int:
    """Turn the songs into tensors; returns how many were skipped."""
    assert config.tensor_output is not None  # Checked when the config was resolved.
    output = config.tensor_output
    audio_dir = config.audio_dir or (config.dataset_json or Path()).parent
    quiet_libraries()
    skipped: list[str] = []  # While the songs are looked for, and later on.

    def count(event: Event) -> None:
        if isinstance(event, TrackSkipped):
            skipped.append(event.name)

    with _telling_what_is_kept(console), log_in(output), open_screen(console) as show:
        emit = combine(show, write_log, count)
        dataset = load_dataset(audio_dir, config.dataset_json, emit=emit)
        load_libraries()
        from sidestep.model.device import choose_device, choose_dtype
        from sidestep.preprocess.run import preprocess

        warn_of_slowness(config.device, config.precision, console)
        device = choose_device(config.device)
        if config.output_dir is not None:
            from sidestep.training.accelerate import check_device

            check_device(config, device)
        result = preprocess(
            dataset,
            checkpoint=checkpoint,
            output=output,
            max_duration=config.max_duration,
            normalize=config.normalize,
            target_db=config.target_db,
            target_lufs=config.target_lufs,
            device=device,
            encoder_device=choose_device("cpu") if config.offload_encoder else device,
            dtype=choose_dtype(config.precision, device),
            emit=emit,
        )
    console.print(f"{result.done} songs encoded, {result.unchanged} unchanged, {len(skipped)} skipped: {output}")
    return len(skipped)


@contextmanager
def _telling_what_is_kept(console: Console) -> Iterator[None]:
    """Say, when preprocessing is stopped, that it goes on where it was."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("Songs that were encoded are kept: the same command goes on with the others.")
        raise


@contextmanager
def _telling_what_is_saved(command: str, output_dir: Path, console: Console, *, processes: int) -> Iterator[None]:
    """Say, when training is stopped at once, where it goes on, in as many processes."""
    try:
        yield
    except KeyboardInterrupt:
        saved = checkpoints_in(output_dir)
        if saved:
            console.print(f"The last checkpoint is {saved[0].name}. Go on from there with:")
            start = start_words(processes=processes)
            console.print(f"  {shell_line([*start, command, '--resume-from', output_dir])}", wrap=False)
        raise


def _train(
    command: str, config: TrainConfig, checkpoint: Checkpoint, output_dir: Path, console: Console, processes: Processes
) -> int:
    dataset_dir = config.tensor_output if config.preprocess else config.dataset_dir
    assert dataset_dir is not None  # Checked when the config was resolved.
    run_name = config.run_name
    assert run_name is not None  # Chosen before preprocessing.
    check_tensors(dataset_dir)
    config = replace(config, dataset_dir=dataset_dir, checkpoint_dir=checkpoint.root)
    quiet_libraries()
    with ExitStack() as stack:
        if processes.is_first:
            stack.enter_context(_telling_what_is_saved(command, output_dir, console, processes=processes.count))
            stack.enter_context(log_in(output_dir))
            stack.enter_context(alone_in(output_dir))
            _check_output(config, output_dir, run_name)  # Again: another run may have ended there since.
        read_ahead(decoder_tensors(checkpoint).values())  # While torch is loaded, which takes seconds.
        load_libraries(lambda: _warm_up(config, processes))
        if processes.is_first and not config.preprocess:
            warn_of_slowness(config.device, config.precision, console)
        show = stack.enter_context(open_screen(console))
        from sidestep.listen.samples import TrainingSamples, prepare_wordings
        from sidestep.model.device import choose_device
        from sidestep.training.accelerate import check_device
        from sidestep.training.fit import assemble_fitting
        from sidestep.training.run import carry_out

        check_device(config, choose_device(config.device))
        emit = combine(show, write_log) if processes.is_first else combine()
        # Before the decoder is loaded: the encoders are gone again when it comes.
        listens = config.sample_every_n_epochs > 0 and processes.is_first
        wordings = prepare_wordings(config, checkpoint, dataset_dir) if listens else []
        training = assemble_fitting(
            config,
            recipe_name=command,
            checkpoint=checkpoint,
            dataset_dir=dataset_dir,
            output_dir=output_dir,
            run_name=run_name,
            version=product_version(),
            processes=processes,
            emit=emit,
        )
        if processes.is_first:
            emit = _open_files(stack, training, emit)
        interrupts = stack.enter_context(Interrupts(emit, can_be_repeated=processes.count > 1))
        reason = carry_out(
            training,
            emit=emit,
            stop_requested=lambda: processes.anyone(interrupts.is_requested()),
            listen=TrainingSamples(training, wordings, emit=emit),
        )
    return EXIT_INTERRUPTED if reason == "interrupted" else 0


def _warm_up(config: TrainConfig, processes: Processes) -> None:
    from sidestep.model.device import choose_own_device
    from sidestep.model.warm_up import warm_up

    warm_up(choose_own_device(config.device, local_rank=processes.local_rank), config.precision)


def _open_files(stack: ExitStack, training: "Run", emit: Emit) -> Emit:
    """Write the run's config.json and open the files it reports to; returns the sink that feeds them as well."""
    from sidestep.listen.page import ReportPage
    from sidestep.ui.metrics import MetricsFile
    from sidestep.ui.tensorboard import TensorBoard

    output_dir, first_step = training.output_dir, training.first_step
    _keep_rank_map(training)
    write_whole(output_dir / RUN_CONFIG, training.config_text)
    _set_newer_aside(training, emit)
    metrics = stack.enter_context(MetricsFile(output_dir / "metrics.jsonl", first_step=first_step))
    board = stack.enter_context(TensorBoard(training.config.log_dir or output_dir / "runs", first_step=first_step))
    return combine(emit, metrics, board, ReportPage(output_dir, emit=combine(emit, metrics)))


def _keep_rank_map(training: "Run") -> None:
    """Put the run's rank map into its folder: `estimate` writes the next one where it wrote this one."""
    from sidestep.training.directions import copy_directions

    rank_map, kept = training.rank_map, training.output_dir / RANK_MAP_FILE
    if rank_map is None or (kept.exists() and kept.samefile(rank_map.path)):
        return
    if training.config.rank_map_start and training.first_step == 0:
        copy_directions(rank_map.path, kept)  # So that --config starts another run alike.
    write_whole(kept, rank_map.content)


def _set_newer_aside(training: "Run", emit: Emit) -> None:
    """Where a run goes on from one of its older checkpoints, keep the newer ones out of the way of its next resume."""
    if training.config.resume_from is None:
        return
    checkpoint, output_dir = named_folder(training.config.resume_from), training.output_dir
    if run_of(checkpoint) == checkpoint or not run_of(checkpoint).samefile(output_dir):
        return
    for folder in set_aside_newer(output_dir, checkpoint, place=training.state.place):
        emit(Notice(text=f"A newer checkpoint of this run is kept as {folder.name}."))


def _check_what_is_read(config: TrainConfig, *, renders: bool) -> None:
    """Refuse, before torch is loaded and songs are encoded, a rank map, an adapter or prompts that are not there."""
    if config.rank_map is not None:
        if config.resume_from is not None and not config.rank_map.exists():
            raise DataError(
                f"The rank map of this run is gone: {config.rank_map}.", hint="Give a copy of it: --rank-map FILE."
            )
        read_rank_map(config.rank_map)
    if config.init_from is not None and config.resume_from is None and not config.init_from.is_file():
        find_adapter(config.init_from)
    # The process that renders reads them; on another machine they need not be.
    if renders and config.sample_prompts is not None and config.sample_every_n_epochs:
        read_prompts(config.sample_prompts)


def _check_output(config: TrainConfig, output_dir: Path, run_name: str) -> None:
    """Refuse, before anything is made, an output folder whose contents this run would replace."""
    goes_on = config.resume_from is not None and is_of_run(config.resume_from, output_dir)
    if not goes_on and checkpoints_in(output_dir):
        raise ConfigError(
            f"{output_dir} holds a run already.",
            hint=f"Go on with it: --resume-from {shell_line([output_dir])}; or choose another --output-dir.",
        )
    check_adapter_folders(output_dir, run_name, goes_on=goes_on)
    file = output_dir / RUN_CONFIG
    if file.exists() and not checkpoints_in(output_dir) and not is_run_config(file):
        raise ConfigError(
            f"{file} belongs to something else, and a run would put its own in its place.",
            hint="Choose another --output-dir.",
        )


def _check_kept_map(config: TrainConfig, output_dir: Path) -> None:
    """Refuse an output folder where the copy of the rank map would replace another one that no run left there."""
    kept = output_dir / RANK_MAP_FILE
    if config.rank_map is None or not kept.is_file() or (output_dir / RUN_CONFIG).exists():
        return
    if open_rank_map(config.rank_map).content != kept.read_bytes():
        raise ConfigError(
            f"{kept} is another rank map, and the run would put a copy of its own in its place.",
            hint="Choose another --output-dir.",
        )


def check_tensors(dataset_dir: Path) -> None:
    """Raise DataError unless the folder is there and holds tensor files."""
    start = shell_line([*start_words(), "fixed", "--preprocess"])
    how = f"Make them:\n  {start} --audio-dir SONGS --tensor-output TENSORS"
    if not dataset_dir.is_dir():
        raise DataError(f"There is no folder {dataset_dir} with tensors.", hint=how)
    if not any(dataset_dir.glob("*.pt")):
        if _has_audio(dataset_dir):
            audio = shell_line(["--audio-dir", dataset_dir])
            how = f"It holds audio. Make tensors of it:\n  {start} {audio} --tensor-output TENSORS"
        raise DataError(f"There are no tensor files (.pt) in {dataset_dir.resolve()}.", hint=how)


def _has_audio(folder: Path) -> bool:
    return any(path.suffix.lower() in AUDIO_SUFFIXES for path in folder.rglob("*"))
