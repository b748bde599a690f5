"""A CPU keeps the memory of one batch for the next, and no longer than asked."""

import multiprocessing
import platform
import resource
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from mmray.neurons.split_on_oom import FREED, heap_kept, trim_heap

VALUES = 16 << 20
"""Values of a tensor of 64 MB, which glibc gives back to the system as soon as it is freed."""


def new_pages() -> int:
    """Return how many pages the system hands out for a tensor."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(VALUES).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def pages_of_steps() -> list[int]:
    """Return the new pages of a second tensor, and of ones after trimming to `FREED`, to less, and after the block."""
    with heap_kept(torch.device("cpu")):
        new_pages()
        pages = [new_pages()]
        trim_heap(FREED)
        pages.append(new_pages())
        trim_heap(VALUES)
        pages.append(new_pages())
    return [*pages, new_pages()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_a_freed_tensor_is_kept_for_the_next_inside_the_block_alone() -> None:
    # A new process: others' blocks in the heap may count as more than is to be kept.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pages = pool.submit(pages_of_steps).result()
    every = VALUES * 4 // resource.getpagesize()
    assert [round(count / every) for count in pages] == [0, 0, 1, 1]
