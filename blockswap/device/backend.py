"""Backend: what a session uses of one device: streams, page-locking, a worker."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...hardware import READING_FAILURES, read_host_memory
from ...hardware.pinning import CudaRegistrar, PinBudget, Registrar
from .streams import CudaStreams, InlineStreams, Streams, with_index
from .worker import ThreadWorker, Worker


@dataclass(frozen=True, slots=True)
class Backend:
    """One device, as the engine uses it.

    Attributes:
        device: Where blocks run.
        open_streams: Makes the device's streams from the number of copy streams and whether copies overlap compute.
        registrar: Page-locks host memory for the device; None where nothing can be locked.
        pin_budget: Bytes that all sessions of the process may lock together; shared by all backends.
        make_worker: Makes the worker of the staged tier.
        overlap: Whether the device can copy on separate streams while it computes.
        host_room: Bytes that may be added now to host memory that the system cannot drop; None limits nothing.
    """

    device: torch.device
    open_streams: Callable[[int, bool], Streams]
    registrar: Registrar | None
    pin_budget: PinBudget
    make_worker: Callable[[Streams], Worker]
    overlap: bool = True
    host_room: Callable[[], int] | None = None


def backend_for(device: torch.device | str, *, pin_budget: PinBudget) -> Backend:
    """The backend of a real device: streams and page-locking on CUDA and HIP, synchronous copies on all other types."""
    where = torch.device(device)
    if where.type != "cuda":
        return Backend(
            where,
            open_streams=lambda count, overlap: InlineStreams(where),
            registrar=None,
            pin_budget=pin_budget,
            make_worker=lambda _: ThreadWorker(),
            overlap=False,
            host_room=_host_room,
        )

    where = with_index(where)
    # Reused, since torch takes streams from a pool of 32 per device: new ones at each adopt would soon be shared.
    opened: dict[int, Streams] = {}

    def open_streams(count: int, overlap: bool) -> Streams:  # noqa: FBT001 - called through Backend.open_streams
        if not overlap:
            return CudaStreams(where, count=0)
        if count not in opened:
            opened[count] = CudaStreams(where, count=count)
        return opened[count]

    return Backend(
        where, open_streams, CudaRegistrar(where), pin_budget, lambda _: ThreadWorker(), host_room=_host_room
    )


def _host_room() -> int:
    try:
        return read_host_memory().room_bytes
    except READING_FAILURES:  # the plan's reading of the same memory has logged it
        return sys.maxsize
