"""Tests of choosing the device and the precision, with the machine's devices pretended."""

import pytest
import torch

from sidestep.errors import ConfigError
from sidestep.model.device import autocast, choose_device, choose_dtype, memory_gib


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch):
    """Say which devices this machine has, and how many of each."""

    def machine(*kinds: str, count: int = 1) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in kinds)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in kinds)
        monkeypatch.setattr(torch.xpu, "is_available", lambda: "xpu" in kinds)

    return machine


@pytest.mark.parametrize(
    ("kinds", "chosen"), [(("cuda", "mps", "xpu"), "cuda"), (("mps", "xpu"), "mps"), (("xpu",), "xpu"), ((), "cpu")]
)
def test_auto_takes_the_best_device_there_is(pretend, kinds: tuple[str, ...], chosen: str):
    pretend(*kinds)
    assert choose_device("auto").type == chosen


def test_a_device_can_be_named(pretend):
    pretend("cuda", count=2)
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("cuda") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize("name", ["mps", "xpu", "cuda:2", "gpu", "cuda:x", "meta"])
def test_a_device_that_is_not_there_is_an_error_that_says_what_is(pretend, name: str):
    pretend("cuda", count=2)
    with pytest.raises(ConfigError, match=name) as caught:
        choose_device(name)
    assert "cuda, cpu" in caught.value.hint


def test_no_cuda_at_all_says_so(pretend):
    pretend()
    with pytest.raises(ConfigError, match="--device cuda is not available") as caught:
        choose_device("cuda")
    assert "This machine has: cpu" in caught.value.hint


@pytest.mark.parametrize(
    ("precision", "device", "dtype"),
    [
        ("auto", "cuda", torch.bfloat16),
        ("auto", "xpu", torch.bfloat16),
        ("auto", "mps", torch.float16),
        ("auto", "cpu", torch.float32),
        ("fp32", "cuda", torch.float32),
        ("bf16", "cpu", torch.bfloat16),
        ("fp16", "cuda", torch.float16),
    ],
)
def test_auto_precision_follows_the_device_and_a_named_one_is_kept(precision: str, device: str, dtype: torch.dtype):
    assert choose_dtype(precision, torch.device(device)) == dtype


def test_autocast_computes_in_the_dtype_and_float32_changes_nothing():
    cpu, ones = torch.device("cpu"), torch.ones(2, 2)
    with autocast(cpu, torch.bfloat16):
        assert (ones @ ones).dtype == torch.bfloat16
    with autocast(cpu, torch.float32):
        assert (ones @ ones).dtype == torch.float32


def test_the_cpu_has_no_memory_figure():
    assert memory_gib(torch.device("cpu")) is None
