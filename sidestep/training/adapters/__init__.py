"""The kinds of adapter, by the names users give them."""

from collections.abc import Callable, Sequence

from torch import nn

from sidestep.config.train import TrainConfig
from sidestep.training.adapters.base import Adapter
from sidestep.training.adapters.lora import attach_lora


def _lora(decoder: nn.Module, modules: Sequence[str], config: TrainConfig) -> Adapter:
    return attach_lora(
        decoder,
        modules,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        bias=config.bias,
        use_rslora=config.use_rslora,
        use_dora=config.adapter_type == "dora",
    )


ADAPTERS: dict[str, Callable[[nn.Module, Sequence[str], TrainConfig], Adapter]] = {"lora": _lora, "dora": _lora}
