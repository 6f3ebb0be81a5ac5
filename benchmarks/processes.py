"""Training in several processes against training in one, on the same machine in the same run.

    uv run torchrun --nproc-per-node 2 benchmarks/processes.py --json processes.json
    uv run torchrun --nproc-per-node 2 benchmarks/processes.py --size xl --recompute 1 --shard-base --cap 8

Every process makes the step that training makes (captured and compiled, with the meetings of the loop); then the first
one makes the same step alone while the others idle. Scaling efficiency is the samples a second of all over those of
one times their number. `--shard-base` spreads the frozen model: there nobody can train alone, and what is measured is
the step and the peak of memory; `--cap` limits what torch may allocate once the model is built, so that without
`--shard-base` the same line shows what does not fit. Random weights of real size; times are medians. Without a GPU it
runs the tiny size on the CPU, which shows only that it runs.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import repository  # noqa: F401  Finds the packages below.
import torch

from benchmarks.step import GIB, LEARNING_RATE, Case, build_stepper
from benchmarks.subject import SIZES, Machine, make_batch, meta_decoder, this_machine
from sidestep.config.processes import ALONE, Processes, launched_place
from sidestep.errors import ElsewhereError
from sidestep.training.batches import Batch
from sidestep.training.processes import joined, own_device
from sidestep.training.step import Stepper, Whole

WARM_UPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What was measured with so many passes a step in each process; times in milliseconds, memory in GiB."""

    passes: int
    processes: int
    together_ms: float
    alone_ms: float | None
    exchange_ms: float
    peak_gib: float | None

    @property
    def efficiency(self) -> float | None:
        """Return the throughput of all over that of one times their number."""
        return None if self.alone_ms is None else self.alone_ms / self.together_ms


def measure(stepper: Stepper, machine: Machine, options: argparse.Namespace, processes: Processes) -> list[Result]:
    """Measure each number of passes: all together, then the first process alone."""
    shape = meta_decoder(options.size)
    batches = [make_batch(shape, options.seconds, batch_size=options.batch_size, seed=seed) for seed in range(4)]
    results = []
    for passes in options.passes:
        own = [batches[(place + processes.rank) % len(batches)] for place in range(passes)]
        together = step_ms(stepper, own, machine, options.steps, processes)
        say(processes, f"{passes} passes: {together:.1f} ms together")
        exchange = exchange_ms(stepper, machine, processes)
        alone = None
        if not options.shard_base:
            if processes.is_first:
                alone = step_ms(stepper, own, machine, options.steps, ALONE)
            processes.meet()
        peak = torch.cuda.max_memory_allocated() / GIB if machine.device.type == "cuda" else None
        results.append(
            Result(
                passes=passes,
                processes=processes.count,
                together_ms=together,
                alone_ms=alone,
                exchange_ms=exchange,
                peak_gib=peak,
            )
        )
    return results


def step_ms(stepper: Stepper, batches: Sequence[Batch], machine: Machine, steps: int, processes: Processes) -> float:
    """Return the median time of a step of these batches in each of the processes."""
    stepper.processes = processes
    samples = sum(len(batch.names) for batch in batches) * processes.count
    whole = Whole(samples, ("random",), len(batches))

    def step() -> None:
        stepper(batches, lr=LEARNING_RATE, seeds=range(len(batches)), whole=whole)
        processes.anyone(False)

    for _ in range(WARM_UPS):
        step()
    if machine.device.type != "cuda":
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            step()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in pairwise(marks))


def exchange_ms(stepper: Stepper, machine: Machine, processes: Processes, repeats: int = 10) -> float:
    """Return the median time of adding up as many numbers as the gradients, a meeting included."""
    numbers = torch.zeros(sum(parameter.numel() for parameter in stepper.parameters.values()), device=machine.device)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        processes.add_up(numbers)
        if machine.device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def table(results: Sequence[Result]) -> str:
    """Return the results as a Markdown table."""
    columns = ("processes", "passes each", "step ms", "alone ms", "efficiency", "exchange ms", "peak GiB")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for result in results:
        alone = "" if result.alone_ms is None else f"{result.alone_ms:.1f}"
        efficiency = "" if result.efficiency is None else f"{result.efficiency:.3f}"
        peak = "" if result.peak_gib is None else f"{result.peak_gib:.2f}"
        lines.append(
            f"| {result.processes} | {result.passes} | {result.together_ms:.1f} | {alone} | {efficiency} "
            f"| {result.exchange_ms:.2f} | {peak} |"
        )
    return "\n".join(lines)


def run(options: argparse.Namespace, processes: Processes) -> None:
    """Build the step, measure it, print the table, write the JSON."""
    device = own_device("auto", processes)
    machine = replace(this_machine(), device=device)
    case = Case(
        mode=options.mode, seconds=options.seconds, recomputed=options.recompute, batch_size=options.batch_size,
        size=options.size, rank=options.rank, dropout=options.dropout, optimizer="adamw", quantize="none",
        is_fused=True, adapter="lora", has_padding=False,
    )  # fmt: skip
    if options.cap and device.type == "cuda" and not options.shard_base:
        limit(options.cap, device)
    start = time.perf_counter()
    stepper = build_stepper(case, machine, processes=processes, is_sharded=options.shard_base)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if options.cap:
            limit(options.cap, device)
    built = time.perf_counter() - start
    say(processes, f"{options.size}: built in {built:.0f} s, {options.mode}")
    results = measure(stepper, machine, options, processes)
    if not processes.is_first:
        return
    name = f"{processes.count} x {machine.name}, torch {torch.__version__}, {options.size}, {options.seconds:g} s"
    print(f"{name}, rank {options.rank}, {'sharded' if options.shard_base else 'whole'}")
    print(table(results), flush=True)
    if options.json:
        content = [{**asdict(result), "efficiency": result.efficiency} for result in results]
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        options.json.write_text(json.dumps({"machine": name, "settings": settings, "results": content}, indent=1))


def say(processes: Processes, text: str) -> None:
    """Say how far the benchmark has come; once for all processes."""
    if processes.is_first:
        print(text, file=sys.stderr, flush=True)


def limit(gib: float, device: torch.device) -> None:
    """Let torch allocate no more than this of the GPU's memory."""
    torch.cuda.set_per_process_memory_fraction(gib * GIB / torch.cuda.get_device_properties(device).total_memory)


def main() -> None:
    """Join the processes that torchrun started, and measure."""
    options = parse()
    place = launched_place(os.environ)
    if place is None:
        raise SystemExit("Start this with torchrun: torchrun --nproc-per-node 2 benchmarks/processes.py")
    with suppress(ElsewhereError), joined(place) as processes:  # Another process says why it failed.
        try:
            run(options, processes)
        except torch.OutOfMemoryError as error:
            raise SystemExit(f"{options.size} does not fit: {str(error).partition('.')[0]}.") from error


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="2b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--mode", choices=("eager", "captured", "compiled"), default=None)
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 4], help="passes a step in each process")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--recompute", type=float, default=0, help="share of the blocks")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--shard-base", action="store_true", help="spread the frozen model over the processes")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--cap", type=float, default=0, help="GiB that torch may allocate once the model is built")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # Passes of a spread model are never captured; its blocks are compiled where that is asked for.
    options.mode = options.mode or ("compiled" if torch.cuda.is_available() and not options.shard_base else "eager")
    return options


if __name__ == "__main__":
    main()
