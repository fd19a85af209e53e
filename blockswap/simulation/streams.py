"""A simulated device in host memory: checks, times and disturbs the order of copies and kernels as far as is legal.

[Note: simulation]

Compute runs at once, in the host thread, as torch calls it; copies are queued on their streams. A random generator
decides whether a copy lands at once, or as late as possible: when something runs that may rely on it. From the moment a
copy is queued until it lands, its target bytes are poison (0xFF: NaN in every float format). Since values alone would
miss many races, each access to memory is also checked against all earlier ones: of two accesses to the same bytes, one
of them a write, the earlier must happen before the later by the events that were recorded and waited for (vector
clocks, as in FastTrack, Flanagan and Freund 2009). A violation raises at once, even if the values are right.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ..device.streams import Streams
from ..errors import DeviceMemoryError, TransferError
from ..model.tensors import storage_key
from .races import HOST, WORKER, Clock, RaceDetector

POISON = 0xFF


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedHardware:
    """Speeds and memory of the simulated device.

    Attributes:
        link_bytes_per_ms: Host-to-device bandwidth, shared by all copy streams.
        host_copy_bytes_per_ms: Host-to-host bandwidth of the staging worker.
        compute_ms: Duration of blocks by index.
        default_compute_ms: Duration of all other blocks.
        memory_bytes: Device memory; None is unlimited.
        lateness: Probability that a copy lands as late as is legal and not at once, 0 to 1.
        seed: Seed of the random generator.
    """

    link_bytes_per_ms: float = 25e6
    host_copy_bytes_per_ms: float = 10e6
    compute_ms: Mapping[int, float] = field(default_factory=dict)
    default_compute_ms: float = 1.0
    memory_bytes: int | None = None
    lateness: float = 0.5
    seed: int = 0


@dataclass(eq=False, slots=True)
class SimulatedEvent:
    """An event: unrecorded, or a position in a stream's queue."""

    stream: SimulatedStream | None = None
    position: int = 0
    clock: Clock = field(default_factory=dict)
    at_ms: float = 0.0


@dataclass(eq=False, slots=True)
class SimulatedStream:
    """A queue of operations that run when they are forced.

    Attributes:
        name: Name of the actor for the race detector.
        now_ms: Virtual time at which all queued operations are over.
        queue: Operations that have not run yet.
        done: Number of operations that have run.
    """

    name: str
    now_ms: float = 0.0
    queue: list[Callable[[], None]] = field(default_factory=list)
    done: int = 0

    @property
    def position(self) -> int:
        """Number of operations queued so far, including those that have run."""
        return self.done + len(self.queue)

    def run_to(self, position: int) -> None:
        """Runs the queue up to `position`."""
        while self.done < position and self.queue:
            operation = self.queue.pop(0)
            self.done += 1
            operation()


