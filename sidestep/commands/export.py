"""`export`: an adapter for another program, proved to mean the same before it is named finished."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from sidestep.commands.libraries import load_libraries
from sidestep.commands.models import chosen_checkpoint
from sidestep.config.adapter_tasks import ExportConfig
from sidestep.config.settings import idle_settings
from sidestep.errors import ConfigError
from sidestep.exports.find import find_adapter, origin_of
from sidestep.model.checkpoint import decoder_fingerprint
from sidestep.ui.console import Console
from sidestep.ui.problems import quiet_libraries

if TYPE_CHECKING:
    from sidestep.exports.run import Exported

_READERS = {
    "diffusers": "diffusers: pipe.load_lora_weights({path!r})",
    "comfyui": "ComfyUI: put the file into models/loras",
    "peft": "{programs}: give them the folder",
    "merged": "Put the folder beside the other models: ACE-Step's app lists names that begin with acestep-v15-",
}


def run(config: ExportConfig, *, console: Console) -> int:
    """Export, and print how well the result means the same; returns the exit code."""
    if config.to == "merged" and config.rank is not None:
        raise ConfigError(idle_settings(config, {"rank": config.rank})[0])
    file = find_adapter(config.adapter)
    if config.output.exists() and (not config.output.is_dir() or any(config.output.iterdir())):
        raise ConfigError(f"{config.output} holds something already.", hint="Name a new folder with --output.")
    if config.output.name in ("", ".."):
        raise ConfigError(f"{config.output} names no new folder.", hint="Give --output the name of one.")
    checkpoint = chosen_checkpoint(config.checkpoint_dir, config.model_variant, config.base_model, adapter=file)
    quiet_libraries()
    trained_on = origin_of(file).get("decoder")
    if trained_on and trained_on != decoder_fingerprint(checkpoint):
        console.warning(f"This adapter was not trained on the weights of {checkpoint.variant} in {checkpoint.root}.")
    console.print(f"Exporting {file} ({checkpoint.variant}) for {config.to} and reading it back ...")
    load_libraries()
    from sidestep.exports.run import export

    started = time.monotonic()
    done = export(file, checkpoint, target_name=config.to, output=config.output, rank=config.rank)
    error = f"{done.error:.1e} of a module's change ({done.worst})" if done.error else "none: every number is the same"
    rows = [
        ("files", ", ".join(done.files)),
        ("modules", str(done.modules)),
        ("read back by", ", ".join(done.read_by)),
        ("largest error", error),
    ]
    if done.rounding_error > 1e-4:
        rows.append(("rounding", f"the model's number format costs {done.rounding_error:.2%} of the change"))
    if done.rank is not None:
        cost = f"{done.conversion_mean_error:.2%} of the change, {done.conversion_error:.2%} in the worst module"
        rows.append(("converted", f"{done.kind} as LoRA of rank {done.rank}: this loses {cost}"))
    rows += _notes(config.to, config.output, done, is_turbo=checkpoint.is_turbo)
    console.table(f"Exported to {config.output} in {time.monotonic() - started:.0f} s", rows)
    return 0


def _notes(to: str, output: Path, done: "Exported", *, is_turbo: bool) -> list[tuple[str, str]]:
    """Return what is to be known of an export before it is used, and who reads it."""
    rows: list[tuple[str, str]] = []
    if to == "merged" and not output.name.startswith("acestep-v15-"):
        rows.append(("name", "ACE-Step's app lists only folders whose name begins with acestep-v15-"))
    if to == "merged" and is_turbo and "merge" in output.name.lower():
        rows.append(("name", "ACE-Step's app takes a folder with merge in its name for no turbo model: rename it"))
    if to == "peft" and "." in output.name:
        rows.append(("name", "ACE-Step's app takes no adapter from a folder with a dot in its name: rename it"))
    if done.remark:
        rows.append(("not for", f"{done.remark} Export it with --to diffusers for that."))
    programs = ["ACE-Step's app", "PEFT"]
    if "acestep.cpp" in done.read_by:
        programs.append("acestep.cpp")
    elif to == "peft":
        rows.append(("acestep.cpp", "cannot use it: it knows no DoRA and no biases (--rank makes a LoRA of a DoRA)"))
    rows.append(("use it", _READERS[to].format(path=str(output), programs=", ".join(programs))))
    return rows
