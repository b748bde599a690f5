"""A CPU keeps the memory of one batch for the next, and no longer than asked."""

import platform
import resource

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_a_freed_tensor_is_kept_for_the_next_inside_the_block_alone() -> None:
    enough = VALUES * 4 // resource.getpagesize() // 2
    with heap_kept():
        # Tests before this one may have left more than what may be kept.
        trim_heap()
        new_pages()
        assert new_pages() < enough
        trim_heap(FREED)
        assert new_pages() < enough
        trim_heap(VALUES)
        assert new_pages() > enough
    assert new_pages() > enough
