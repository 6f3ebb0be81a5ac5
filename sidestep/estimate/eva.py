"""EVA (Paischer et al. 2024, arXiv 2410.07170) by PEFT: directions of layer inputs, ranks by explained variance."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from unittest.mock import patch

from peft import EvaConfig, LoraConfig, get_eva_state_dict
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor, nn

from sidestep.errors import RunError
from sidestep.estimate.question import Question
from sidestep.events import Notice
from sidestep.model.device import full_precision
from sidestep.model.names import to_diffusers, to_original
from sidestep.training.objective import Task

ROWS_PER_DIRECTION = 4  # Inputs of a pass that are looked at, for each direction wanted: more cost time, few add any.
MOST_ROUNDS = 20
RHO = 2  # The largest rank as a multiple of the uniform one; PEFT's own default.
SETTLED = 0.99  # Cosine between a direction and itself one pass earlier; PEFT's own default.


def eva_components(question: Question) -> dict[str, Tensor]:
    """Return the principal directions [rank, inputs] of each layer's input, as many as EVA's ranks give it.

    Its ranks sum to the uniform rank times the layers; they are at most twice it and at most `rank_max`. RunError when
    the directions do not settle within 20 rounds over the draws.
    """
    config, model = question.config, question.model
    asked = [task.to(model.device) for _, task in question.tasks([*question.first, *question.second])]
    width = min(min(*shape) for shape in question.shapes.values())
    most = min(RHO * config.rank, config.rank_max, width, *(task.latents_BTC.shape[1] // 2 for task in asked))
    rank = min(config.rank, most)
    lora = LoraConfig(
        r=rank,
        target_modules=[to_diffusers(name) for name in question.layers],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=most / rank, tau=SETTLED),
    )
    heard = StringIO()
    with redirect_stdout(heard), _full_precision():
        state = get_eva_state_dict(
            model.decoder,
            asked,
            peft_config=lora,
            forward_fn=_counted(question, len(asked)),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=_thinned(most * ROWS_PER_DIRECTION),
            show_progress_bar=False,
        )
    for line in sorted(set(heard.getvalue().splitlines())):
        question.emit(Notice(text=line, level="warning"))
    return _by_layer(state, question.layers)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Let PEFT decompose in float32: it does so amid a pass, under its autocast, and CUDA cannot in bfloat16."""
    fit = IncrementalPCA.partial_fit

    def exact(pca: IncrementalPCA, inputs: Tensor) -> IncrementalPCA:
        with full_precision(inputs.device):
            return fit(pca, inputs)

    with patch.object(IncrementalPCA, "partial_fit", exact):
        yield


def _by_layer(state: Mapping[str, Tensor], layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    found = {to_original(name): components for name, components in state.items()}
    return {name: found[name] for name in layers}


def _counted(question: Question, batches: int) -> Callable[[nn.Module, Task], None]:
    """Return a forward pass that gives up after so many rounds; PEFT by itself goes on until all is settled."""
    passes = iter(range(MOST_ROUNDS * batches))

    def forward(decoder: nn.Module, task: Task) -> None:
        if next(passes, None) is None:
            raise RunError(
                f"EVA's directions did not settle in {MOST_ROUNDS} rounds over the draws.",
                hint="Give it more of them with --estimate-batches, or a smaller --rank-max.",
            )
        question.losses(task)

    return forward


def _thinned(rows: int) -> Callable[[object, object, str], Tensor]:
    """Return what takes at most so many inputs of a layer, evenly spread."""

    def inputs(layer_input: object, model_input: object, name: str) -> Tensor:
        tensor = layer_input[0] if isinstance(layer_input, tuple) else layer_input
        assert isinstance(tensor, Tensor)
        flat = tensor.reshape(-1, tensor.shape[-1])
        return flat[:: max(1, -(-len(flat) // rows))].contiguous()

    return inputs
