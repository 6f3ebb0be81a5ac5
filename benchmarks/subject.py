"""What the benchmarks measure: a decoder of real size with random weights, tasks for it, the work in a step."""

import gc
from dataclasses import dataclass

import torch
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from torch import Tensor

from sidestep.preprocess.tensors import FRAMES_PER_SECOND
from sidestep.training.batches import Batch
from sidestep.training.objective import Task

SIZES = {
    "2b": {},
    "xl": {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 32, "num_attention_heads": 32,
        "encoder_hidden_size": 2048,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16,
    },
}  # fmt: skip
PROMPT_ROWS = 512


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the benchmark runs, and the ceiling it is held against."""

    device: torch.device
    dtype: torch.dtype
    name: str
    matmul_tflops: float


def this_machine() -> Machine:
    """Return the GPU with its measured bf16 matmul ceiling, else the CPU in float32."""
    if not torch.cuda.is_available():
        return Machine(torch.device("cpu"), torch.float32, "CPU", float("nan"))
    device = torch.device("cuda")
    return Machine(device, torch.bfloat16, torch.cuda.get_device_name(), _matmul_tflops(device))


def build_decoder(size: str, machine: Machine) -> AceStepTransformer1DModel:
    """Return a decoder with random weights in the machine's dtype, the same for the same size."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(machine.dtype)
    with machine.device:
        decoder = AceStepTransformer1DModel(**SIZES[size])
    torch.set_default_dtype(default)
    return decoder.eval()


def meta_decoder(size: str) -> AceStepTransformer1DModel:
    """Return the shape of a decoder, without its weights."""
    with torch.device("meta"):
        return AceStepTransformer1DModel(**SIZES[size])


def make_batch(
    decoder: AceStepTransformer1DModel, seconds: float, *, batch_size: int, seed: int, has_padding: bool = False
) -> Batch:
    """Return a batch of random latents on the CPU, pinned where there is a GPU.

    `has_padding`: the last fifth of the prompt's rows is padding, behind a mask.
    """
    generator = torch.Generator().manual_seed(seed)
    frames = round(seconds * FRAMES_PER_SECOND)
    config = decoder.config
    width = config["encoder_hidden_size"] or config["hidden_size"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch_size, *shape, generator=generator)

    task = Task(
        latents_BTC=normal(frames, 64),
        context_BTC=normal(frames, 128),
        condition_BLD=normal(PROMPT_ROWS, width),
        rows_BL=(torch.arange(PROMPT_ROWS) < PROMPT_ROWS * 4 // 5).repeat(batch_size, 1) if has_padding else None,
        noise_BTC=normal(frames, 64),
        timesteps_B=torch.rand(batch_size, generator=generator),
        is_dropped_B=torch.zeros(batch_size, dtype=torch.bool),
    )
    return Batch(task.pin_memory() if torch.cuda.is_available() else task, ("random",) * batch_size)


def step_tflop(decoder: AceStepTransformer1DModel, seconds: float, rank: int, modules: list[str]) -> float:
    """Return the model TFLOP of one step at batch 1: forward, gradients of inputs, LoRA; no recomputation counted.

    Attention's backward counts twice its forward; sliding layers count their window alone.
    """
    c = decoder.config
    patches = -(-round(seconds * FRAMES_PER_SECOND) // decoder.patch_size)
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    queries, keys = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    frozen = attention = 0.0
    for kind in decoder.layer_types:
        frozen += 2 * 2 * patches * (hidden * (2 * queries + 2 * keys) + hidden * 2 * queries + 3 * hidden * inner)
        frozen += 2 * PROMPT_ROWS * hidden * 2 * keys  # The prompt needs no gradient.
        seen = min(patches, 2 * c["sliding_window"] + 1) if kind == "sliding_attention" else patches
        attention += 3 * 4 * patches * (seen + PROMPT_ROWS) * queries
    named = dict(decoder.named_modules())
    lora = 0.0
    for name in modules:
        module = named[name]
        rows = PROMPT_ROWS if "cross_attn" in name and name.endswith(("to_k", "to_v")) else patches
        lora += 3 * 2 * rows * rank * (module.in_features + module.out_features)
    return (frozen + attention + lora) / 1e12


def clear(device: torch.device) -> None:
    """Give back what earlier cases held, cuBLAS's workspaces included, and start a new peak."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _matmul_tflops(device: torch.device, size: int = 8192, repeats: int = 20) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        torch.mm(a, b)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        torch.mm(a, b)
    end.record()
    torch.cuda.synchronize()
    return 2 * size**3 * repeats / start.elapsed_time(end) / 1e9
