"""The root of the command line: parse, dispatch, and turn errors into exit codes.

Imports nothing that takes time: `--help` and a mistyped flag answer at once.
"""

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sidestep.commands.processes import joined_processes
from sidestep.config.flags import GlobalConfig, Typed, parse, parser
from sidestep.config.processes import Processes
from sidestep.config.settings import build, parse_values, settings_of
from sidestep.errors import EXIT_BUG, ElsewhereError, RunError, SidestepError
from sidestep.ui.wording import tolerate_unprintable

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def run() -> NoReturn:
    """Run Side-Step as the program that it is, and leave with its exit code."""
    code = main()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # All is said and saved. One more Ctrl-C ends the program at once, without a traceback of what it cut off.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run Side-Step and return its exit code: 0 done, 1 data, model or machine, 2 usage, 70 a bug, 130 interrupted."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    plain = "--plain" in words
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        tolerate_unprintable(stream)
    try:
        typed = parse(words)
        _check_current_folder()
        with joined_processes(typed.command or "The wizard", trains=typed.command in _TRAINING) as processes:
            return _dispatch(typed, processes)
    except ElsewhereError as error:
        return error.exit_code
    except SidestepError as error:
        return _show(error, plain=plain)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in ("torch", "torchaudio"):
            from sidestep.commands.torch_build import torch_is_missing

            return _show(torch_is_missing(), plain=plain)
        from sidestep.ui.problems import show_bug

        show_bug(error, stream=sys.stderr, plain=plain)
        return EXIT_BUG


def _open_closed_streams() -> None:
    """Have streams that were closed by what started us (`>&-`) lead nowhere; else a file of ours gets their place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115  For good.


def _check_current_folder() -> None:
    """Raise RunError where the folder that was gone into was deleted since: torch cannot even be loaded there."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise RunError("The current folder was deleted.", hint="Go to another one (cd), then run it again.") from error


def _show(error: SidestepError, *, plain: bool) -> int:
    from sidestep.ui.problems import log_traceback, quiet_libraries, show_error

    quiet_libraries()
    log_traceback(error)
    show_error(error, stream=sys.stderr, plain=plain)
    return error.exit_code


def _dispatch(typed: Typed, processes: Processes) -> int:
    if typed.version:
        return _show_versions()
    globals_ = {setting.name for setting in settings_of(GlobalConfig)}
    screen = build(GlobalConfig, parse_values(GlobalConfig, {k: v for k, v in typed.values.items() if k in globals_}))
    values = {name: value for name, value in typed.values.items() if name not in globals_}
    if typed.command in _TRAINING:
        return _train(typed.command, values, screen, processes)
    if typed.command is None:
        return _wizard(screen)
    return _COMMANDS[typed.command](typed.command, values, screen)


def _train(command: str, values: Mapping[str, Any], screen: GlobalConfig, processes: Processes) -> int:
    from sidestep.commands.train import run

    return run(command, values, screen=screen, processes=processes)


def _build_dataset(command: str, values: Mapping[str, Any], screen: GlobalConfig) -> int:
    from sidestep.commands.build_dataset import run
    from sidestep.config.tasks import BuildDatasetConfig
    from sidestep.ui.console import open_console
    from sidestep.ui.sinks import open_screen

    config = build(BuildDatasetConfig, parse_values(BuildDatasetConfig, values))
    console = open_console(plain=screen.plain)
    with open_screen(console) as emit:
        return run(config, emit=emit, console=console)


def _sample(command: str, values: Mapping[str, Any], screen: GlobalConfig) -> int:
    from sidestep.commands.sample import run
    from sidestep.config.adapter_tasks import SampleConfig
    from sidestep.ui.console import open_console

    return run(build(SampleConfig, parse_values(SampleConfig, values)), console=open_console(plain=screen.plain))


def _export(command: str, values: Mapping[str, Any], screen: GlobalConfig) -> int:
    from sidestep.commands.export import run
    from sidestep.config.adapter_tasks import ExportConfig
    from sidestep.ui.console import open_console

    return run(build(ExportConfig, parse_values(ExportConfig, values)), console=open_console(plain=screen.plain))


def _estimate(command: str, values: Mapping[str, Any], screen: GlobalConfig) -> int:
    from sidestep.commands.estimate import run

    return run(values, screen=screen)


def _doctor(command: str, values: Mapping[str, Any], screen: GlobalConfig) -> int:
    from sidestep.commands.doctor import run
    from sidestep.config.tasks import DoctorConfig
    from sidestep.ui.console import open_console

    return run(build(DoctorConfig, parse_values(DoctorConfig, values)), console=open_console(plain=screen.plain))


def _demo(command: str, values: Mapping[str, Any], screen: GlobalConfig) -> int:
    from sidestep.commands.demo import run
    from sidestep.config.tasks import DemoConfig

    return run(build(DemoConfig, parse_values(DemoConfig, values)), screen=screen)


def _wizard(screen: GlobalConfig) -> int:
    """Open the wizard where there is a terminal to ask on; elsewhere help is all there is."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        parser().print_help()
        print("\nThe wizard asks questions and needs a terminal; without one, name a COMMAND.", file=sys.stderr)
        return EXIT_USAGE
    from sidestep.commands.wizard import run

    return run(screen=screen)


def _show_versions() -> int:
    from sidestep.commands.version import show_versions

    return show_versions()


_TRAINING = ("fixed", "vanilla")
_COMMANDS: Mapping[str, Callable[[str, Mapping[str, Any], GlobalConfig], int]] = {
    "build-dataset": _build_dataset,
    "sample": _sample,
    "export": _export,
    "estimate": _estimate,
    "doctor": _doctor,
    "demo": _demo,
}
