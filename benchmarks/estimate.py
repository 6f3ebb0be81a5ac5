"""The cost of an estimate: its two passes against the training step, time and peak memory.

    uv run python benchmarks/estimate.py --seconds 60 --json estimate.json

The training step is LoRA of rank 64 on both attentions with AdamW, blocks recomputed; the estimate looks at every
attention and MLP projection, blocks recomputed as well. Both run as training and `estimate` run them: captured as CUDA
graphs where there is a GPU (`--eager` runs both eagerly). Random weights of real size; medians after warm-up. Without a
GPU, or with --tiny, it runs the tiny size, which shows only that it runs.

`--command "--verify --verify-steps 40 --val-split 0.2 --chunk-duration 60"` runs the real command with these flags
instead, on 20 songs of random latents, and gives its time and peak.
"""

import argparse
import json
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import repository  # noqa: F401
import torch
from torch import Tensor

from benchmarks.step import Case, ours
from benchmarks.subject import SIZES, Machine, build_decoder, clear, make_batch, meta_decoder, this_machine
from benchmarks.train import write_checkpoint, write_songs
from sidestep.config.adapter import TARGET_MODULES
from sidestep.estimate.measure import Replayed
from sidestep.estimate.sketch import Probe, Sketch
from sidestep.estimate.taps import tapped
from sidestep.main import main as sidestep
from sidestep.model.attention import use_processors
from sidestep.model.names import to_diffusers
from sidestep.model.quantize import quantize_blocks
from sidestep.training.adapters.base import target_names
from sidestep.training.objective import Task
from sidestep.training.passes import Model

GIB = 2**30
WARM_UPS = 4


@dataclass(slots=True)
class Measured:
    """The median time of a pass in milliseconds, and the most memory that was allocated in GiB (CPU: 0)."""

    what: str
    seconds: float
    milliseconds: float
    peak_gib: float


def training_step(arguments: argparse.Namespace, seconds: float, machine: Machine) -> Measured:
    """Measure the training step."""
    clear(machine.device)
    case = Case(
        mode="eager" if arguments.eager else "captured",
        seconds=seconds,
        recomputed=1.0,
        batch_size=1,
        size=arguments.size,
        rank=64,
        dropout=0.0,
        optimizer="adamw",
        quantize=arguments.quantize,
        is_fused=True,
        adapter="lora",
        has_padding=False,
    )
    subject = ours(case, machine)
    batches = [make_batch(meta_decoder(arguments.size), seconds, batch_size=1, seed=seed) for seed in range(2)]
    return timed("training step", seconds, lambda at: subject.run(batches[at % 2]), arguments.passes, machine)


def estimate_passes(arguments: argparse.Namespace, seconds: float, machine: Machine) -> list[Measured]:
    """Measure the sketching pass, the decompositions of all layers, and the probing pass."""
    clear(machine.device)
    model = _model(arguments, machine)
    names = target_names(len(model.decoder.layers), attention_type="both", target_modules=TARGET_MODULES)
    layers = {name: model.decoder.get_submodule(to_diffusers(name)) for name in names}
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    tasks = [
        make_batch(meta_decoder(arguments.size), seconds, batch_size=1, seed=seed).task.to(machine.device)
        for seed in range(2)
    ]

    def measured(what: str, recorder: Sketch | Probe) -> Measured:
        def one_pass(task: Task) -> None:
            model.losses(task).sum().backward()

        replayed = one_pass if arguments.eager or machine.device.type != "cuda" else Replayed(one_pass)

        def run(at: int) -> Tensor:
            recorder.samples.begin(1)
            replayed(tasks[at % 2])
            recorder.samples.end()
            return recorder.samples.now

        with tapped(layers, recorder, dtype=machine.dtype):
            return timed(what, seconds, run, arguments.passes, machine)

    sketch = Sketch(shapes, width=arguments.rank_max, seed=0, device=machine.device, dtype=machine.dtype)
    results = [measured("sketching pass", sketch)]
    start = time.perf_counter()
    found = {name: sketch.directions(name, arguments.rank_max) for name in layers}
    probe = Probe(found)
    _wait(machine)
    results.append(Measured("all decompositions, once", seconds, (time.perf_counter() - start) * 1e3, _peak(machine)))
    del found, sketch
    clear(machine.device)
    return [*results, measured("probing pass", probe)]


