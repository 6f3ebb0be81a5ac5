"""The kinds of adapter, by the names users give them."""

from collections.abc import Callable, Sequence

from torch import nn

from sidestep.config.rank_map import read_rank_map
from sidestep.config.train import TrainConfig
from sidestep.training.adapters.base import Adapter
from sidestep.training.adapters.lora import attach_lora
from sidestep.training.adapters.lycoris import attach_loha, attach_lokr
from sidestep.training.directions import read_directions


def _lora(decoder: nn.Module, modules: Sequence[str], config: TrainConfig) -> Adapter:
    ranks = read_rank_map(config.rank_map).ranks if config.rank_map else {}
    return attach_lora(
        decoder,
        modules,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        bias=config.bias,
        use_rslora=config.use_rslora,
        use_dora=config.adapter_type == "dora",
        ranks=ranks,
        start=read_directions(config.rank_map, ranks) if config.rank_map and config.rank_map_start else {},
    )


def _lokr(decoder: nn.Module, modules: Sequence[str], config: TrainConfig) -> Adapter:
    return attach_lokr(
        decoder,
        modules,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        factor=config.lokr_factor,
        decompose_both=config.lokr_decompose_both,
        use_tucker=config.lokr_use_tucker,
        use_scalar=config.lokr_use_scalar,
        weight_decompose=config.lokr_weight_decompose,
    )


def _loha(decoder: nn.Module, modules: Sequence[str], config: TrainConfig) -> Adapter:
    return attach_loha(decoder, modules, rank=config.rank, alpha=config.alpha, dropout=config.dropout)


ADAPTERS: dict[str, Callable[[nn.Module, Sequence[str], TrainConfig], Adapter]] = {
    "lora": _lora,
    "dora": _lora,
    "lokr": _lokr,
    "loha": _loha,
}
