"""An export from beginning to end: read, converted where the target has no such form, written, read back, compared."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sidestep.config.runs import LORA_FILE
from sidestep.errors import ConfigError, ModelError
from sidestep.exports import acestep_cpp
from sidestep.exports.base import BaseWeights
from sidestep.exports.changes import Change, LowRank, changed, relative_error
from sidestep.exports.comfyui import ComfyUi
from sidestep.exports.diffusers import Diffusers
from sidestep.exports.low_rank import as_low_rank
from sidestep.exports.merged import Merged, merged_weight
from sidestep.exports.peft import Peft
from sidestep.exports.source import Source, read_adapter
from sidestep.exports.target import Content, Target
from sidestep.model.checkpoint import Checkpoint
from sidestep.training.adapters.lora import NOT_FOR_DIFFUSERS, diffusers_finds
from sidestep.training.checkpoints import write_folder

TARGETS: Mapping[str, Callable[[str], Target]] = {
    "diffusers": lambda name: Diffusers(),
    "comfyui": ComfyUi,
    "peft": lambda name: Peft(),
    "merged": lambda name: Merged(),
}
DEFAULT_RANK = 128
"""The rank of a LoRA made from something else, where none is asked for."""
TOLERANCE = 1e-5
_BIASES_GO_TO = "Export it with --to merged or comfyui."
# Half a unit in the last place, as a share of the number.
_ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written and how well it means the same. Errors are |found - meant| / |meant|."""

    files: tuple[str, ...]
    modules: int
    kind: str
    """What the adapter was: `lora`, `dora`, `lokr` or `loha`."""
    rank: int | None
    """The rank it was converted to, or None where it kept its form."""
    conversion_error: float
    """What the conversion costs; 0 where there was none."""
    conversion_mean_error: float
    """The same over all modules together."""
    error: float
    """How far what the target reads is from what was meant, largest module."""
    worst: str
    rounding_error: float
    """What storing merged weights in the source's format costs, over all modules together; 0 for adapters."""
    read_by: tuple[str, ...]
    remark: str
    """Which program one may think of will not load it; empty for none."""


def export(
    adapter: Path, checkpoint: Checkpoint, *, target_name: str, output: Path, rank: int | None = None
) -> Exported:
    """Export an adapter for a target into a new folder.

    The files are read back by the target's own rules and compared with the adapter; ModelError, and no folder, when
    they do not mean the same. ConfigError when the folder holds something already.
    """
    check_free(output)
    base = BaseWeights(checkpoint)
    source = read_adapter(adapter, base)
    target = TARGETS[target_name](output.name)
    _check(source, target, target_name, base)
    converted = _needs_conversion(source, target, rank)
    content = _content(source, base, converted)
    conversion = _compare(_exact(content, base), source, base) if converted else _Comparison()
    found: list[Exported] = []

    def fill(folder: Path) -> None:
        target.write(folder, content, base)
        found.append(_prove(folder, source, content, base, target, target_name, converted, conversion))
        check_free(output)  # Again: another export may have ended there since.

    write_folder(output, fill, then="run it again", is_alone=False)
    return found[0]


