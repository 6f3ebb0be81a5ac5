"""The objective computes what the original's training computes: timesteps, loss, velocity, gradients."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from sidestep.config.recipe import TURBO_SHIFT
from sidestep.model.attention import use_processors
from sidestep.model.loading import load_decoder, load_null_condition
from sidestep.model.names import to_diffusers, to_original
from sidestep.training.adapters.base import ATTENTION_PROJECTIONS, target_names
from sidestep.training.adapters.lora import attach_lora
from sidestep.training.objective import Task
from sidestep.training.passes import Model
from sidestep.training.timesteps import Continuous, Discrete
from tests.golden.reference_cases import REFERENCE, Case, cases

CPU = torch.device("cpu")
STATISTICS: dict[str, Any] = json.loads((REFERENCE / "timestep_stats.json").read_text(encoding="utf-8"))
LEVELS = torch.tensor(STATISTICS["levels"], dtype=torch.float64)
# The original's own 1 % to 99 % quantiles of a million draws lie within 4.7e-4 of its law; ours of as many may as well.
QUANTILE_BOUND = 1.5e-3


def model_of(case: Case) -> Model:
    decoder = load_decoder(case.checkpoint(), device=CPU, dtype=case.dtype)
    return Model(
        decoder=decoder,
        cross_attention=use_processors(decoder, device=CPU, dtype=case.dtype),
        null_condition=load_null_condition(case.checkpoint(), device=CPU, dtype=case.dtype),
        weighting=None,
        recompute=[False] * len(decoder.layers),
        dropout_seed=torch.zeros((), dtype=torch.int32),
        device=CPU,
        dtype=case.dtype,
    )


def task_of(*, latents: Tensor, context: Tensor, condition: Tensor, tensors: dict[str, Tensor]) -> Task:
    """Put a task together from a case's draws; the original has no mask, so every row counts."""
    return Task(
        latents_BTC=latents,
        context_BTC=context,
        condition_BLD=condition,
        rows_BL=None,
        noise_BTC=tensors["in.x1"],
        timesteps_B=tensors["in.t"],
        is_dropped_B=~tensors["in.cfg_keep"],
    )


def check_loss(case: Case, model: Model, task: Task) -> Tensor:
    """Compare the velocity and the loss with the original's and give the loss."""
    tensors = case.tensors()
    loss = model.losses(task).mean()
    torch.testing.assert_close(loss, tensors["out.loss"], rtol=case.tolerance["loss_rtol"], atol=0)
    with torch.no_grad():
        velocity = model.velocity(task)
    torch.testing.assert_close(velocity, tensors["out.pred"], atol=case.tolerance.get("pred_atol", 2e-5), rtol=0)
    return loss


def check_gradients(case: Case, gradients: dict[str, Tensor]) -> None:
    """Compare with every gradient that the case holds, by the original's names."""
    expected = {name[9:]: value for name, value in case.tensors().items() if name.startswith("out.grad.")}
    assert expected
    for name, gradient in expected.items():
        error = float((gradients[name] - gradient).norm())
        limit = case.tolerance["grad_rel_l2"] * float(gradient.norm())  # Of zeros where no prompt was dropped.
        assert error <= limit, f"{case}: the gradient of {name} differs by {error:.3g}, allowed are {limit:.3g}"


@pytest.mark.parametrize("case", cases("train_forward"), ids=str)
def test_the_loss_and_its_gradients_are_those_of_the_original_model(case: Case):
    tensors = case.tensors()
    model = model_of(case)
    task = task_of(
        latents=tensors["in.x0"],
        context=tensors["in.context_latents"],
        condition=tensors["out.encoder_hidden_states_before_drop"],
        tensors=tensors,
    )
    model.decoder.requires_grad_(True)
    model.null_condition.requires_grad_(True)
    check_loss(case, model, task).backward()
    gradients = {
        f"decoder.{to_original(name)}": parameter.grad
        for name, parameter in model.decoder.named_parameters()
        if parameter.grad is not None
    }
    if model.null_condition.grad is not None:
        gradients["null_condition_emb"] = model.null_condition.grad
    check_gradients(case, gradients)


@pytest.mark.parametrize("case", cases("trainer_step"), ids=str)
def test_the_loss_and_the_gradients_of_a_lora_are_those_of_the_official_trainers(case: Case):
    tensors = case.tensors()
    model = model_of(case)
    lora = case.entry["lora"]
    modules = target_names(len(model.decoder.layers), attention_type="both", target_modules=ATTENTION_PROJECTIONS)
    adapter = attach_lora(model.decoder, modules, rank=lora["r"], alpha=lora["alpha"], dropout=0.0)
    adapter.read(REFERENCE / case.entry["adapter"])
    task = task_of(
        latents=tensors["in.batch.target_latents"],
        context=tensors["in.batch.context_latents"],
        condition=tensors["in.batch.encoder_hidden_states"],
        tensors=tensors,
    )
    check_loss(case, model, task).backward()
    gradients = {
        "base_model.model." + name.replace(".weight", ".default.weight"): parameter.grad
        for name, parameter in adapter.parameters.items()
        if parameter.grad is not None
    }
    assert len(gradients) == case.entry["facts"]["n_trainable"]
    check_gradients(case, gradients)


