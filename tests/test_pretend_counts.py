"""The counts and limits of the pretend accelerator: copies each way, memory in use, its peak and its limit."""

from __future__ import annotations

import pretend_accelerator
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from pretend_accelerator import PretendHpu
from torch import Tensor

DEVICE = "hpu:0"


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_bytes_and_copies_are_counted_each_way(pretend_stats: PretendHpu) -> None:
    device = random(10, 10).to(DEVICE)
    device.clone()
    device[:5].copy_(random(5, 10))
    device[:1].cpu()
    assert device[0, 0].item() == random(5, 10)[0, 0].item()
    assert pretend_stats.copy_stats() == {
        "h2d_bytes": 600, "h2d_copies": 2, "d2h_bytes": 44, "d2h_copies": 2, "d2d_bytes": 400, "d2d_copies": 1,
    }  # fmt: skip
    pretend_stats.reset_copy_stats()
    assert set(pretend_stats.copy_stats().values()) == {0}


def test_computing_is_not_copying(pretend_stats: PretendHpu) -> None:
    x, weight, bias = random(7, 16).to(DEVICE), random(8, 16).to(DEVICE), random(8).to(DEVICE)
    pretend_stats.reset_copy_stats()
    F.layer_norm(F.linear(x, weight, bias), (8,)).softmax(-1)
    assert set(pretend_stats.copy_stats().values()) == {0}


def test_a_converting_copy_crosses_the_link_in_the_type_of_its_target(pretend_stats: PretendHpu) -> None:
    target = torch.empty(10, dtype=torch.bfloat16, device=DEVICE)
    target.copy_(random(10))
    assert pretend_stats.copy_stats()["h2d_bytes"] == 20


def test_memory_is_counted_in_units_of_512_bytes_and_its_peak_kept(pretend_stats: PretendHpu) -> None:
    before, allocations = pretend_stats.memory_allocated(), pretend_stats.allocation_count()
    x = torch.empty(1000, dtype=torch.uint8, device=DEVICE)
    x[10:].view(-1)
    assert pretend_stats.memory_allocated() == before + 1024
    assert pretend_stats.allocation_count() == allocations + 1
    del x
    assert pretend_stats.memory_allocated() == before
    assert pretend_stats.max_memory_allocated() == before + 1024
    pretend_stats.reset_peak_memory_stats()
    assert pretend_stats.max_memory_allocated() == before


def test_a_cap_makes_allocations_fail_with_numbers_and_shows_as_the_total(pretend_stats: PretendHpu) -> None:
    used = pretend_stats.memory_allocated()
    pretend_stats.set_memory_limit(used + 4096)
    kept = torch.zeros(512, device=DEVICE)
    assert pretend_stats.mem_get_info() == (2048, used + 4096)
    numbers = rf"tried to allocate 4096 bytes with {used + 2048} of {used + 4096} bytes in use"
    with pytest.raises(torch.OutOfMemoryError, match=numbers):
        torch.empty(1024, device=DEVICE)
    with pytest.raises(torch.OutOfMemoryError):
        torch.cat([kept, kept])
    pretend_stats.set_memory_limit(None)
    assert torch.cat([kept, kept]).numel() == 1024
    assert pretend_stats.mem_get_info()[1] == pretend_accelerator.DEFAULT_MEMORY_BYTES


def test_indices_may_come_from_the_host_as_on_cuda(pretend_stats: PretendHpu) -> None:
    device = random(4, 4).to(DEVICE)
    pretend_stats.reset_copy_stats()
    assert torch.equal(device[torch.tensor([2, 0])].cpu(), random(4, 4)[[2, 0]])
    assert pretend_stats.copy_stats()["h2d_bytes"] == 16