def check_free(output: Path) -> None:
    """Raise ConfigError unless an export can become this folder: it is empty, or not there."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} holds something already.", hint="Name a new folder with --output.")


@dataclass(slots=True)
class _Comparison:
    worst: str = ""
    largest: float = 0.0
    squared_distance: float = 0.0
    squared_size: float = 0.0

    def add(self, name: str, found: Tensor, wanted: Tensor) -> None:
        error = relative_error(found, wanted)
        self.squared_distance += (found - wanted).square().sum().item()
        self.squared_size += wanted.square().sum().item()
        if error >= self.largest:
            self.worst, self.largest = name, error

    @property
    def mean(self) -> float:
        return math.sqrt(self.squared_distance / self.squared_size) if self.squared_size else 0.0


def _check(source: Source, target: Target, target_name: str, base: BaseWeights) -> None:
    if source.biases and not target.reads_biases:
        raise ModelError(
            f"{source.file} trains {len(source.biases)} biases, and {target_name} reads none.",
            hint=_BIASES_GO_TO if not source.changes else "Export it with --to merged, peft or comfyui.",
        )
    if not source.changes and target_name == "peft":
        raise ModelError(f"{source.file} changes biases alone, of which PEFT makes no adapter.", hint=_BIASES_GO_TO)
    if target_name == "merged":
        if base.checkpoint.layout != "original":
            raise ModelError(
                f"{base.checkpoint.folder} is in diffusers' layout; merged models are written in the original's.",
                hint="Give --checkpoint-dir a folder with acestep-v15-*/.",
            )
        return
    for module in source.changes:
        if len(base.shapes[module]) > 2 and source.changes[module].product().any():
            raise ModelError(
                f"{source.file} changes {module}, a convolution, which {target_name} does not read.",
                hint="Export it with --to merged.",
            )


def _needs_conversion(source: Source, target: Target, rank: int | None) -> int | None:
    """Return the rank of the LoRA to be made, or None where the target reads the adapter as it is."""
    is_readable = all(isinstance(change, tuple(target.forms)) for change in source.changes.values())
    if rank is not None:
        if isinstance(target, Merged):
            raise ConfigError("--rank has no meaning for a merged model.")
        return rank
    return None if is_readable else DEFAULT_RANK


def _content(source: Source, base: BaseWeights, rank: int | None) -> Content:
    """Bring an adapter into the form that is written: LoRA of one rank, or as it is."""
    uniform = rank or source.rank
    changes: dict[str, Change] = {}
    for module, change in source.changes.items():
        if len(base.shapes[module]) > 2 and not change.product().any():
            continue
        if rank is None and not (isinstance(change, LowRank) and change.rank < uniform):
            changes[module] = change
            continue
        if rank is None and isinstance(change, LowRank):
            padded = as_low_rank(LowRank(change.down, change.up), uniform)
            changes[module] = LowRank(padded.down, padded.up, change.magnitude)
            continue
        whole = _whole(change, module, base) if change.magnitude is not None else None
        changes[module] = as_low_rank(change, rank or uniform, whole=whole)
    header = {"sidestep": source.header["sidestep"]} if "sidestep" in source.header else {}
    return Content(changes=changes, biases=source.biases, header=header)


def _whole(change: Change, module: str, base: BaseWeights) -> Tensor:
    """Return what a change does to the weight of its module, float64, magnitudes and all."""
    if change.magnitude is None:
        return change.product().reshape(base.shapes[module])
    weight = base.weight(module)
    return changed(weight, change.product(), change.magnitude) - weight


def _exact(content: Content, base: BaseWeights) -> Iterable[tuple[str, Tensor]]:
    for module, change in content.changes.items():
        yield module, _whole(change, module, base)


def _compare(read: Iterable[tuple[str, Tensor]], source: Source, base: BaseWeights) -> _Comparison:
    comparison = _Comparison()
    for module, found in read:
        if module in source.changes:
            comparison.add(module, found, _whole(source.changes[module], module, base))
    return comparison


def _prove(
    folder: Path,
    source: Source,
    content: Content,
    base: BaseWeights,
    target: Target,
    target_name: str,
    rank: int | None,
    conversion: _Comparison,
) -> Exported:
    readings = {target_name: target.read(folder, base)}
    if target_name in ("peft", "comfyui") and acestep_cpp.takes(content):
        file = folder / LORA_FILE if target_name == "peft" else next(folder.glob("*.safetensors"))
        readings["acestep.cpp"] = acestep_cpp.read(file, base)
    worst, rounding = _Comparison(), 0.0
    for reader, read in readings.items():
        found = _verify(reader, read, content, base, is_merged=target_name == "merged")
        rounding = found.mean if target_name == "merged" else 0.0
        worst = max(worst, found, key=lambda each: each.largest)
    return Exported(
        files=tuple(sorted(path.name for path in folder.iterdir())),
        modules=len(content.changes),
        kind=source.kind,
        rank=rank,
        conversion_error=conversion.largest,
        conversion_mean_error=conversion.mean,
        error=worst.largest,
        worst=worst.worst,
        rounding_error=rounding,
        read_by=tuple(readings),
        remark=NOT_FOR_DIFFUSERS if target_name == "peft" and not diffusers_finds(content.changes) else "",
    )


def _verify(
    reader: str, read: Iterable[tuple[str, Tensor]], content: Content, base: BaseWeights, *, is_merged: bool
) -> _Comparison:
    """Compare what a reader found with what was meant; ModelError when a module is missing, surplus or different."""
    comparison = _Comparison()
    left = {*content.changes, *content.biases}
    for name, found in read:
        if name not in left:
            raise ModelError(f"{reader} reads a change of {name} from the export, which the adapter does not make.")
        left.remove(name)
        wanted, allowed = _meant(name, content, base, is_merged=is_merged)
        comparison.add(name, found, wanted)
        if (found - wanted).norm().item() > allowed:
            raise ModelError(
                f"The export would not sound the same: {reader} reads {name} with a relative error of "
                f"{relative_error(found, wanted):.2g}.",
                hint="Nothing was written. Please report this with the adapter's settings.",
            )
    lost = [name for name in left if _is_to_be_found(name, content, base, is_merged=is_merged)]
    if lost:
        raise ModelError(f"{reader} does not read {len(lost)} of the adapter's modules, {sorted(lost)[0]} for one.")
    return comparison


def _is_to_be_found(name: str, content: Content, base: BaseWeights, *, is_merged: bool) -> bool:
    """Say whether a change is any; one that is merged may round to nothing in the format of the weights."""
    if not is_merged:
        return bool(_meant(name, content, base, is_merged=False)[0].any())
    before = (base.tensor(name) if name in content.biases else base.weight(name)).to(base.dtype(name))
    if name in content.biases:
        return not torch.equal(content.biases[name].to(before), before)
    change = content.changes[name]
    return not torch.equal(merged_weight(before, change.product(), change.magnitude), before)


def _meant(name: str, content: Content, base: BaseWeights, *, is_merged: bool) -> tuple[Tensor, float]:
    """Return the change a reader has to find, float64, and how far off (as a norm) the stored numbers can put it."""
    if name in content.biases:
        before = base.tensor(name)
        wanted = content.biases[name].double() - before
    else:
        change = content.changes[name]
        wanted = _whole(change, name, base)
        if change.magnitude is None and not is_merged:
            return wanted, TOLERANCE * wanted.norm().item()
        before = base.weight(name)
    # Magnitudes and merged weights are stored as whole numbers, so that their rounding is that of the weight.
    dtype = base.dtype(name) if is_merged else torch.float32
    rounding = 4 * _ROUNDING[dtype] * (before + wanted).norm().item()
    return wanted, TOLERANCE * wanted.norm().item() + rounding
