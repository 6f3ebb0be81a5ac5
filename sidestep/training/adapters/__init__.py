"""The kinds of adapter, by the names users give them."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from sidestep.config.rank_map import MapFile
from sidestep.config.train import TrainConfig
from sidestep.training.adapters.base import Adapter
from sidestep.training.adapters.lora import attach_lora
from sidestep.training.adapters.lycoris import attach_loha, attach_lokr
from sidestep.training.directions import read_directions


def attach_mapped(decoder: nn.Module, rank_map: MapFile, config: TrainConfig) -> Adapter:
    """Put a LoRA or DoRA on exactly the modules of a rank map.

    A run that goes on needs no directions to start from: its weights are in its checkpoint.
    """
    ranks = rank_map.rank_map.ranks
    starts = config.rank_map_start and config.resume_from is None
    return _peft(decoder, list(ranks), config, ranks=ranks, start=read_directions(rank_map) if starts else {})


def _lora(decoder: nn.Module, modules: Sequence[str], config: TrainConfig) -> Adapter:
    return _peft(decoder, modules, config, ranks={}, start={})


def _peft(
    decoder: nn.Module,
    modules: Sequence[str],
    config: TrainConfig,
    *,
    ranks: Mapping[str, int],
    start: Mapping[str, Tensor],
) -> Adapter:
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
        start=start,
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
