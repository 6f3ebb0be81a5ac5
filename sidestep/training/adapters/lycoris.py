"""LoKr and LoHa: LyCORIS's factors on exactly the modules that were asked for.

A module's change is computed beside it, y = W x + dW dropout(x), from float32 factors. LyCORIS itself adds dW to W in
W's own format, where a change below the last bit of a 16-bit W is lost. Nor are its fused kernels used: its plain torch
functions give the same numbers everywhere.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lycoris.functional.general import weight_decompose
from lycoris.functional.loha import make_weight
from lycoris.functional.lokr import kron_bypass, kron_weight
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn
from torch.nn import Parameter, functional

from sidestep.config.settings import show_value
from sidestep.errors import ModelError
from sidestep.model.names import to_diffusers, to_original
from sidestep.training.adapters.base import freeze, target_suffixes
from sidestep.training.adapters.files import LOHA_FILE, LOKR_FILE, find_weights, read_weights, write_weights

PREFIX = "lycoris_"
_FILES = {"lokr": LOKR_FILE, "loha": LOHA_FILE}
_NOT_FACTORS = ("alpha", "dora_scale")
# A magnitude this close to the norm of its row was not trained; bfloat16 files round by 0.4 %.
_SAME_MAGNITUDE = 5e-3


class KroneckerChange(nn.Module):
    """What LoKr adds to a linear layer's output: dW is a Kronecker product of two small matrices."""

    def __init__(self, factors: LokrModule, dropout: float) -> None:
        super().__init__()
        self.factors = factors
        self.reads_weight = bool(factors.wd)
        self.scale = float(factors.scale)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """Return dW dropout(x) for inputs x [..., in] of a layer with this weight [out, in], where it is read."""
        x, factors = self.dropout(x), self.factors
        if self.reads_weight:
            assert weight is not None
            return functional.linear(x, self._decomposed_change(weight).to(x.dtype))
        matrices = [None if matrix is None else matrix.to(x.dtype) for matrix in self._matrices()]
        change = kron_bypass(x, *matrices, scale=self.scale, backend="torch")
        return change * factors.scalar.to(x.dtype)

    def _decomposed_change(self, weight: Tensor) -> Tensor:
        """Return m (W + dW) / |W + dW| - W, the norm taken over each row and m trained (DoRA)."""
        weight = weight.float()
        change = kron_weight(*self._matrices(), scale=self.scale, backend="torch") * self.factors.scalar
        return weight_decompose(weight + change, self.factors.dora_scale, backend="torch") - weight

    def _matrices(self) -> tuple[Tensor | None, ...]:
        """Return w1, w1_a, w1_b, w2, w2_a, w2_b: each of the two factors is one matrix or a product of two."""
        factors = self.factors
        first = (factors.lokr_w1, None, None) if factors.use_w1 else (None, factors.lokr_w1_a, factors.lokr_w1_b)
        second = (factors.lokr_w2, None, None) if factors.use_w2 else (None, factors.lokr_w2_a, factors.lokr_w2_b)
        return *first, *second


