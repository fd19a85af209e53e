"""Sampler: GPU utilisation and memory on both sides, read from one thread while a run lasts and at no other time."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Protocol

import psutil
import torch

from .host import read_host_memory
from .memory import is_of_device
from .nvml import Nvml
from .records import DeviceMemory, DeviceSpec, HardwareUnavailableError, Samples, Utilisation, Vendor
from .rocm import Rocm

logger = logging.getLogger(__name__)

THREAD_NAME = "blockswap sampling"
INTERVAL_S = 0.5
"""Drivers average utilisation over 1/6 s to 1 s (nvmlUtilization_t in NVML's reference): oftener shows nothing new."""

JOIN_S = 10.0
"""How long the end of a run waits for a reading: a GPU that has fallen off its bus can leave NVML waiting for ever, and
the run's own error must come through."""

READING_FAILURES = (OSError, RuntimeError, ValueError, psutil.Error)
"""What a reading that fails is known to raise: OSError where /proc cannot be opened (the process has no file descriptor
left); RuntimeError from a driver through torch, and HardwareUnavailableError, which is one; ValueError where a driver's
figures cannot be; psutil.Error where the system forbids the question. All else is a mistake of ours."""


class Readers(Protocol):
    """Where the figures come from. Each answers None for what it cannot know, and fails with `READING_FAILURES`."""

    def gpu_percent(self) -> float | None:
        """Share of the driver's last sampling period in which at least one kernel ran, 0 to 100."""

    def vram_used_bytes(self) -> int | None:
        """Device memory in use, by whomever."""

    def rss_bytes(self) -> int | None:
        """Host memory of this process."""

    def host_available_bytes(self) -> int | None:
        """Host memory that can still be had."""


OpenReaders = Callable[[DeviceSpec], contextlib.AbstractContextManager[Readers]]


class Sampler:
    """Reads four figures at every interval, and once more at the end, while its `with` block lasts.

        with Sampler(spec) as sampler:
            ...
        sampler.samples()

    Costs one daemon thread, and at each interval one query each of utilisation and of device memory from NVML, opened
    once, or from sysfs, and of both figures of host memory from the system (0.4 ms on 2 cores of an AMD EPYC). The end
    waits for the last of these readings.

    A figure that cannot be read is missing from that reading alone, with one warning for each figure and block. A
    mistake in a reader ends the thread, which Python prints with its traceback; the block goes on and what was read
    counts.

    Args:
        spec: the device, from `probe_device`.
        interval_s: seconds between two readings.
        idle_s: seconds without a `touch` after which the thread ends; the next touch starts another. For blocks whose
            end nobody tells. None never ends it.
        open_readers: gives the readers for one block; called, used and closed in the thread.

    Raises:
        ValueError: the interval is not above 0.
    """

    def __init__(
        self,
        spec: DeviceSpec,
        *,
        interval_s: float = INTERVAL_S,
        idle_s: float | None = None,
        open_readers: OpenReaders | None = None,
    ) -> None:
        if not 0 < interval_s <= threading.TIMEOUT_MAX:
            raise ValueError(f"interval_s expects more than 0 seconds but got {interval_s}")
        self._spec = spec
        self._interval_s = interval_s
        self._idle_s = idle_s
        self._open_readers = open_readers or open_device_readers
        self._tally = Tally()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Sampler:
        """Starts to read.

        Raises:
            RuntimeError: the sampler is in use already.
        """
        if self._thread is not None:
            raise RuntimeError("a Sampler expects one with block at a time but got a second; make another sampler")
        # New ones each time: a thread that hangs keeps its own.
        self._tally, self._stop = Tally(), threading.Event()
        self._start()
        return self

    def touch(self) -> None:
        """What is watched goes on: the thread is not idle, and is started again if it has ended for that."""
        self._tally.touch()
        if self._thread is not None and not self._thread.is_alive() and self._idle_s is not None:
            self._start()

    def _start(self) -> None:
        sample = partial(_sample, self._tally, self._stop, self._interval_s, self._idle_s)
        thread = threading.Thread(target=sample, args=(self._open_readers, self._spec), name=THREAD_NAME, daemon=True)
        self._thread = thread
        try:
            thread.start()
        except RuntimeError as exc:
            # The system has no thread left, or Python is shutting down: not a reason to lose the run.
            logger.warning("nothing is sampled: %s", exc)
            self._thread = None
        except BaseException:
            self._stop.set()  # an interrupt that strikes here: no `__exit__` will follow
            self._thread = None
            raise

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.join(JOIN_S)
        if thread.is_alive():
            logger.warning("a reading of %s has not come back for %g s; it is left to itself", self._spec.name, JOIN_S)

    def samples(self) -> Samples:
        """What was read so far in this block, or in the last one; may be asked at any time."""
        return self._tally.samples()


def _sample(
    tally: Tally,
    stop: threading.Event,
    interval_s: float,
    idle_s: float | None,
    open_readers: OpenReaders,
    spec: DeviceSpec,
) -> None:
    """The thread: knows neither its sampler nor anything of the run."""
    warned: set[str] = set()
    with open_readers(spec) as readers:
        is_last = False
        while not is_last:
            # The wait comes first: a driver's utilisation is that of the time before it is asked.
            is_last = stop.wait(interval_s) or tally.is_idle(idle_s)
            tally.add(
                _ask("GPU utilisation", readers.gpu_percent, warned),
                _ask("device memory in use", readers.vram_used_bytes, warned),
                _ask("host memory of this process", readers.rss_bytes, warned),
                _ask("available host memory", readers.host_available_bytes, warned),
            )


def _ask(figure: str, read: Callable[[], float | None], warned: set[str]) -> float | None:
    """What a reader answers; None, with the first time a warning, if it fails."""
    try:
        return read()
    except READING_FAILURES as exc:
        if figure not in warned:
            warned.add(figure)
            logger.warning("%s cannot be read: %s; it is unknown whenever that is so", figure, exc)
        return None


@contextlib.contextmanager
def open_device_readers(spec: DeviceSpec) -> Iterator[Readers]:
    """Readers of a device and of this process, with the vendor's library open as long as they are used."""
    with contextlib.ExitStack() as stack:
        utilisation: Callable[[], Utilisation] | None = None
        memory: Callable[[], DeviceMemory | None] | None = None
        if spec.vendor is Vendor.AMD and spec.pci_bus_id is not None:
            # Not entered, so that it reads sysfs alone: amdsmi counts no users, and whoever shuts it down frees what a
            # query in another thread is reading (AMDSmiSystem::cleanup in ROCm's amd_smi_system.cc).
            rocm, address = Rocm(), spec.pci_bus_id
            utilisation, memory = partial(rocm.utilisation, address), partial(rocm.memory, address)
        elif spec.vendor is Vendor.NVIDIA:
            nvml = _open_nvml(spec, stack)
            handle = None if nvml is None else nvml.find(uuid=spec.uuid, pci_bus_id=spec.pci_bus_id, name=spec.name)
            if nvml is not None and handle is not None:
                utilisation, memory = partial(nvml.utilisation, handle), partial(nvml.memory, handle)
        yield _DeviceReaders(spec, utilisation, memory)


def _open_nvml(spec: DeviceSpec, stack: contextlib.ExitStack) -> Nvml | None:
    try:
        return stack.enter_context(Nvml())
    except HardwareUnavailableError as exc:
        logger.warning("utilisation of %s stays unknown: %s", spec.torch_device, exc)
        return None


class _DeviceReaders:
    """Readers of a device, through its vendor's library where that knows it, and of this process."""

    def __init__(
        self,
        spec: DeviceSpec,
        utilisation: Callable[[], Utilisation] | None,
        memory: Callable[[], DeviceMemory | None] | None,
    ) -> None:
        self._spec = spec
        self._utilisation = utilisation
        self._memory = memory
        self._process = psutil.Process()

    def gpu_percent(self) -> float | None:
        return None if self._utilisation is None else self._utilisation().gpu_percent

    def vram_used_bytes(self) -> int | None:
        """From the vendor, for all processes; else from torch, which on Windows with HIP sees this process alone."""
        if self._spec.is_integrated:
            return None  # the host's figures tell it: it is the same memory
        reading = None if self._memory is None else self._memory()
        if reading is None or not self._is_of_this_device(reading):
            device = torch.device(self._spec.torch_device)
            if device.type != "cuda":
                return None
            free, total = torch.cuda.mem_get_info(device)
            reading = DeviceMemory(int(total), int(free), "torch.cuda.mem_get_info")
        return reading.total_bytes - reading.free_bytes

    def rss_bytes(self) -> int | None:
        return self._process.memory_info().rss

    def host_available_bytes(self) -> int | None:
        return read_host_memory().available_bytes

    def _is_of_this_device(self, reading: DeviceMemory) -> bool:
        total = self._spec.total_bytes
        return total is None or is_of_device(reading, total)


@dataclass(slots=True)
class _Figure:
    """One figure over many readings."""

    count: int = 0
    total: float = 0.0
    least: float | None = None
    most: float | None = None

    def add(self, value: float | None) -> None:
        if value is None:
            return
        self.count += 1
        self.total += value
        self.least = value if self.least is None else min(self.least, value)
        self.most = value if self.most is None else max(self.most, value)

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None


class Tally:
    """What one thread has read so far, and when somebody last told it to go on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # the block may ask while the thread adds
        self._count = 0
        self._touched_s = time.monotonic()
        self._gpu, self._vram, self._rss, self._host = _Figure(), _Figure(), _Figure(), _Figure()

    def add(self, gpu: float | None, vram: float | None, rss: float | None, host: float | None) -> None:
        """One reading of each figure; None where it could not be had."""
        with self._lock:
            self._count += 1
            self._gpu.add(gpu)
            self._vram.add(vram)
            self._rss.add(rss)
            self._host.add(host)

    def touch(self) -> None:
        """What is watched goes on."""
        self._touched_s = time.monotonic()

    def is_idle(self, limit_s: float | None) -> bool:
        """Whether nobody has touched it for so many seconds; never for None."""
        return limit_s is not None and time.monotonic() - self._touched_s > limit_s

    def samples(self) -> Samples:
        """What was read, at any time."""
        with self._lock:
            return Samples(
                count=self._count,
                gpu_percent_mean=self._gpu.mean,
                gpu_percent_max=self._gpu.most,
                vram_used_peak_bytes=_whole(self._vram.most),
                rss_peak_bytes=_whole(self._rss.most),
                host_available_least_bytes=_whole(self._host.least),
            )


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
