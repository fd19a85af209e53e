"""Sampler: GPU utilisation and memory on both sides, read from one thread only while a run lasts."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import psutil
import torch

from .host import read_host_memory
from .memory import is_of_device
from .nvml import Nvml
from .records import DeviceMemory, DeviceSpec, HardwareUnavailableError, Samples, Vendor
from .rocm import Rocm

logger = logging.getLogger(__name__)

THREAD_NAME = "blockswap sampling"
INTERVAL_S = 0.5
"""Drivers average utilisation over 1/6 s to 1 s (nvmlUtilization_t in NVML's reference): shorter shows nothing new."""

JOIN_S = 10.0
"""How long the end of a run waits for a reading: where a GPU has fallen off its bus, NVML may never return, and the
run's own error must reach the user."""

READING_FAILURES = (OSError, RuntimeError, ValueError, psutil.Error)
"""What a reading is known to raise: OSError where /proc cannot be opened (the process has no file descriptor left);
RuntimeError from a driver through torch, and HardwareUnavailableError, which is one; ValueError where a driver's
figures contradict one another; psutil.Error where the system forbids the query. Anything else is a bug of ours."""

GPU_PERCENT = "GPU utilisation"
VRAM_USED_BYTES = "device memory in use"
RSS_BYTES = "host memory of this process"
HOST_AVAILABLE_BYTES = "available host memory"

Reading = tuple[str, Callable[[], float | None]]
"""One of these names, and the function that reads the figure: None for unknown; raises `READING_FAILURES`."""

OpenReadings = Callable[[DeviceSpec], contextlib.AbstractContextManager[Sequence[Reading]]]


@contextlib.contextmanager
def open_readings(spec: DeviceSpec) -> Iterator[Sequence[Reading]]:
    """The readings of a device and of this process, with the vendor's library open inside the block."""

    def unknown() -> None:
        """For a device that no vendor's library reads."""

    utilisation: Callable[[], float | None] = unknown
    memory: Callable[[], DeviceMemory | None] = unknown
    with contextlib.ExitStack() as stack:
        if spec.vendor is Vendor.AMD and spec.pci_bus_id is not None:
            rocm, address = Rocm(), spec.pci_bus_id
            utilisation, memory = partial(rocm.utilisation, address), partial(rocm.memory, address)
        elif spec.vendor is Vendor.NVIDIA:
            try:
                nvml = stack.enter_context(Nvml())
                handle = nvml.find(uuid=spec.uuid, pci_bus_id=spec.pci_bus_id, name=spec.name)
                if handle is not None:
                    utilisation, memory = partial(nvml.utilisation, handle), partial(nvml.memory, handle)
            except HardwareUnavailableError as exc:
                logger.warning("utilisation of %s stays unknown: %s", spec.torch_device, exc)
        process = psutil.Process()
        yield (
            (GPU_PERCENT, utilisation),
            (VRAM_USED_BYTES, partial(_vram_used_bytes, spec, memory)),
            (RSS_BYTES, lambda: process.memory_info().rss),
            (HOST_AVAILABLE_BYTES, lambda: read_host_memory().available_bytes),
        )


def _vram_used_bytes(spec: DeviceSpec, ask_vendor: Callable[[], DeviceMemory | None]) -> int | None:
    """From the vendor, for all processes; else from torch, which on Windows with HIP sees this process alone."""
    if spec.is_integrated:
        return None  # the device uses the host's memory, whose figures are read too
    memory = ask_vendor()
    if memory is None or (spec.total_bytes is not None and not is_of_device(memory, spec.total_bytes)):
        device = torch.device(spec.torch_device)
        if device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(device)
        memory = DeviceMemory(int(total), int(free), "torch.cuda.mem_get_info")
    return memory.total_bytes - memory.free_bytes


class Sampler:
    """Reads each figure at every interval, and once more at the end, while its `with` block lasts.

    Costs one daemon thread, and at each interval one query each of utilisation and of device memory from NVML, opened
    once, or from sysfs, and of both figures of host memory from the system (0.4 ms on 2 cores of an AMD EPYC). The end
    waits for the last of these readings.

    A figure that cannot be read is missing from that interval alone, with one warning for each figure and block. A
    mistake in a reading ends the thread, which Python prints with its traceback; the block goes on, and the readings
    before it count.

    Args:
        spec: the device, from `probe_device`.
        interval_s: seconds between two readings.
        open_readings: gives the readings of one block; called, used and closed in the thread.

    Raises:
        ValueError: the interval is not above 0.
    """

    def __init__(
        self, spec: DeviceSpec, *, interval_s: float = INTERVAL_S, open_readings: OpenReadings = open_readings
    ) -> None:
        if not 0 < interval_s <= threading.TIMEOUT_MAX:
            raise ValueError(f"interval_s: expected more than 0 seconds, got {interval_s}")
        self._spec = spec
        self._interval_s = interval_s
        self._open_readings = open_readings
        self._block = _Block()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Sampler:
        """Starts to read.

        Raises:
            RuntimeError: the sampler is in use already.
        """
        if self._thread is not None:
            raise RuntimeError("this Sampler is already in a with block; make a second sampler")
        self._block = _Block()  # a new one each time: a thread that hangs keeps its own
        arguments = (self._spec, self._interval_s, self._open_readings)
        self._thread = threading.Thread(target=self._block.read, args=arguments, name=THREAD_NAME, daemon=True)
        try:
            self._thread.start()
        except RuntimeError as exc:
            # The system has no thread left, or Python is shutting down: no reason to lose the run.
            logger.warning("nothing is sampled: %s", exc)
            self._thread = None
        except BaseException:
            self._block.stop.set()  # an interrupt: no `__exit__` follows
            self._thread = None
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._block.stop.set()
        thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.join(JOIN_S)
        if thread.is_alive():
            logger.warning(
                "a reading of %s has not returned for %g s; its thread is left behind", self._spec.name, JOIN_S
            )

    def samples(self) -> Samples:
        """Figures of this block, or of the last one; may be called at any time."""
        return self._block.samples()


class _Figure(NamedTuple):
    """One figure over all readings that have not failed: a percentage, or whole bytes."""

    readings: int
    total: float
    least: Any
    most: Any

    def with_reading(self, value: Any) -> _Figure:
        return _Figure(self.readings + 1, self.total + value, min(self.least, value), max(self.most, value))


class _Block:
    """The readings of one `with` block; refers to neither sampler nor run, so that its thread keeps neither alive."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._lock = threading.Lock()  # samples() may run while the thread reads
        self._count = 0
        self._figures: dict[str, _Figure] = {}  # not the readings: a run may last for days
        self._warned: set[str] = set()

    def read(self, spec: DeviceSpec, interval_s: float, open_readings: OpenReadings) -> None:
        """The thread."""
        with open_readings(spec) as readings:
            is_last = False
            while not is_last:
                # The wait comes first: a driver reports the utilisation of the time before the query.
                is_last = self.stop.wait(interval_s)
                found = [(name, self._read(name, read)) for name, read in readings]
                with self._lock:
                    self._count += 1
                    for name, value in found:
                        if value is not None:
                            before = self._figures.get(name, _Figure(0, 0, value, value))
                            self._figures[name] = before.with_reading(value)

    def _read(self, name: str, read: Callable[[], float | None]) -> float | None:
        """One figure; None, with a warning the first time, if the reading fails."""
        try:
            return read()
        except READING_FAILURES as exc:
            if name not in self._warned:
                self._warned.add(name)
                logger.warning("%s cannot be read: %s; readings that fail are left out", name, exc)
            return None

    def samples(self) -> Samples:
        """The figures over all readings."""
        with self._lock:
            names = (GPU_PERCENT, VRAM_USED_BYTES, RSS_BYTES, HOST_AVAILABLE_BYTES)
            gpu, vram, rss, available = (self._figures.get(name) for name in names)
            return Samples(
                count=self._count,
                gpu_percent_mean=None if gpu is None else gpu.total / gpu.readings,
                gpu_percent_max=None if gpu is None else gpu.most,
                vram_used_peak_bytes=None if vram is None else vram.most,
                rss_peak_bytes=None if rss is None else rss.most,
                host_available_least_bytes=None if available is None else available.least,
            )
