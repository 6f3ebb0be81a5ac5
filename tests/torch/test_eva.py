"""EVA: PEFT's decompositions of a sample of what layers are given, against all of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sidestep.errors import RunError
from sidestep.estimate import eva
from sidestep.estimate.question import Question, prepare
from sidestep.events import TrackDone
from sidestep.model.checkpoint import Checkpoint
from sidestep.training.objective import Task
from tests.torch.estimating import FRAMES, config, run
from tests.torch.tiny import write_songs


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory, base: Checkpoint) -> Path:
    return write_songs(tmp_path_factory.mktemp("songs"), base, FRAMES)


def test_eva_runs_the_model_once_a_draw_and_decomposes_outside_of_its_passes(
    songs: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    passes: list[int] = []
    precise: list[bool] = []

    def counted(question: Question, task: Task) -> torch.Tensor:
        passes.append(1)
        return losses(question, task)

    def watched(matrix: torch.Tensor, **named: Any) -> Any:
        # CUDA has no decomposition in bfloat16, which a pass's autocast would ask for.
        precise.append(matrix.dtype != torch.bfloat16 and not torch.is_autocast_enabled("cpu"))
        return decompose(matrix, **named)

    losses, decompose = Question.losses, torch.svd_lowrank
    monkeypatch.setattr(Question, "losses", counted)
    monkeypatch.setattr(torch, "svd_lowrank", watched)
    _, events = run(config(songs, method="eva", precision="bf16", rank_max=8), base)
    assert len(passes) == 12 == len([event for event in events if isinstance(event, TrackDone)])
    assert precise and all(precise)


@pytest.mark.parametrize("draws", [4, 48])
def test_eva_finds_the_principal_directions_of_all_that_layers_are_given(draws: int, songs: Path, base: Checkpoint):
    settings = config(songs, rank=6, rank_max=12, estimate_batches=draws)
    question = prepare(settings, checkpoint=base, emit=lambda event: None)
    everything = inputs_of(question)
    components = eva.eva_components(question)
    assert sum(len(each) for each in components.values()) == 6 * len(components)
    shares = []
    for name, directions_KI in components.items():
        centred_NI = everything[name] - everything[name].mean(0)
        best = torch.linalg.svdvals(centred_NI)[: len(directions_KI)].square().sum()
        shares.append(float((centred_NI @ directions_KI.double().T).square().sum() / best) if len(directions_KI) else 1)
    assert min(shares) > 0.9 and sum(shares) / len(shares) > 0.97


def inputs_of(question: Question) -> dict[str, torch.Tensor]:
    """Give all inputs [N, I] of each layer over the draws of a question."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in question.layers}
    handles = [
        layer.register_forward_pre_hook(lambda module, given, name=name: found[name].append(given[0].flatten(0, -2)))
        for name, layer in question.layers.items()
    ]
    with torch.no_grad():
        for _, task in question.tasks([*question.first, *question.second]):
            question.losses(task)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double() for name, parts in found.items()}


def test_eva_leaves_the_padding_of_prompts_out():
    sample = eva._Sample(4, torch.float32, torch.Generator().manual_seed(0), counted=torch.tensor([0, 1, 5, 6]))
    rows = torch.arange(8.0).reshape(2, 4, 1).expand(2, 4, 3)
    for name in ("layers.0.cross_attn.k_proj", "layers.0.self_attn.k_proj"):
        given = rows.clone()
        sample.hook(name)(torch.nn.Identity(), (given,))
        del given
    assert sorted(sample.rows["layers.0.cross_attn.k_proj"][0][:, 0].tolist()) == [0, 1, 5, 6]
    assert not set(sample.rows["layers.0.self_attn.k_proj"][0][:, 0].tolist()) <= {0, 1, 5, 6}


def test_directions_of_eva_that_do_not_settle_end_it(songs: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(eva, "MOST_ROUNDS", 1)  # One has nothing to be compared to.
    with pytest.raises(RunError, match="did not settle in 1 rounds"):
        run(config(songs, method="eva"), base)