class HadamardChange(nn.Module):
    """What LoHa adds to a linear layer's output: dW is the elementwise product of two low-rank matrices."""

    scale_on_device: Tensor

    def __init__(self, factors: LohaModule, dropout: float) -> None:
        super().__init__()
        self.factors = factors
        self.scale = float(factors.scale)
        self.register_buffer("scale_on_device", torch.tensor(self.scale), persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.reads_weight = False

    def forward(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """Return dW dropout(x) for inputs x [..., in] of a layer; its own weight does not matter."""
        factors = self.factors
        matrices = (factors.hada_w1_b, factors.hada_w1_a, factors.hada_w2_b, factors.hada_w2_a)
        change = make_weight(*matrices, self.scale_on_device)
        return functional.linear(self.dropout(x), change.to(x.dtype))


Change = KroneckerChange | HadamardChange


@dataclass(frozen=True, slots=True, kw_only=True)
class LycorisAdapter:
    """A LoKr or LoHa adapter on a decoder. `settings` are LyCORIS's, as they go into the file."""

    algorithm: Literal["lokr", "loha"]
    modules: Sequence[str]
    parameters: Mapping[str, Parameter]
    remarks: Sequence[str]
    decoder: nn.Module
    changes: Mapping[str, Change]
    settings: Mapping[str, Any]

    def write(self, folder: Path, values: Mapping[str, Tensor], *, about: Mapping[str, str]) -> None:
        """Write lokr_weights.safetensors (or loha_...) as the official trainer does: scalars folded in, alpha kept."""
        tensors = {}
        for module, change in self.changes.items():
            own = {name: values[f"{module}.{name}"] for name, _ in change.factors.named_parameters()}
            scalar = own.pop("scalar", None)
            if scalar is not None:
                own[_first(own)] = own[_first(own)] * scalar
            own["alpha"] = change.factors.get_buffer("alpha").cpu()
            tensors |= {f"{_stem(module)}.{name}": value.contiguous() for name, value in own.items()}
        config = json.dumps(self.settings)
        header = {"algo": self.algorithm, "format": "lycoris", f"{self.algorithm}_config": config, **about}
        write_weights(folder / _FILES[self.algorithm], tensors, header)

    def read(self, path: Path) -> None:
        """Take over an adapter with factors of the same shapes; its effect is the same whatever its alpha was.

        Modules that this run does not adapt may be in the file as long as nothing was trained there: the official
        trainer writes every linear layer of the decoder.
        """
        if not (path.is_file() and path.suffix == ".safetensors"):
            path = find_weights(path, _FILES[self.algorithm])
        tensors, header = read_weights(path)
        groups = _by_stem(tensors)
        first_factors = ("lokr_w1", "lokr_w1_a") if self.algorithm == "lokr" else ("hada_w1_a",)
        if not any(name in group for group in groups.values() for name in first_factors):
            raise ModelError(f"{path} holds no {self.algorithm} of LyCORIS.", hint="Is --adapter-type right?")
        ours = {_stem(module): module for module in self.modules}
        self._refuse_foreign(path, {stem: group for stem, group in groups.items() if stem not in ours})
        taken = {ours[stem]: group for stem, group in groups.items() if stem in ours}
        if not taken:
            raise ModelError(f"{path} changes none of the modules that this run adapts.")
        for module, group in taken.items():
            self._check(path, header, module, group)
        with torch.no_grad():
            for module, group in taken.items():
                self._take(module, group)

    def _refuse_foreign(self, path: Path, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        known = {_stem(to_original(name)): (to_original(name), part) for name, part in self.decoder.named_modules()}
        changed = []
        for stem, group in groups.items():
            name, part = known.get(stem, (stem, None))
            if not _changes_nothing(group, part):
                changed.append(name)
        if changed:
            raise ModelError(
                f"{path} changes {changed[0]}, which this run does not adapt ({len(changed)} such modules).",
                hint="Set --target-modules and --attention-type as they were for that adapter.",
            )

    def _check(self, path: Path, header: Mapping[str, str], module: str, group: Mapping[str, Tensor]) -> None:
        wanted = {
            name: tuple(parameter.shape)
            for name, parameter in self.changes[module].factors.named_parameters()
            if name != "scalar"
        }
        found = {name: tuple(tensor.shape) for name, tensor in group.items() if name != "alpha"}
        if wanted == found and group.get("alpha", torch.zeros(())).numel() == 1:
            return
        raise ModelError(
            f"{path} does not fit: {module} is {_shapes(found)} there and {_shapes(wanted)} here.",
            hint=f"Train with the settings of that adapter ({_stated(header, self.algorithm)}), on the same model.",
        )

    def _take(self, module: str, group: Mapping[str, Tensor]) -> None:
        factors = self.changes[module].factors
        own = dict(factors.named_parameters())
        for name, parameter in own.items():
            if name == "scalar":
                parameter.fill_(1.0)
            else:
                parameter.copy_(group[name])
        own[_first(own)].mul_(_scale_in(group) / self.changes[module].scale)


def attach_lokr(
    decoder: nn.Module,
    modules: Sequence[str],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    factor: int = -1,
    decompose_both: bool = False,
    use_tucker: bool = False,
    use_scalar: bool = False,
    weight_decompose: bool = False,
) -> LycorisAdapter:
    """Put LoKr on `modules` (original names) of a frozen decoder. It changes nothing before the first step."""
    settings = {"factor": factor, "decompose_both": decompose_both, "use_tucker": use_tucker}
    settings |= {"weight_decompose": weight_decompose}
    # The scalars are folded in. Told of them, LyCORIS would give modules that the file leaves out a random change.
    fixed = {"use_scalar": False, "full_matrix": False, "bypass_mode": False, "rs_lora": False}
    fixed |= {"unbalanced_factorization": False}

    def change_of(module: str, linear: nn.Module) -> KroneckerChange:
        factors = LokrModule(_stem(module), linear, lora_dim=rank, alpha=alpha, use_scalar=use_scalar, **settings)  # pyright: ignore[reportArgumentType]
        return KroneckerChange(factors, dropout)

    settings_in_file = {**_sizes(rank, alpha), **settings, "target_modules": target_suffixes(modules, decoder), **fixed}
    changes = _attach(decoder, modules, change_of)
    remarks = ["diffusers does not load LoKr; ACE-Step's app, ComfyUI and acestep.cpp do."]
    if all(change.factors.use_w1 and change.factors.use_w2 for change in changes.values()):
        remarks.append(
            f"At rank {rank} both Kronecker factors are whole matrices: --alpha and a larger --rank do nothing."
        )
    if decompose_both and all(change.factors.use_w1 for change in changes.values()):
        remarks.append(
            f"--lokr-decompose-both has no effect: at rank {rank} the first factor is too small to be decomposed."
        )
    if any(not change.factors.use_w1 for change in changes.values()):
        remarks.append("acestep.cpp does not load LoKr whose first factor is decomposed (--lokr-decompose-both).")
    if weight_decompose:
        remarks.append("ComfyUI takes the magnitudes of --lokr-weight-decompose relative to the unchanged weights.")
    if use_tucker:
        remarks.append("--lokr-use-tucker has no effect: no convolution gets an adapter.")
    return _adapter("lokr", decoder, changes, settings_in_file, remarks)


def attach_loha(
    decoder: nn.Module, modules: Sequence[str], *, rank: int, alpha: float, dropout: float
) -> LycorisAdapter:
    """Put LoHa on `modules` (original names) of a frozen decoder. It changes nothing before the first step."""

    def change_of(module: str, linear: nn.Module) -> HadamardChange:
        factors = LohaModule(_stem(module), linear, lora_dim=rank, alpha=alpha)  # pyright: ignore[reportArgumentType]
        return HadamardChange(factors, dropout)

    targets = target_suffixes(modules, decoder)
    settings = {**_sizes(rank, alpha), "use_tucker": False, "use_scalar": False, "target_modules": targets}
    remarks = ["ACE-Step's app, diffusers and acestep.cpp do not load LoHa; ComfyUI and LyCORIS do."]
    return _adapter("loha", decoder, _attach(decoder, modules, change_of), settings, remarks)


def _attach(
    decoder: nn.Module, modules: Sequence[str], change_of: Callable[[str, nn.Module], Change]
) -> dict[str, Change]:
    """Put a change on every module, as a part of it, so that the decoder's train(), eval() and to() reach it."""
    freeze(decoder)
    changes = {}
    with _quiet_lycoris():
        for module in modules:
            linear = cast("nn.Linear", decoder.get_submodule(to_diffusers(module)))
            changes[module] = change_of(module, linear).to(linear.weight.device)
            linear.change = changes[module]
            linear.register_forward_hook(_add_change)
    return changes


def _add_change(linear: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    change: Change = linear.change  # pyright: ignore[reportAssignmentType]
    # Not asked for in vain: a weight that is held in few bits is made whole for it.
    weight: Tensor | None = linear.weight if change.reads_weight else None  # pyright: ignore[reportAssignmentType]
    return output + change(inputs[0], weight).to(output.dtype)


def _adapter(
    algorithm: Literal["lokr", "loha"],
    decoder: nn.Module,
    changes: Mapping[str, Change],
    settings: Mapping[str, Any],
    remarks: Sequence[str],
) -> LycorisAdapter:
    parameters = {
        f"{module}.{name}": parameter
        for module, change in changes.items()
        for name, parameter in change.factors.named_parameters()
    }
    return LycorisAdapter(
        algorithm=algorithm,
        modules=tuple(changes),
        parameters=parameters,
        remarks=tuple(remarks),
        decoder=decoder,
        changes=changes,
        settings=settings,
    )


@contextmanager
def _quiet_lycoris() -> Iterator[None]:
    """Keep LyCORIS from writing to the terminal; what it would say is in the adapter's remarks."""
    logger = logging.getLogger("LyCORIS")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _sizes(rank: int, alpha: float) -> dict[str, float]:
    return {"linear_dim": rank, "linear_alpha": int(alpha) if alpha == int(alpha) else alpha}


def _stem(module: str) -> str:
    """Give the name of a module in LyCORIS's files: `lycoris_layers_0_self_attn_q_proj`."""
    return PREFIX + module.replace(".", "_")


def _by_stem(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        stem, _, part = name.partition(".")
        groups[stem][part] = tensor
    return dict(groups)


def _first(names: Mapping[str, Tensor]) -> str:
    """Return the factor that takes in a module's scalar, as in LyCORIS."""
    return next(name for name in ("lokr_w1", "lokr_w1_a", "hada_w1_a") if name in names)


def _scale_in(group: Mapping[str, Tensor]) -> float:
    """Return alpha / rank of a module in a file; 1 where both factors are whole matrices or no alpha is stated."""
    ranks = [group[name].shape[1] for name in ("lokr_w1_a", "lokr_w2_a", "hada_w1_a") if name in group]
    return float(group["alpha"]) / ranks[0] if ranks and "alpha" in group else 1.0


def _changes_nothing(group: Mapping[str, Tensor], part: nn.Module | None) -> bool:
    """Say whether a module's tensors leave it as it is: one factor is zero, and the magnitudes are the weight's own."""
    if all(tensor.any() for name, tensor in group.items() if name not in _NOT_FACTORS):
        return False
    if "dora_scale" not in group:
        return True
    if part is None:
        return False
    norms = cast("nn.Linear", part).weight.float().flatten(1).norm(dim=1).cpu()
    magnitudes = group["dora_scale"].float().flatten()
    return magnitudes.shape == norms.shape and torch.allclose(magnitudes, norms, rtol=_SAME_MAGNITUDE, atol=0)


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in sorted(shapes.items()))


def _stated(header: Mapping[str, str], algorithm: str) -> str:
    """Return what a file's header says about its settings."""
    try:
        config = json.loads(header.get(f"{algorithm}_config", "{}"))
    except ValueError:
        config = {}
    names = ("linear_dim", "linear_alpha", "factor", "decompose_both", "weight_decompose", "full_matrix")
    stated = [f"{name} {show_value(config[name])}" for name in names if isinstance(config, dict) and name in config]
    return ", ".join(stated) or "its header does not say which"
