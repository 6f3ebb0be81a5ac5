"""How many threads the toy computes with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one core inside this context.

    A toy's tensors are too small to be shared out: threads that wait for each other cost more than they save, on a busy
    machine several times as much.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
