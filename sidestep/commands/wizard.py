"""The wizard, on a terminal and without a subcommand: asks, then starts what the other commands start."""

from sidestep.commands.hub import HuggingFace
from sidestep.config.flags import GlobalConfig
from sidestep.config.settings import build, parse_values
from sidestep.config.tasks import BuildDatasetConfig, DoctorConfig
from sidestep.ui.asker import KeyAsker
from sidestep.ui.command_line import Plan
from sidestep.ui.console import open_console
from sidestep.ui.machine import find_gpus
from sidestep.ui.plain_asker import PlainAsker
from sidestep.ui.problems import quiet_libraries
from sidestep.ui.sinks import open_screen
from sidestep.ui.wizard import Wizard

EXIT_INTERRUPTED = 130


def run(*, screen: GlobalConfig) -> int:
    """Open the wizard; returns the exit code of the last thing it did, 130 when it was left with Ctrl-C."""
    quiet_libraries()
    console = open_console(plain=screen.plain)
    asker = PlainAsker(console) if console.is_plain else KeyAsker(console)
    hub = HuggingFace(shows_progress=not console.is_plain)
    wizard = Wizard(asker, console, start=lambda plan: start(plan, screen=screen), hub=hub, find_gpus=find_gpus)
    try:
        return wizard.run()
    except KeyboardInterrupt:
        console.print()
        console.print("Left. Nothing more was started.")
        return EXIT_INTERRUPTED


def start(plan: Plan, *, screen: GlobalConfig) -> int:
    """Carry out what the wizard planned as the command line would; returns the exit code."""
    if plan.command == "build-dataset":
        from sidestep.commands.build_dataset import run as build_dataset

        config = build(BuildDatasetConfig, parse_values(BuildDatasetConfig, plan.values))
        console = open_console(plain=screen.plain)
        with open_screen(console) as emit:
            return build_dataset(config, emit=emit, console=console)
    if plan.command == "estimate":
        from sidestep.commands.estimate import run as estimate

        return estimate(plan.values, screen=screen)
    if plan.command == "doctor":
        from sidestep.commands.doctor import run as examine

        return examine(
            build(DoctorConfig, parse_values(DoctorConfig, plan.values)), console=open_console(plain=screen.plain)
        )
    from sidestep.commands.train import run as train

    return train(plan.command, plan.values, screen=screen)
