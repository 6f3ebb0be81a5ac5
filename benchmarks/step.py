"""The training step: ours against what peers do, in one run.

    uv run python benchmarks/step.py --seconds 60 120 240 --json step.json

The reference loop is diffusers' decoder as it is, PEFT's LoRA, autocast, AdamW and one `.item()` per step. Ours is the
step that training runs: eager, captured as a CUDA graph, and captured with compiled blocks. Random weights of real
size; times are medians between CUDA events, peaks are of allocated memory, GPU-busy is the sum of kernel times.
Without a GPU it runs the tiny size on the CPU, which shows only that it runs.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import repository  # noqa: F401
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from benchmarks.subject import SIZES, Machine, build_decoder, clear, make_batch, meta_decoder, step_tflop, this_machine
from sidestep.config.processes import ALONE, Processes
from sidestep.config.train import TrainConfig
from sidestep.model import attention
from sidestep.model.attention import use_processors
from sidestep.model.dropout import seed_dropout
from sidestep.model.names import to_diffusers
from sidestep.model.quantize import quantize_blocks
from sidestep.training.accelerate import compile_blocks, make_passes
from sidestep.training.adapters import ADAPTERS
from sidestep.training.adapters.base import target_names
from sidestep.training.batches import Batch
from sidestep.training.build import fused_blocks, recomputed_blocks
from sidestep.training.objective import noisy_latents
from sidestep.training.optimizers import make_optimizer
from sidestep.training.passes import EagerPasses, Model
from sidestep.training.sharding import shard
from sidestep.training.step import Stepper

MODES = ("reference", "eager", "captured", "compiled")
GIB = 2**30
LEARNING_RATE = 1e-4


@dataclass(frozen=True, slots=True)
class Case:
    """One measured setting."""

    mode: str
    seconds: float
    recomputed: float
    batch_size: int
    size: str
    rank: int
    dropout: float
    optimizer: str
    quantize: str
    is_fused: bool
    adapter: str
    has_padding: bool


@dataclass(slots=True)
class Result:
    """What was measured; times in milliseconds, memory in GiB."""

    case: Case
    step_ms: float = math.nan
    busy_ms: float = math.nan
    peak_gib: float = math.nan
    first_step_s: float = math.nan
    mfu: float = math.nan
    first_loss: float = math.nan
    last_loss: float = math.nan
    problem: str = ""


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, slots=True)
class Subject:
    """A step to measure: `run` makes it on a batch and returns the loss, still on the device."""

    run: Callable[[Batch], Tensor]
    parameters: list[torch.nn.Parameter]


def reference(case: Case, machine: Machine) -> Subject:
    """Return the step that peers make."""
    decoder = build_decoder(case.size, machine).requires_grad_(False)
    targets = [to_diffusers(name) for name in adapted(len(decoder.layers))]
    config = LoraConfig(r=case.rank, lora_alpha=2 * case.rank, lora_dropout=case.dropout, target_modules=targets)
    inject_adapter_in_model(config, decoder)
    parameters = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    fill_b(decoder)
    if case.recomputed:
        decoder.enable_gradient_checkpointing()
    decoder.train()
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=machine.device.type == "cuda")

    def run(batch: Batch) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        task = batch.task.to(machine.device)
        timesteps = task.timesteps_B.to(machine.dtype)
        with torch.autocast(machine.device.type, dtype=machine.dtype, enabled=machine.dtype != torch.float32):
            predicted = decoder(
                hidden_states=noisy_latents(task).to(machine.dtype),
                timestep=timesteps,
                timestep_r=timesteps,
                encoder_hidden_states=task.condition_BLD.to(machine.dtype),
                context_latents=task.context_BTC.to(machine.dtype),
                return_dict=False,
            )[0]
        loss = torch.nn.functional.mse_loss(predicted.float(), task.noise_BTC - task.latents_BTC)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        loss.item()
        return loss.detach()

    return Subject(run, parameters)


def ours(case: Case, machine: Machine) -> Subject:
    """Return the step that training makes."""
    stepper = build_stepper(case, machine)
    parameters = list(stepper.parameters.values())
    return Subject(lambda batch: stepper([batch], lr=LEARNING_RATE, seeds=[1]).values[0], parameters)


def build_stepper(case: Case, machine: Machine, *, processes: Processes = ALONE, is_sharded: bool = False) -> Stepper:
    """Return what makes the steps of training; `is_sharded` spreads the frozen model over the processes."""
    decoder = build_decoder(case.size, machine)
    if is_sharded:
        decoder = decoder.cpu()
        clear(machine.device)
    if case.quantize != "none":
        quantize_blocks(decoder, case.quantize, device=machine.device)
        clear(machine.device)
    layers = len(decoder.layers)
    config = TrainConfig(adapter_type=case.adapter, rank=case.rank, alpha=2.0 * case.rank, dropout=case.dropout)  # pyright: ignore
    adapter = ADAPTERS[case.adapter](decoder, adapted(layers), config)
    fill_b(decoder)
    parameters = list(adapter.parameters.values())
    sharded = shard(decoder, parameters, processes, device=machine.device) if is_sharded else None
    decoder.train()
    cross_attention = use_processors(decoder, device=machine.device, dtype=machine.dtype)
    dropout_seed = seed_dropout(decoder, case.dropout)
    fused = fused_blocks(decoder, adapter, cross_attention) if case.is_fused and not is_sharded else None
    clear(machine.device)
    model = Model(
        decoder=decoder,
        cross_attention=cross_attention,
        null_condition=torch.zeros(1, 1, 1, device=machine.device, dtype=machine.dtype),
        weighting=None,
        recompute=recomputed_blocks(layers, case.recomputed),
        dropout_seed=dropout_seed,
        fused=fused,
        device=machine.device,
        dtype=machine.dtype,
        sharded=sharded,
    )
    scaler = GradScaler(machine.device.type, enabled=False)
    is_captured = case.mode != "eager" and machine.device.type == "cuda"
    if case.mode == "compiled":
        compile_blocks(model, any_length=False)
    optimizer = make_optimizer(
        case.optimizer, adapter.parameters, lr=LEARNING_RATE, weight_decay=0.01, device=machine.device
    )
    return Stepper(
        model=model,
        passes=make_passes(model, parameters, scaler) if is_captured else EagerPasses(model=model, scaler=scaler),
        parameters=adapter.parameters,
        modules=adapter.modules,
        optimizer=optimizer,
        max_grad_norm=1.0,
        scaler=scaler,
        guards_itself=case.optimizer == "adamw" and machine.device.type == "cuda",
        processes=processes,
    )


def adapted(layers: int) -> list[str]:
    """Return the names of the adapted modules: both attentions, 192 of the 2B model."""
    return target_names(layers, attention_type="both", target_modules=PROJECTIONS)


def fill_b(decoder: torch.nn.Module) -> None:
    """Give the LoRA values, the same in every mode, so that both gradients of every module are at work."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(decoder.named_parameters()):
            if "lora_A" in name or "lora_B" in name:
                scale = 0.02 if "lora_B" in name else parameter.shape[1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def measure(case: Case, machine: Machine, arguments: argparse.Namespace) -> tuple[Result, Tensor]:
    """Measure a case; returns the first step's clipped gradient as well. A case that does not fit says so."""
    limit_memory(machine, 0)
    clear(machine.device)
    result, gradient = Result(case), torch.empty(0)
    shape = meta_decoder(case.size)
    batches = [
        make_batch(shape, case.seconds, batch_size=case.batch_size, seed=seed, has_padding=case.has_padding)
        for seed in range(4)
    ]
    try:
        subject = (reference if case.mode == "reference" else ours)(case, machine)
        clear(machine.device)
        limit_memory(machine, arguments.cap)
        start = time.perf_counter()
        result.first_loss = float(subject.run(batches[0]))
        result.first_step_s = time.perf_counter() - start
        gradient = torch.cat([p.grad.flatten().cpu() for p in subject.parameters if p.grad is not None])
        _time(result, subject, batches, machine, arguments.steps)
        if arguments.kernels and machine.device.type == "cuda":
            print(kernel_table(profiled(subject, batches), arguments.kernels))
    except torch.OutOfMemoryError:
        result.problem = "out of memory"
        return result, gradient
    if machine.device.type == "cuda":
        names = [to_diffusers(name) for name in adapted(len(shape.layers))]
        tflop = step_tflop(shape, case.seconds, case.rank, names) * case.batch_size
        result.mfu = tflop / result.step_ms * 1e3 / machine.matmul_tflops
    return result, gradient


def limit_memory(machine: Machine, gib: float) -> None:
    """Let torch allocate so much of the device from now on; 0 is all. The random weights may have taken more."""
    if machine.device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(gib / total if gib else 1.0)


def _time(result: Result, subject: Subject, batches: list[Batch], machine: Machine, steps: int) -> None:
    for batch in batches:
        subject.run(batch)
    times = []
    if machine.device.type != "cuda":
        for place in range(steps):
            start = time.perf_counter()
            subject.run(batches[place % len(batches)])
            times.append((time.perf_counter() - start) * 1e3)
    else:
        torch.cuda.synchronize()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        marks[0].record()
        for place in range(steps):
            subject.run(batches[place % len(batches)])
            marks[place + 1].record()
        torch.cuda.synchronize()
        times = [before.elapsed_time(after) for before, after in pairwise(marks)]
        result.peak_gib = torch.cuda.max_memory_allocated() / GIB
        result.busy_ms = _busy_ms(subject, batches)
    result.step_ms = statistics.median(times)
    result.last_loss = float(subject.run(batches[0]))


def _busy_ms(subject: Subject, batches: list[Batch]) -> float:
    return sum(event.self_device_time_total for event in profiled(subject, batches)) / 1e3 / 2


def profiled(subject: Subject, batches: list[Batch]) -> torch.autograd.profiler_util.EventList:
    """Return what the device did in two steps, kernel by kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for batch in batches[:2]:
            subject.run(batch)
        torch.cuda.synchronize()
    return profiler.key_averages()


def kernel_table(events: torch.autograd.profiler_util.EventList, rows: int) -> str:
    """Return the kernels of one step that take the most time: milliseconds, calls, name."""
    longest = sorted(events, key=lambda event: -event.self_device_time_total)[:rows]
    return "\n".join(
        f"{event.self_device_time_total / 2e3:8.3f} ms {event.count // 2:5d} {event.key}" for event in longest
    )


def cases(arguments: argparse.Namespace) -> list[Case]:
    """Return the cases to measure, the reference first for each length."""
    return [
        Case(
            mode=mode,
            seconds=seconds,
            recomputed=recomputed,
            batch_size=arguments.batch_size,
            size=arguments.size,
            rank=arguments.rank,
            dropout=arguments.dropout,
            optimizer=arguments.optimizer,
            quantize=arguments.quantize,
            is_fused=not arguments.unfused,
            adapter=arguments.adapter,
            has_padding=arguments.padded,
        )
        for seconds in arguments.seconds
        for recomputed in arguments.recompute
        for mode in arguments.modes
    ]


def table(results: list[Result], agreement: list[float]) -> str:
    """Return the results as a Markdown table, with ratios to the reference of the same length and recomputation."""
    columns = (
        "length|recomputed|mode|step ms|GPU-busy ms|peak GiB|MFU|x faster|x less busy|loss|loss after"
        "|gradient differs|first s"
    )
    lines = [f"| {columns.replace('|', ' | ')} |", "|---" * (columns.count("|") + 1) + "|"]
    base: dict[tuple[float, float], Result] = {}
    for result, difference in zip(results, agreement, strict=True):
        case = result.case
        key = (case.seconds, case.recomputed)
        if case.mode == "reference":
            base[key] = result
        first = base.get(key, result)
        step = result.problem or f"{result.step_ms:.1f}"
        lines.append(
            f"| {case.seconds:g} s | {case.recomputed:g} | {case.mode} | {step} | {result.busy_ms:.1f} "
            f"| {result.peak_gib:.2f} | {result.mfu:.1%} | {first.step_ms / result.step_ms:.1f} "
            f"| {first.busy_ms / result.busy_ms:.2f} | {result.first_loss:.4f} | {result.last_loss:.6f} "
            f"| {difference:.4f} | {result.first_step_s:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the JSON."""
    arguments = parse()
    machine = this_machine()
    if arguments.portable:
        attention.window_kernel_for = lambda device, dtype: attention.block_window
    print(f"{machine.name}, torch {torch.__version__}, matmul ceiling {machine.matmul_tflops:.0f} TFLOP/s", flush=True)
    results, agreement = [], []
    gradients: dict[tuple[float, float], Tensor] = {}
    for case in cases(arguments):
        result, gradient = measure(case, machine, arguments)
        compared = gradients.setdefault((case.seconds, case.recomputed), gradient)
        same = compared.numel() == gradient.numel() > 0
        results.append(result)
        agreement.append(float((gradient - compared).norm() / compared.norm()) if same else float("nan"))
        print(table(results[-1:], agreement[-1:]).splitlines()[-1], flush=True)
    print(table(results, agreement))
    if arguments.json:
        content = [{**asdict(result), "gradient_difference": d} for result, d in zip(results, agreement, strict=True)]
        arguments.json.write_text(json.dumps({"machine": machine.name, "results": content}, indent=1, default=str))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, nargs="+", default=[60, 120, 240])
    parser.add_argument("--recompute", type=float, nargs="+", default=[0, 1], help="shares of the blocks")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--adapter", default="lora", choices=sorted(ADAPTERS), help="ours only")
    parser.add_argument(
        "--padded", action="store_true", help="a prompt shorter than its rows, behind a mask; ours only"
    )
    parser.add_argument("--portable", action="store_true", help="sliding attention as where there is no window kernel")
    parser.add_argument("--size", choices=sorted(SIZES), default="2b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--quantize", choices=("none", "int8", "nf4"), default="none", help="ours only")
    parser.add_argument(
        "--unfused", action="store_true", help="ours with the linear layers apart, as PEFT computes them"
    )
    parser.add_argument("--kernels", type=int, default=0, help="print this many kernels that take the most time")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cap", type=float, default=0, help="GiB that torch may allocate; 0 is all")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