def in_bfloat16() -> tuple[Case, Task]:
    """Give the decoder's case in bfloat16 as a task: timesteps that only become the case's when they are rounded."""
    (case,) = [case for case in cases("decoder") if case.dtype == torch.bfloat16]
    tensors = {name: tensor.float() for name, tensor in case.inputs().items()}
    # Noise and latents are one and the same, so that x_t is that, whatever t.
    draws = {
        "in.x1": tensors["hidden_states"],
        "in.t": tensors["timestep"] * 1.001,
        "in.cfg_keep": torch.tensor([True, True]),
    }
    states, condition = tensors["hidden_states"], tensors["encoder_hidden_states"]
    return case, task_of(latents=states, context=tensors["context_latents"], condition=condition, tensors=draws)


def test_in_bfloat16_training_rounds_the_timestep_as_the_original_does():
    case, task = in_bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        case.check(model_of(case).velocity(task), "out.sample")


def test_in_bfloat16_noisy_latents_and_target_are_formed_in_float32_and_rounded_once():
    case, task = in_bfloat16()
    generator = torch.Generator().manual_seed(0)
    task = replace(task, noise_BTC=torch.randn(task.latents_BTC.shape, generator=generator))
    model, given = model_of(case), []
    model.decoder.proj_in_conv.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    with torch.no_grad():
        losses = model.losses(task)
    t, frames = task.timesteps_B[:, None, None], task.latents_BTC.shape[1]
    noisy = t * task.noise_BTC + (1 - t) * task.latents_BTC
    assert torch.equal(given[0].transpose(1, 2)[:, :frames, -64:], noisy.bfloat16())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        velocity = model.velocity(task)
    errors = velocity.float() - (task.noise_BTC - task.latents_BTC)
    assert velocity.dtype == torch.bfloat16 and torch.equal(losses, errors.square().mean(dim=(1, 2)))


def test_the_names_of_the_reference_gradients_are_translated_both_ways():
    for case in cases("train_forward"):
        for name in case.tensors():
            if name.startswith("out.grad.decoder."):
                bare = name.removeprefix("out.grad.decoder.")
                assert to_original(to_diffusers(bare)) == bare


def largest_deviation(drawn: Tensor, quantiles: list[float]) -> float:
    found = torch.quantile(drawn.double(), LEVELS)
    return (found - torch.tensor(quantiles, dtype=torch.float64)).abs().max().item()


def test_continuous_timesteps_follow_the_law_of_the_model_and_not_that_of_a_single_draw():
    drawn = Continuous(-0.4, 1.0).draw(1_000_000, Generator().manual_seed(3))
    assert largest_deviation(drawn, STATISTICS["theory_max_of_two_quantiles"]) < QUANTILE_BOUND
    for source in ("turbo/float32", "base/float32", "xl_base/float32", "training_v2.sample_timesteps/float32"):
        assert largest_deviation(drawn, STATISTICS[source]["quantiles"]) < QUANTILE_BOUND
    single = torch.sigmoid(torch.randn(1_000_000, generator=Generator().manual_seed(3)) - 0.4)
    assert largest_deviation(single, STATISTICS["theory_single_draw_quantiles"]) < QUANTILE_BOUND
    assert largest_deviation(single, STATISTICS["theory_max_of_two_quantiles"]) > 0.05


def test_the_quantiles_of_the_continuous_law_are_exact():
    quantiles = Continuous(-0.4, 1.0).quantiles(LEVELS)
    expected = torch.tensor(STATISTICS["theory_max_of_two_quantiles"], dtype=torch.float64)
    torch.testing.assert_close(quantiles, expected, atol=1e-7, rtol=0)


def test_continuous_timesteps_replay_the_draws_of_the_original():
    drawn = Continuous(-0.4, 1.0).draw(16, Generator().manual_seed(99))
    torch.testing.assert_close(drawn.tolist(), STATISTICS["exact_16_draws_seed99_fp32"], atol=1e-7, rtol=0)


def test_discrete_timesteps_are_the_eight_of_the_official_trainer_each_as_likely():
    sampler = Discrete(TURBO_SHIFT)
    official = STATISTICS["gradio_trainer"]
    torch.testing.assert_close(sampler.points.tolist(), official["list"], atol=1e-7, rtol=0)
    torch.testing.assert_close(sampler.points.bfloat16().tolist(), official["list_bf16"], atol=1e-7, rtol=0)
    drawn = sampler.draw(200_000, Generator().manual_seed(4))
    points, counts = drawn.unique(return_counts=True)
    torch.testing.assert_close(points, sampler.points.flip(0))
    # Four standard errors of a share of 1/8 in 200 000 draws are 0.003.
    assert (counts / 200_000 - 1 / 8).abs().max() < 0.003