def _model(arguments: argparse.Namespace, machine: Machine) -> Model:
    decoder = build_decoder(arguments.size, machine).requires_grad_(False)
    if arguments.quantize != "none":
        quantize_blocks(decoder, arguments.quantize, device=machine.device)
    return Model(
        decoder=decoder,
        cross_attention=use_processors(decoder, device=machine.device, dtype=machine.dtype),
        null_condition=torch.zeros(1, 1, 1, device=machine.device, dtype=machine.dtype),
        weighting=None,
        recompute=[True] * len(decoder.layers),
        dropout_seed=torch.zeros((), dtype=torch.int32, device=machine.device),
        device=machine.device,
        dtype=machine.dtype,
    )


def timed(what: str, seconds: float, run: Callable[[int], Tensor], passes: int, machine: Machine) -> Measured:
    """Run a few times unmeasured, then `passes` times."""
    for at in range(WARM_UPS):
        run(at)
    times = []
    for at in range(passes):
        _wait(machine)
        start = time.perf_counter()
        run(at)
        _wait(machine)
        times.append((time.perf_counter() - start) * 1e3)
    return Measured(what, seconds, statistics.median(times), _peak(machine))


def _wait(machine: Machine) -> None:
    if machine.device.type == "cuda":
        torch.cuda.synchronize()


def _peak(machine: Machine) -> float:
    return torch.cuda.max_memory_allocated() / GIB if machine.device.type == "cuda" else 0.0


def run_command(arguments: argparse.Namespace, machine: Machine) -> None:
    """Run `train.py estimate` on a checkpoint and songs written for it; print its time and peak."""
    sizes = SIZES[arguments.size]
    width = sizes.get("encoder_hidden_size") or sizes.get("hidden_size", 2048)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder / "checkpoints", arguments.size)
        write_songs(folder / "tensors", shortest=arguments.seconds[0], longest=arguments.seconds[-1], width=width)
        clear(machine.device)
        words = ["--plain", "estimate", "-c", folder / "checkpoints", "-M", "base", "-d", folder / "tensors"]
        start = time.perf_counter()
        code = sidestep([*map(str, words), *shlex.split(arguments.command)])
        seconds = time.perf_counter() - start
    print(f"estimate {arguments.command}: exit code {code}, {seconds:.0f} s, peak {_peak(machine):.2f} GiB")


def table(results: list[Measured]) -> str:
    """Return the results as Markdown, with ratios to the training step of the same length."""
    lines = ["| length | what | ms | peak GiB | time / step | memory / step |", "|---|---|---|---|---|---|"]
    step = results[0]
    for result in results:
        if result.what == "training step":
            step = result
        memory = f"{result.peak_gib / step.peak_gib:.2f}" if step.peak_gib else "-"
        lines.append(
            f"| {result.seconds:g} s | {result.what} | {result.milliseconds:.1f} | {result.peak_gib:.2f} "
            f"| {result.milliseconds / step.milliseconds:.2f} | {memory} |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, nargs="+", default=[60.0])
    parser.add_argument("--size", choices=("2b", "xl"), default="2b")
    parser.add_argument("--tiny", action="store_true", help="the tiny size, to see that it runs")
    parser.add_argument("--quantize", choices=("none", "int8", "nf4"), default="none")
    parser.add_argument("--rank-max", type=int, default=128, help="directions a layer")
    parser.add_argument("--passes", type=int, default=20)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs, in both")
    parser.add_argument("--command", default="", help="flags of the real command, in one string, to run that instead")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.tiny or not torch.cuda.is_available():
        arguments.size = "tiny"
    return arguments


def main() -> None:
    """Measure, print the table and the JSON."""
    arguments, machine = parse(), this_machine()
    if arguments.command:
        run_command(arguments, machine)
        return
    results: list[Measured] = []
    for seconds in arguments.seconds:
        results.append(training_step(arguments, seconds, machine))
        results += estimate_passes(arguments, seconds, machine)
    content = {
        "machine": machine.name,
        "torch": torch.__version__,
        "size": arguments.size,
        "captured": machine.device.type == "cuda" and not arguments.eager,
        "results": [asdict(result) for result in results],
    }
    print(table(results))
    print(json.dumps(content))
    if arguments.json:
        arguments.json.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
