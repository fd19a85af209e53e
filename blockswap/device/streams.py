"""What a device offers to a transfer: streams, events, memory, copies; on CUDA or HIP, and where it has no streams."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from ...hardware import is_out_of_memory
from ..errors import DeviceMemoryError


class Streams(Protocol):
    """The primitives of one device. `Transfer` holds the rules of order; an implementation holds none.

    A stream and an event are opaque. `current()` is the compute stream: the one on which the caller's kernels are
    queued at that moment. `reads`, `host_writes`, `computed` and `forget` say what happens to memory outside of copies;
    a real device has nothing to do there, the simulated one checks the order and keeps its clocks.
    """

    device: torch.device

    @property
    def copy_streams(self) -> Sequence[Any]:
        """The streams that copies run on."""

    def guard(self) -> contextlib.AbstractContextManager[object]:
        """Makes `device` the current one while the rules run."""

    def current(self) -> Any:
        """The compute stream at this moment."""

    def event(self) -> Any:
        """A new event, not recorded."""

    def record(self, event: Any, stream: Any) -> None:
        """`event` now stands for everything queued on `stream` so far."""

    def wait(self, stream: Any, event: Any) -> None:
        """What is queued on `stream` from now on runs after `event`'s last record."""

    def host_wait(self, event: Any) -> None:
        """Blocks the calling thread until `event`'s last record has been reached."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Device memory, uint8, `(nbytes,)`, ordered on the compute stream."""

    def free(self, memory: torch.Tensor) -> None:
        """`memory` is given up: the compute stream may hand it to anybody from here on."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        """Queues a copy of bytes to the device on `stream`."""

    def host_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies bytes from host memory to host memory in the calling thread."""

    def reads(self, memory: torch.Tensor, nbytes: int, stream: Any) -> None:
        """Kernels on `stream` read the first `nbytes` of `memory` at this point."""

    def host_writes(self, address: int, nbytes: int) -> None:
        """The host writes, unregisters or frees this memory at this point."""

    def forget(self, address: int, nbytes: int) -> None:
        """This memory goes back to the system: what comes at its address has nothing to do with it."""

    def computed(self, block: int, stream: Any) -> None:
        """The kernels of `block` have been queued on `stream`."""

    def mark(self, stream: Any) -> Any:
        """A point in time on `stream`, to be read with `elapsed_ms` when all is over."""

    def reached(self, mark: Any) -> bool:
        """Whether the device has passed a mark; does not wait."""

    def elapsed_ms(self, begin: Any, end: Any) -> float:
        """Milliseconds between two marks; waits until the device has passed them."""


class CudaStreams:
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

    def free(self, memory: torch.Tensor) -> None:
        """Nothing: torch's allocator takes it back with the last reference."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def host_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def reads(self, memory: torch.Tensor, nbytes: int, stream: torch.cuda.Stream) -> None:
        """Nothing: the kernels themselves read."""

    def host_writes(self, address: int, nbytes: int) -> None:
        """Nothing: the caller itself writes."""

    def forget(self, address: int, nbytes: int) -> None:
        """Nothing: only a simulation keeps records of addresses."""

    def computed(self, block: int, stream: torch.cuda.Stream) -> None:
        """Nothing: the kernels themselves take their time."""

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


class InlineStreams:
    """A device without streams: every copy is done when it has been asked for."""

    def __init__(self, device: torch.device) -> None:
        if device.index is None and device.type != "cpu":
            device = torch.device(device.type, torch.get_device_module(device).current_device())
        self.device = device
        self.copy_streams = ("inline",)

    def guard(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def current(self) -> str:
        return "inline"

    def event(self) -> None:
        return None

    def record(self, event: None, stream: str) -> None:
        """Nothing: there is one order only."""

    def wait(self, stream: str, event: None) -> None:
        """Nothing: there is one order only."""

    def host_wait(self, event: None) -> None:
        """Nothing: copies are over when `copy` returns."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        return allocate_bytes(self.device, nbytes)

    def free(self, memory: torch.Tensor) -> None:
        """Nothing: torch takes it back with the last reference."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: str) -> None:
        target.copy_(source)

    def host_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def reads(self, memory: torch.Tensor, nbytes: int, stream: str) -> None:
        """Nothing: there is one order only."""

    def host_writes(self, address: int, nbytes: int) -> None:
        """Nothing: there is one order only."""

    def forget(self, address: int, nbytes: int) -> None:
        """Nothing: only a simulation keeps records of addresses."""

    def computed(self, block: int, stream: str) -> None:
        """Nothing: the kernels themselves take their time."""

    def mark(self, stream: str) -> float:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()
        return time.perf_counter()

    def reached(self, mark: float) -> bool:
        return True

    def elapsed_ms(self, begin: float, end: float) -> float:
        return (end - begin) * 1e3


def allocate_bytes(device: torch.device, nbytes: int) -> torch.Tensor:
    """Bytes on a device, as a normal (not an inference) tensor.

    Raises:
        DeviceMemoryError: The device has no such amount left.
    """
    with _one_clear_error(device, nbytes), torch.inference_mode(mode=False):
        return torch.empty(nbytes, dtype=torch.uint8, device=device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of any kind on a device.

    Raises:
        DeviceMemoryError: The device has not so much left.
    """
    with _one_clear_error(device, tensor.numel() * tensor.element_size()):
        return tensor.to(device)


@contextlib.contextmanager
def _one_clear_error(device: torch.device, nbytes: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as cause:
        if not is_out_of_memory(cause):
            raise
        raise DeviceMemoryError(
            f"{device} expects {nbytes:,} free bytes for block weights but ran out of memory; "
            "lower vram_threshold_percent, swap more blocks, or close other programs on the GPU"
        ) from cause
