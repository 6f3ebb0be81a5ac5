"""What loading takes of the main memory: the tensors of the wanted part, and nothing else of a checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

from sidestep.model.weights import in_portions, read_header

MIB = 2**20
COUNT, SIZE = 12, 32 * MIB

# VmHWM is the most memory that the process ever had, with the pages of mapped files.
SCRIPT = """
import sys
from pathlib import Path
import torch
from sidestep.model import loading
from sidestep.model.weights import read_header

def most():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

stored = read_header(Path(sys.argv[1]))
wanted = {name: tensor for name, tensor in stored.items() if name.startswith("decoder.")}
before = most()
tensors = loading._read(wanted, device=torch.device("cpu"), dtype=torch.bfloat16)
print(most() - before, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
"""


def write_checkpoint(path: Path) -> None:
    """A checkpoint of zeros that takes no room on disk: tensors of the decoder among larger ones of other parts."""
    entries, end = {}, 0
    for number in range(COUNT):
        for name, size in ((f"decoder.{number}", SIZE), (f"tokenizer.{number}", 4 * SIZE)):
            entries[name] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [end, end + size]}
            end += size
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


def test_loading_takes_the_memory_of_what_is_loaded_and_a_little_more(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model.safetensors")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model.safetensors")]
    taken, loaded = map(int, subprocess.run(command, capture_output=True, check=True, text=True).stdout.split())
    assert loaded == COUNT * SIZE // 2
    # The float32 it was made from is twice as large, and the rest of the file eight times that.
    assert taken < loaded + 160 * MIB


def test_tensors_are_read_in_the_order_of_the_disk_in_portions(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model.safetensors")
    stored = read_header(tmp_path / "model.safetensors")
    wanted = [tensor for name, tensor in stored.items() if name.startswith("decoder.")]
    portions = list(in_portions(reversed(wanted)))
    assert [tensor for portion in portions for tensor in portion] == wanted
    assert sum(tensor.size for tensor in wanted) == COUNT * SIZE
    assert [len(portion) for portion in portions] == [2] * (COUNT // 2)
