"""EVA (Paischer et al. 2024, arXiv 2410.07170) by PEFT: directions of layer inputs, ranks by explained variance.

The model runs once over the draws and leaves a sample of each layer's inputs; PEFT then works on these alone, as often
as it wants. With its decompositions amid the model's passes 128 draws of a 2B model took an H100 over four minutes.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO

import torch
from peft import EvaConfig, LoraConfig, get_eva_state_dict
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from sidestep.errors import RunError
from sidestep.estimate.question import Question
from sidestep.events import Notice
from sidestep.model.names import to_diffusers, to_original

ROWS_PER_DIRECTION = 16  # Inputs that are kept of a layer, for each direction wanted.
ROWS_PER_DRAW = 16  # And of each draw at least, so that few directions are not found from few positions.
ROWS_TO_COMPARE = 8  # PEFT looks at all numbers, one by one, to find layers of the same input; so many rows are enough.
MOST_ROUNDS = 20
RHO = 2  # The largest rank as a multiple of the uniform one; PEFT's own default.
SETTLED = 0.99  # Cosine between a direction and itself one round earlier; PEFT's own default.


def eva_components(question: Question) -> dict[str, Tensor]:
    """Return the principal directions [rank, inputs] of each layer's input, as many as EVA's ranks give it.

    Its ranks sum to the uniform rank times the layers; they are at most twice it and at most `rank_max`. RunError when
    the directions do not settle within 20 rounds.
    """
    config = question.config
    narrowest = min(min(outputs, inputs // 2) for outputs, inputs in question.shapes.values())
    most = min(RHO * config.rank, config.rank_max, narrowest)
    rows = _sampled_inputs(question, most * ROWS_PER_DIRECTION)
    most = min(most, *(len(each) // 2 for each in rows.values()))  # A decomposition asks for twice as many.
    rank = min(config.rank, most)
    lora = LoraConfig(
        r=rank,
        target_modules=[to_diffusers(name) for name in question.layers],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=most / rank, tau=SETTLED),
    )
    heard = StringIO()
    with redirect_stdout(heard):
        state = get_eva_state_dict(
            question.model.decoder,
            [torch.zeros(())],  # What the layers see comes from `rows`.
            peft_config=lora,
            forward_fn=_shown(question, rows),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
    for line in sorted(set(heard.getvalue().splitlines())):
        question.emit(Notice(text=line, level="warning"))
    return _by_layer(state, question.layers)


def _by_layer(state: Mapping[str, Tensor], layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    found = {to_original(name): components for name, components in state.items()}
    return {name: found[name] for name in layers}


@dataclass(slots=True)
class _Sample:
    """Keeps some rows [inputs] of what layers are given in a pass, in main memory; a shared input is kept once."""

    each: int
    dtype: torch.dtype
    generator: torch.Generator
    counted: Tensor | None = None
    """The prompt's rows of this pass that are no padding, numbered over the batch; None for all."""
    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    kept: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """Return what a layer calls before it computes."""
        sees_prompt = name.endswith(("cross_attn.k_proj", "cross_attn.v_proj"))

        def take(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs = arguments[0]
            if inputs not in self.kept:
                flat = inputs.detach().flatten(0, -2)
                some = self.counted if sees_prompt and self.counted is not None else torch.arange(len(flat))
                chosen = some[torch.randperm(len(some), generator=self.generator)[: self.each]]
                self.kept[inputs] = flat[chosen.to(flat.device)].to(dtype=self.dtype, device="cpu")
            self.rows.setdefault(name, []).append(self.kept[inputs])

        return take


def _sampled_inputs(question: Question, count: int) -> dict[str, Tensor]:
    """Run the model over all draws; returns [N, inputs] of each layer, N at least `count` where there are so many.

    The positions are drawn anew for each draw and input, from the seed.
    """
    draws = [*question.first, *question.second]
    each = max(ROWS_PER_DRAW, -(-count // len(draws)))
    sample = _Sample(each, question.model.dtype, torch.Generator().manual_seed(question.config.seed))
    with ExitStack() as stack, torch.no_grad():
        for name, layer in question.layers.items():
            handle = layer.register_forward_pre_hook(sample.hook(name))
            stack.callback(handle.remove)
        for songs, task in question.tasks(draws):
            sample.counted = None if task.rows_BL is None else task.rows_BL.flatten().nonzero().flatten()
            question.losses(task.to(question.model.device))
            question.report(songs)
    return {name: torch.cat(rows) for name, rows in sample.rows.items()}


def _shown(question: Question, rows: Mapping[str, Tensor]) -> Callable[[nn.Module, Tensor], None]:
    """Return what shows every layer its rows, and gives up after so many rounds; PEFT goes on until all is settled."""
    rounds = iter(range(MOST_ROUNDS + 1))

    def forward(decoder: nn.Module, nothing: Tensor) -> None:
        number = next(rounds, None)
        if number is None:
            raise RunError(
                f"EVA's directions did not settle in {MOST_ROUNDS} rounds.",
                hint="Give it more inputs to look at with --estimate-batches, or a smaller --rank-max.",
            )
        for name, layer in question.layers.items():
            shown = rows[name][:ROWS_TO_COMPARE] if number == 0 else rows[name]
            layer(shown.to(question.model.device))

    return forward
