"""What a device offers to a transfer: streams, events, memory, copies; on CUDA or HIP, and where it has no streams."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from .failures import translate_out_of_memory


class Streams(ABC):
    """The primitives of one device. `Transfer` keeps the rules of order; an implementation keeps none.

    A stream and an event are opaque. The last five methods are notices of what happens to memory outside of copies: a
    real device has no use for them, the simulated one checks the order with them and keeps its clocks.

    Attributes:
        device: Where memory is allocated.
        copy_streams: The streams that copies run on.
    """

    device: torch.device
    copy_streams: Sequence[Any]

    @abstractmethod
    def guard(self) -> contextlib.AbstractContextManager[object]:
        """Makes `device` the current one while the rules run."""

    @abstractmethod
    def current(self) -> Any:
        """The compute stream: the one on which the caller's kernels are queued at this moment."""

    @abstractmethod
    def event(self) -> Any:
        """A new event, not recorded."""

    @abstractmethod
    def record(self, event: Any, stream: Any) -> None:
        """`event` now stands for everything queued on `stream` so far."""

    @abstractmethod
    def wait(self, stream: Any, event: Any) -> None:
        """What is queued on `stream` from now on runs after `event`'s last record."""

    @abstractmethod
    def host_wait(self, event: Any) -> None:
        """Blocks the calling thread until `event`'s last record has been reached."""

    @abstractmethod
    def allocate(self, nbytes: int) -> torch.Tensor:
        """Device memory, uint8, `(nbytes,)`, ordered on the compute stream."""

    @abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        """Queues a copy of bytes to the device on `stream`."""

    @abstractmethod
    def mark(self, stream: Any) -> Any:
        """A point in time on `stream`, to be read later with `elapsed_ms`."""

    @abstractmethod
    def reached(self, mark: Any) -> bool:
        """Whether the device has passed a mark; does not wait."""

    @abstractmethod
    def elapsed_ms(self, begin: Any, end: Any) -> float:
        """Milliseconds between two marks; waits until the device has passed them."""

    def host_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies bytes from host memory to host memory in the calling thread."""
        target.copy_(source)

    def free(self, memory: torch.Tensor) -> None:
        """The caller drops `memory`: the compute stream may give it to others from here on."""

    def reads(self, memory: torch.Tensor, nbytes: int, stream: Any) -> None:
        """Kernels on `stream` read the first `nbytes` of `memory` at this point."""

    def host_writes(self, address: int, nbytes: int) -> None:
        """The host writes, unregisters or frees this memory at this point."""

    def forget(self, address: int, nbytes: int) -> None:
        """This memory goes back to the system: other data may lie at its address from here on."""

    def computed(self, block: int, stream: Any) -> None:
        """The kernels of `block` have been queued on `stream`."""


class CudaStreams(Streams):
    """Streams of a CUDA or HIP device (torch.cuda is both).

    Args:
        device: The device, with or without index.
        count: Number of copy streams; 0 for none of their own: copies run on the stream that is current now, in order
            with its kernels.
    """

    def __init__(self, device: torch.device, *, count: int) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device(device.type, index)
        # Copies queued here overlap the kernels of the compute stream; several overlap one another's launch gaps.
        own = tuple(torch.cuda.Stream(self.device) for _ in range(count))
        self.copy_streams = own or (torch.cuda.current_stream(self.device),)

    def guard(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.device(self.device.index)

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def event(self) -> torch.cuda.Event:
        # Blocking: a thread that waits for it, the staging worker above all, gives its core away meanwhile.
        return torch.cuda.Event(blocking=True)

    def record(self, event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
        event.record(stream)

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def host_wait(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def allocate(self, nbytes: int) -> torch.Tensor:
        return allocate_bytes(self.device, nbytes)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(stream)
        return mark

    def reached(self, mark: torch.cuda.Event) -> bool:
        return bool(mark.query())

    def elapsed_ms(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        begin.synchronize()
        end.synchronize()
        return float(begin.elapsed_time(end))


class InlineStreams(Streams):
    """A device without streams: a copy is over when `copy` returns, so that every event has been reached at once."""

    def __init__(self, device: torch.device) -> None:
        if device.index is None and device.type != "cpu":
            device = torch.device(device.type, torch.get_device_module(device).current_device())
        self.device = device
        self.copy_streams = ("inline",)

    def guard(self) -> contextlib.AbstractContextManager[object]:
        return _NO_GUARD

    def current(self) -> str:
        return "inline"

    def event(self) -> str:
        return "reached"

    def record(self, event: str, stream: str) -> None:
        """What it stands for is over."""

    def wait(self, stream: str, event: str) -> None:
        """What it waits for is over."""

    def host_wait(self, event: str) -> None:
        """What it waits for is over."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        return allocate_bytes(self.device, nbytes)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: str) -> None:
        target.copy_(source)

    def mark(self, stream: str) -> float:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()
        return time.perf_counter()

    def reached(self, mark: float) -> bool:
        return True

    def elapsed_ms(self, begin: float, end: float) -> float:
        return (end - begin) * 1e3


_NO_GUARD = contextlib.nullcontext()


def allocate_bytes(device: torch.device, nbytes: int) -> torch.Tensor:
    """Bytes on a device, as a normal (not an inference) tensor.

    Raises:
        DeviceMemoryError: The device has less left.
    """
    with translate_out_of_memory(device, nbytes), torch.inference_mode(mode=False):
        return torch.empty(nbytes, dtype=torch.uint8, device=device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of any kind on a device.

    Raises:
        DeviceMemoryError: The device has less left.
    """
    with translate_out_of_memory(device, tensor.numel() * tensor.element_size()):
        return tensor.to(device)