class SimulatedStreams(Streams):
    """See [Note: simulation].

    Args:
        hardware: Speeds and memory; may be replaced between forwards.
        count: Number of copy streams; with 0, copies run on the first compute stream, as with `CudaStreams`.

    Attributes:
        locked: Address and bytes of page-locked memory; copies from other memory take the calling thread's time. None
            takes all memory for page-locked.
    """

    def __init__(self, hardware: SimulatedHardware | None = None, *, count: int = 1) -> None:
        self.hardware = hardware or SimulatedHardware()
        self.device = torch.device("cpu")
        self._own_streams = tuple(SimulatedStream(f"copy {i}") for i in range(count))
        self.compute_stream = SimulatedStream("compute")
        self.copy_streams = self._own_streams or (self.compute_stream,)
        self.log = RaceDetector()
        self.allocated_bytes = 0
        self.peak_bytes = 0
        self.copied_bytes = 0
        self.locked: Mapping[int, int] | None = None
        self._current_device = {HOST: 1, WORKER: 1}
        self._compute_streams = 0
        self._homes: dict[int, tuple[int, int, SimulatedStream]] = {}
        self._actor = HOST
        self._now_ms = {HOST: 0.0, WORKER: 0.0}
        self._link_idle_ms = 0.0
        self._random = random.Random(self.hardware.seed)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        actor = self._actor
        before, self._current_device[actor] = self._current_device[actor], 0
        try:
            yield
        finally:
            self._current_device[actor] = before

    def current(self) -> SimulatedStream:
        self._check_device("asking for the compute stream")
        return self.compute_stream

    def event(self) -> SimulatedEvent:
        self._check_device("making an event")
        return SimulatedEvent()

    def record(self, event: SimulatedEvent, stream: SimulatedStream) -> None:
        self._issue(stream, "recording an event")
        event.stream, event.position, event.at_ms = stream, stream.position, stream.now_ms
        event.clock = self.log.clock(stream.name)

    def wait(self, stream: SimulatedStream, event: SimulatedEvent) -> None:
        self._issue(stream, "waiting for an event")
        source, position = self._recorded(event)
        self.log.join(stream.name, event.clock)
        stream.now_ms = max(stream.now_ms, event.at_ms)
        if stream in self._own_streams:
            stream.queue.append(lambda: source.run_to(position))
        else:
            source.run_to(position)

    def host_wait(self, event: SimulatedEvent) -> None:
        source, position = self._recorded(event)
        source.run_to(position)
        self.wait_until(event.clock, event.at_ms)

    def allocate(self, nbytes: int) -> torch.Tensor:
        self._check_device("allocating memory")
        limit = self.hardware.memory_bytes
        if limit is not None and self.allocated_bytes + nbytes > limit:
            raise DeviceMemoryError(
                f"not enough memory on the simulated device: {nbytes:,} bytes needed, "
                f"{limit - self.allocated_bytes:,} of {limit:,} free; lower vram_threshold_percent or swap more blocks"
            )
        self.allocated_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)
        with torch.inference_mode(mode=False):
            memory = torch.full((nbytes,), POISON, dtype=torch.uint8)
        self._issue(self.compute_stream, "allocating memory")
        self.log.write(self.compute_stream.name, memory.data_ptr(), nbytes, "allocation")
        self._homes[storage_key(memory)] = memory.data_ptr(), nbytes, self.compute_stream
        return memory

    def free(self, memory: torch.Tensor) -> None:
        self._check_device("freeing memory")
        # Like torch's allocator: memory goes back to the stream that it was allocated on.
        _, _, home = self._homes.pop(storage_key(memory))
        self.allocated_bytes -= memory.nbytes
        self.log.write(home.name, memory.data_ptr(), memory.nbytes, "free")
        self.log.forget(memory.data_ptr(), memory.nbytes)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: SimulatedStream) -> None:
        self._issue(stream, "queueing a copy")
        if not is_within(target, ((start, nbytes) for start, nbytes, _ in self._homes.values())):
            raise TransferError(f"a copy writes {target.nbytes:,} bytes of device memory that is not allocated")
        self.log.read(stream.name, source.data_ptr(), source.nbytes, "copy to the device")
        self.log.write(stream.name, target.data_ptr(), target.nbytes, "copy to the device")
        self.copied_bytes += target.nbytes
        begin = max(stream.now_ms, self._link_idle_ms)
        stream.now_ms = self._link_idle_ms = begin + target.nbytes / self.hardware.link_bytes_per_ms
        if self.locked is not None and not is_within(source, self.locked.items()):
            self._now_ms[self._actor] = max(self._now_ms[self._actor], stream.now_ms)
        target.fill_(POISON)

        def land() -> None:
            target.copy_(source)

        stream.queue.append(land)
        # On a compute stream, the kernels behind the copy rely on it, and they run at once.
        if stream not in self._own_streams or self.lands_now():
            stream.run_to(stream.position)

    def host_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.log.read(self._actor, source.data_ptr(), source.nbytes, "staging")
        self.log.write(self._actor, target.data_ptr(), target.nbytes, "staging")
        self._now_ms[self._actor] += target.nbytes / self.hardware.host_copy_bytes_per_ms
        target.copy_(source)

    def reads(self, memory: torch.Tensor, nbytes: int, stream: SimulatedStream) -> None:
        self._issue(stream, "reading a slot")
        self.log.read(stream.name, memory.data_ptr(), nbytes, "a block's kernels")

    def host_writes(self, address: int, nbytes: int) -> None:
        self.log.write(self._actor, address, nbytes, "the host")

    def forget(self, address: int, nbytes: int) -> None:
        self.log.forget(address, nbytes)

    def computed(self, block: int, stream: SimulatedStream) -> None:
        stream.now_ms = max(stream.now_ms, self._now_ms[HOST])
        stream.now_ms += self.hardware.compute_ms.get(block, self.hardware.default_compute_ms)

    def mark(self, stream: SimulatedStream) -> float:
        return stream.now_ms

    def reached(self, mark: float) -> bool:
        return True

    def elapsed_ms(self, begin: float, end: float) -> float:
        return end - begin

    def use_another_compute_stream(self) -> None:
        """From now on the caller queues its kernels on a new stream, as with `torch.cuda.stream`.

        The caller's own data are not checked across the change: torch's users order these themselves.
        """
        self._compute_streams += 1
        self.compute_stream = SimulatedStream(f"compute {self._compute_streams}")

    @contextlib.contextmanager
    def acting_as_worker(self, clock: Clock) -> Iterator[None]:
        """The staging worker runs the body, after all that `clock` knows of and not before the host's present time."""
        self.log.join(WORKER, clock)
        self._now_ms[WORKER] = max(self._now_ms[WORKER], self._now_ms[HOST])
        before, self._actor = self._actor, WORKER
        try:
            yield
        finally:
            self._actor = before

    def lands_now(self) -> bool:
        """Whether the next thing that may be early or late is early."""
        return self._random.random() >= self.hardware.lateness

    def now(self) -> tuple[Clock, float]:
        """The acting thread's clock and virtual time."""
        return self.log.clock(self._actor), self._now_ms[self._actor]

    def wait_until(self, clock: Clock, at_ms: float) -> None:
        """The acting thread waits for this moment of another actor."""
        self.log.join(self._actor, clock)
        self._now_ms[self._actor] = max(self._now_ms[self._actor], at_ms)

    def _issue(self, stream: SimulatedStream, what: str) -> None:
        """Orders what the acting thread queues on `stream` next after all that the thread has seen."""
        self._check_device(what)
        self.log.join(stream.name, self.log.clock(self._actor))
        stream.now_ms = max(stream.now_ms, self._now_ms[self._actor])

    def _recorded(self, event: SimulatedEvent) -> tuple[SimulatedStream, int]:
        if event.stream is None:
            raise TransferError("a stream waits for an event that has not been recorded")
        return event.stream, event.position

    def _check_device(self, what: str) -> None:
        current = self._current_device[self._actor]
        if current != 0:
            raise TransferError(
                f"{what} needs device 0 to be current for the {self._actor}, but device {current} is; run it inside "
                "the streams' guard"
            )


def is_within(memory: torch.Tensor, ranges: Iterable[tuple[int, int]]) -> bool:
    """Whether contiguous memory lies in one of the ranges, each an address and a number of bytes."""
    first, last = memory.data_ptr(), memory.data_ptr() + memory.nbytes
    return any(start <= first and last <= start + nbytes for start, nbytes in ranges)
