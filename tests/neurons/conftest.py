"""One thread of torch a worker."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Keep torch to one thread: the tensors are tiny, and several workers share the cores."""
    torch.set_num_threads(1)
