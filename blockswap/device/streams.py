"""Streams, events, memory and copies of a device: of CUDA and HIP, and of devices without streams."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from .failures import translate_out_of_memory


class Streams(ABC):
    """The primitives of one device. The rules of order are in `Transfer`; an implementation orders nothing by itself.

    Streams and events are opaque. The last five methods report uses of memory other than copies. They do nothing on a
    real device; the simulated one uses them to check the order and to advance its clocks.

    Attributes:
        device: Where memory is allocated.
        copy_streams: The streams that copies run on.
        least_chunk_bytes: A slab is not cut into smaller chunks for several copy streams.
    """

    device: torch.device
    copy_streams: Sequence[Any]
    least_chunk_bytes = 1

    @abstractmethod
    def guard(self) -> contextlib.AbstractContextManager[object]:
        """A context in which `device` is the current device."""

    @abstractmethod
    def current(self) -> Any:
        """The compute stream: the one on which the caller queues kernels now."""

    @abstractmethod
    def event(self) -> Any:
        """A new event, not recorded yet."""

    @abstractmethod
    def record(self, event: Any, stream: Any) -> None:
        """Makes `event` stand for everything queued on `stream` so far."""

    @abstractmethod
    def wait(self, stream: Any, event: Any) -> None:
        """Makes all later work on `stream` run after the last record of `event`."""

    @abstractmethod
    def host_wait(self, event: Any) -> None:
        """Blocks the calling thread until the device has reached the last record of `event`."""

    @abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        """Queues a copy of bytes to the device on `stream`."""

    @abstractmethod
    def mark(self, stream: Any) -> Any:
        """Records a point in time on `stream`, for `elapsed_ms`."""

    @abstractmethod
    def reached(self, mark: Any) -> bool:
        """Whether the device has passed the mark; does not wait."""

    @abstractmethod
    def elapsed_ms(self, begin: Any, end: Any) -> float:
        """Milliseconds between two marks; waits until the device has passed both."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Device memory, uint8, `(nbytes,)`, ordered on the compute stream; a normal tensor, not an inference tensor.

        Raises:
            DeviceMemoryError: The device has less left.
        """
        with translate_out_of_memory(self.device, nbytes), torch.inference_mode(mode=False):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def host_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies bytes from host memory to host memory in the calling thread."""
        target.copy_(source)

    def free(self, memory: torch.Tensor) -> None:
        """The caller drops `memory`: later work on the compute stream may reuse it."""

    def reads(self, memory: torch.Tensor, nbytes: int, stream: Any) -> None:
        """Kernels on `stream` read the first `nbytes` of `memory` now."""

    def host_writes(self, address: int, nbytes: int) -> None:
        """The host writes, unregisters or frees this memory now."""

    def forget(self, address: int, nbytes: int) -> None:
        """This memory goes back to the system: its address may hold other data from now on."""

    def computed(self, block: int, stream: Any) -> None:
        """The kernels of `block` have been queued on `stream`."""


class CudaStreams(Streams):
    """Streams of a CUDA or HIP device (torch.cuda is both).

    Args:
        device: The device, with or without index.
        count: Number of copy streams; with 0, copies run on the stream that is current now, in order with its kernels.
    """

    least_chunk_bytes = 32 << 20  # far above what waiting for one more event costs

    def __init__(self, device: torch.device, *, count: int) -> None:
        self.device = with_index(device)
        # These copies overlap the kernels of the compute stream; with several streams, also each other's launch gaps.
        own = tuple(torch.cuda.Stream(self.device) for _ in range(count))
        self.copy_streams = own or (torch.cuda.current_stream(self.device),)

    def guard(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.device(self.device.index)

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def event(self) -> torch.cuda.Event:
        # Blocking: a thread that waits for the event, such as the staging worker, leaves its core to others meanwhile.
        return torch.cuda.Event(blocking=True)

    def record(self, event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
        event.record(stream)

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def host_wait(self, event: torch.cuda.Event) -> None:
        event.synchronize()

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
    """A device without streams: `copy` returns when the copy is complete, so that each event is reached at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = with_index(device)
        self.copy_streams = ("inline",)

    def guard(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def current(self) -> str:
        return "inline"

    def event(self) -> str:
        return "reached"

    def record(self, event: str, stream: str) -> None: ...

    def wait(self, stream: str, event: str) -> None: ...

    def host_wait(self, event: str) -> None: ...

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


def with_index(device: torch.device) -> torch.device:
    """The device with its index: that of the current device where `device` has none."""
    if device.index is not None or device.type == "cpu":
        return device
    return torch.device(device.type, torch.get_device_module(device).current_device())


def to_device(tensor: torch.Tensor, device: torch.device, *, what: str) -> torch.Tensor:
    """A tensor of any kind on a device, a parameter if it is one.

    Args:
        tensor: The tensor.
        device: The device.
        what: Its name, type and bytes, for messages.

    Raises:
        DeviceMemoryError: The device has too little memory left.
        UnsupportedModelError: The tensor's class cannot do it.
    """
    try:
        with translate_out_of_memory(device, tensor.numel() * tensor.element_size()):
            moved = tensor.detach().to(device)
        is_parameter = isinstance(tensor, nn.Parameter)
        return nn.Parameter(moved, requires_grad=tensor.requires_grad) if is_parameter else moved
    except (NotImplementedError, TypeError, AttributeError) as failure:  # of an operation that the class lacks
        raise UnsupportedModelError(
            f"{what} can be neither taken apart nor moved to {device}, since its class fails with "
            f"{type(failure).__name__}: {failure}; load the model with another quantization"
        ) from failure
