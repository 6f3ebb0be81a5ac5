"""From command to first step: the real command on a checkpoint of real size, its time and its memory.

    uv run python benchmarks/startup.py --json startup.json

`train.py fixed --no-compile --max-steps 2` runs as a process of its own, first with the checkpoint's files out of the
page cache (as far as the system lets go of them), then with them in it. Times count from the start of the process; the
first step is over when its loss is in metrics.jsonl. Memory is that of the main process: `anonymous` is its own,
`mapped` are pages of files, libraries too, which the system can take back; `most` is the highest sum of both.
`--songs 20000 --song-seconds 10` and `--songs 200 --song-seconds 240` show what many or long songs cost. Random
weights, written to a temporary folder first. Without a GPU it runs the tiny size.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import repository  # noqa: F401
import torch

from benchmarks.subject import SIZES
from benchmarks.train import write_checkpoint
from sidestep.model.checkpoint import decoder_tensors, find_checkpoint
from sidestep.preprocess.tensors import FRAMES_PER_SECOND, Sample, sample_bytes

ROOT = Path(__file__).resolve().parent.parent
GB = 1e9
PROMPT_ROWS = 512
IMPORTS = "import sidestep.listen.samples, sidestep.training.fit, sidestep.training.run, sidestep.ui.tensorboard"
LIMIT_SECONDS = 15
LIMIT_OVER_DECODER_GB = 1.0


@dataclass(slots=True, kw_only=True)
class Started:
    """One start: seconds from the start of the process, memory and bytes in GB; `code` is its exit code."""

    cache: str
    run_started_s: float
    first_step_s: float
    anonymous_gb: float
    mapped_gb: float
    most_gb: float
    read_calls_gb: float
    from_disk_gb: float
    code: int


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Say what is done, and on a line of its own how long it took: a slow disk is seen as one."""
    print(f"{what} ...", file=sys.stderr, flush=True)
    began = time.perf_counter()
    yield
    print(f"  {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)


def write_songs(folder: Path, *, count: int, seconds: float, width: int) -> None:
    """Write so many equal tensor files of random numbers."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    frames = round(seconds * FRAMES_PER_SECOND)
    context = torch.cat([torch.randn(frames, 64, generator=generator), torch.ones(frames, 64)], dim=1)
    sample = Sample(
        torch.randn(frames, 64, generator=generator).bfloat16(),
        torch.randn(PROMPT_ROWS, width, generator=generator).bfloat16(),
        context.bfloat16(),
        {"duration": int(seconds), "caption": "random", "lyrics": "la " * 200},
    )
    content = sample_bytes(sample, name="song")
    for place in range(count):
        (folder / f"song{place:05}.pt").write_bytes(content)


def forget(folder: Path) -> None:
    """Ask the system to drop the folder's files from the page cache."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def remember(folder: Path) -> None:
    """Read the folder's files, so that they are in the page cache."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def start(words: Sequence[str], output: Path, *, cache: str, settings: Path) -> Started:
    """Run the command to its end, watching it until its first step is over."""
    metrics = output / "metrics.jsonl"
    environment = {**os.environ, "XDG_CONFIG_HOME": str(settings)}  # The user's own settings stay as they are.
    began = time.time()
    with (output.parent / f"{output.name}.txt").open("w") as log:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        anonymous = mapped = most = 0.0
        counted: dict[str, int] = {}
        while process.poll() is None and not _first_step(metrics):
            time.sleep(0.02)
            status, read = _numbers(process.pid, "status"), _numbers(process.pid, "io")
            if status and read:
                anonymous = max(anonymous, (status["RssAnon"] + status["RssShmem"]) * 1024)
                mapped = max(mapped, status["RssFile"] * 1024)
                most, counted = status["VmHWM"] * 1024, read
        code = process.wait()
    if code:
        sys.exit(f"The command failed with {code}:\n{Path(log.name).read_text()}")
    times = {line["event"]: datetime.fromisoformat(line["time"]).timestamp() for line in reversed(_lines(metrics))}
    return Started(
        cache=cache,
        run_started_s=times["run_started"] - began,
        first_step_s=times["metrics"] - began,
        anonymous_gb=anonymous / GB,
        mapped_gb=mapped / GB,
        most_gb=most / GB,
        read_calls_gb=counted["rchar"] / GB,
        from_disk_gb=counted["read_bytes"] / GB,
        code=code,
    )


def _numbers(process: int, file: str) -> dict[str, int]:
    """The numbers of a file of /proc, in its own units; empty when the process is gone."""
    try:
        lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (line.split(":", 1) for line in lines)
    found = {name: value.split()[0] for name, value in pairs if value.split()}
    numbers = {name: int(value) for name, value in found.items() if value.isdecimal()}
    return numbers if file == "io" or "VmHWM" in numbers else {}  # A process that is ending has no memory left.


def _first_step(metrics: Path) -> bool:
    return any(line["event"] == "metrics" for line in _lines(metrics))


def _lines(metrics: Path) -> list[dict[str, str]]:
    text = metrics.read_text(encoding="utf-8") if metrics.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def import_seconds() -> float:
    """Return how long a process takes that only imports what training imports."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - began


def table(results: Sequence[Started], imports: float, decoder_gb: float) -> str:
    """Return the results as a Markdown table, with their share of what is allowed."""
    limit = decoder_gb + LIMIT_OVER_DECODER_GB
    lines = [
        f"Imports alone {imports:.1f} s; the decoder has {decoder_gb:.2f} GB. Allowed: first step after "
        f"{LIMIT_SECONDS} s, {limit:.2f} GB of memory.",
        "",
        "| page cache | run starts s | first step s | of allowed | anonymous GB | mapped GB | most GB | of allowed "
        "| read by calls GB | from disk GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.cache} | {r.run_started_s:.1f} | {r.first_step_s:.1f} | {r.first_step_s / LIMIT_SECONDS:.2f} "
        f"| {r.anonymous_gb:.2f} | {r.mapped_gb:.2f} | {r.most_gb:.2f} | {r.most_gb / limit:.2f} "
        f"| {r.read_calls_gb:.2f} | {r.from_disk_gb:.2f} |"
        for r in results
    ]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="2b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--songs", type=int, default=20)
    parser.add_argument("--song-seconds", type=float, default=60)
    parser.add_argument("--arguments", default="", help="further flags of the command, in one string")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Write the data, start twice, print the table and the JSON."""
    arguments = parse()
    sizes = SIZES[arguments.size]
    width = sizes.get("encoder_hidden_size") or sizes.get("hidden_size", 2048)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoints, tensors = folder / "checkpoints", folder / "tensors"
        with stage("writing a checkpoint"):
            write_checkpoint(checkpoints, arguments.size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        with stage("writing songs"):
            write_songs(tensors, count=arguments.songs, seconds=arguments.song_seconds, width=width)
        decoder = sum(tensor.size for tensor in decoder_tensors(find_checkpoint(checkpoints, "base")).values())
        results = []
        for cache, prepare in (("cold", forget), ("warm", remember)):
            with stage(f"a {cache} page cache"):
                prepare(checkpoints)
            words = [sys.executable, "train.py", "--plain", "fixed", "-c", checkpoints, "-M", "base", "-d", tensors]
            words += ["-o", folder / cache, "--no-compile", "--max-steps", "2", "--log-every", "1"]
            command = [str(word) for word in [*words, *arguments.arguments.split()]]
            with stage(f"starting with a {cache} page cache"):
                results.append(start(command, folder / cache, cache=cache, settings=folder / "settings"))
            print(results[-1], flush=True)
            shutil.rmtree(folder / cache)
        content = {
            "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "torch": torch.__version__,
            "size": arguments.size,
            "songs": arguments.songs,
            "song_seconds": arguments.song_seconds,
            "decoder_gb": decoder / GB,
            "imports_s": import_seconds(),
            "results": [asdict(result) for result in results],
        }
    print(table(results, content["imports_s"], decoder / GB))
    print(json.dumps(content))
    if arguments.json:
        arguments.json.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
