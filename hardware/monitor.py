"""Sampler: GPU utilisation and memory on both sides, read from one thread while a run lasts and at no other time."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType

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
"""Drivers average utilisation over 1/6 s to 1 s (nvmlUtilization_t in NVML's reference): shorter shows nothing new."""

JOIN_S = 10.0
"""How long the end of a run waits for a reading: where a GPU has fallen off its bus, NVML can wait for ever, and the
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
"""One of these names, and what reads the figure: None where it is unknown; it fails with `READING_FAILURES`."""

OpenReadings = Callable[[DeviceSpec], contextlib.AbstractContextManager[Sequence[Reading]]]


@contextlib.contextmanager
def open_readings(spec: DeviceSpec) -> Iterator[Sequence[Reading]]:
    """What can be read of a device and of this process, with the vendor's library open inside the block."""
    with contextlib.ExitStack() as stack:
        utilisation: Callable[[], Utilisation] = partial(Utilisation, None)
        memory: Callable[[], DeviceMemory | None] | None = None
        if spec.vendor is Vendor.AMD and spec.pci_bus_id is not None:
            # Not entered, so that it reads sysfs alone: amdsmi does not count its users, and one that shuts it down
            # frees what a query in another thread is reading (AMDSmiSystem::cleanup in ROCm's amd_smi_system.cc).
            rocm, address = Rocm(), spec.pci_bus_id
            utilisation, memory = partial(rocm.utilisation, address), partial(rocm.memory, address)
        elif spec.vendor is Vendor.NVIDIA:
            nvml = _open_nvml(spec, stack)
            handle = None if nvml is None else nvml.find(uuid=spec.uuid, pci_bus_id=spec.pci_bus_id, name=spec.name)
            if nvml is not None and handle is not None:
                utilisation, memory = partial(nvml.utilisation, handle), partial(nvml.memory, handle)
        process = psutil.Process()
        yield (
            (GPU_PERCENT, lambda: utilisation().gpu_percent),
            (VRAM_USED_BYTES, partial(_vram_used_bytes, spec, memory)),
            (RSS_BYTES, lambda: process.memory_info().rss),
            (HOST_AVAILABLE_BYTES, lambda: read_host_memory().available_bytes),
        )


def _open_nvml(spec: DeviceSpec, stack: contextlib.ExitStack) -> Nvml | None:
    try:
        return stack.enter_context(Nvml())
    except HardwareUnavailableError as exc:
        logger.warning("utilisation of %s stays unknown: %s", spec.torch_device, exc)
        return None


def _vram_used_bytes(spec: DeviceSpec, ask_vendor: Callable[[], DeviceMemory | None] | None) -> int | None:
    """From the vendor, for all processes; else from torch, which on Windows with HIP sees this process alone."""
    if spec.is_integrated:
        return None  # it is the host's memory, whose figures are read as well
    memory = None if ask_vendor is None else ask_vendor()
    if memory is None or (spec.total_bytes is not None and not is_of_device(memory, spec.total_bytes)):
        device = torch.device(spec.torch_device)
        if device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(device)
        memory = DeviceMemory(int(total), int(free), "torch.cuda.mem_get_info")
    return memory.total_bytes - memory.free_bytes


class Sampler:
    """Reads each figure at every interval, and once more at the end, while its `with` block lasts.

        with Sampler(spec) as sampler:
            ...
        sampler.samples()

    Costs one daemon thread, and at each interval one query each of utilisation and of device memory from NVML, opened
    once, or from sysfs, and of both figures of host memory from the system (0.4 ms on 2 cores of an AMD EPYC). The end
    waits for the last of these readings.

    A figure that cannot be read is missing from that interval alone, with one warning for each figure and block. A
    mistake in a reading ends the thread, which Python prints with its traceback; the block goes on and what was read
    counts.

    Args:
        spec: the device, from `probe_device`.
        interval_s: seconds between two readings.
        open_readings: gives what is read in one block; called, used and closed in the thread.

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
        self._tally = Tally()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Sampler:
        """Starts to read.

        Raises:
            RuntimeError: the sampler is in use already.
        """
        if self._thread is not None:
            raise RuntimeError("this Sampler is already in a with block; make a second sampler")
        # New ones each time: a thread that hangs keeps its own.
        self._tally, self._stop = Tally(), threading.Event()
        sample = partial(_sample, self._tally, self._stop, self._interval_s, self._open_readings, self._spec)
        self._thread = threading.Thread(target=sample, name=THREAD_NAME, daemon=True)
        try:
            self._thread.start()
        except RuntimeError as exc:
            # The system has no thread left, or Python is shutting down: not a reason to lose the run.
            logger.warning("nothing is sampled: %s", exc)
            self._thread = None
        except BaseException:
            self._stop.set()  # an interrupt: no `__exit__` follows
            self._thread = None
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.join(JOIN_S)
        if thread.is_alive():
            logger.warning(
                "a reading of %s has not returned for %g s; its thread is left behind", self._spec.name, JOIN_S
            )

    def samples(self) -> Samples:
        """What has been read in this block, or in the last one; may be called at any time."""
        return self._tally.samples()


def _sample(
    tally: Tally, stop: threading.Event, interval_s: float, open_readings: OpenReadings, spec: DeviceSpec
) -> None:
    """The thread. It refers neither to its sampler nor to anything of the run, so that it keeps neither alive."""
    warned: set[str] = set()
    with open_readings(spec) as readings:
        is_last = False
        while not is_last:
            # The wait comes first: a driver's utilisation is that of the time before it is asked.
            is_last = stop.wait(interval_s)
            tally.add({name: _read(name, read, warned) for name, read in readings})


def _read(name: str, read: Callable[[], float | None], warned: set[str]) -> float | None:
    """One figure; None, with a warning the first time, if the reading fails."""
    try:
        return read()
    except READING_FAILURES as exc:
        if name not in warned:
            warned.add(name)
            logger.warning("%s cannot be read: %s; readings that fail are left out", name, exc)
        return None


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
    """What one thread has read so far."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # the block may ask while the thread adds
        self._count = 0
        self._figures = {name: _Figure() for name in (GPU_PERCENT, VRAM_USED_BYTES, RSS_BYTES, HOST_AVAILABLE_BYTES)}

    def add(self, values: Mapping[str, float | None]) -> None:
        """One reading of each figure; None where it is unknown."""
        with self._lock:
            self._count += 1
            for name, value in values.items():
                self._figures[name].add(value)

    def samples(self) -> Samples:
        """What has been read, at any time."""
        with self._lock:
            gpu = self._figures[GPU_PERCENT]
            return Samples(
                count=self._count,
                gpu_percent_mean=gpu.mean,
                gpu_percent_max=gpu.most,
                vram_used_peak_bytes=_whole(self._figures[VRAM_USED_BYTES].most),
                rss_peak_bytes=_whole(self._figures[RSS_BYTES].most),
                host_available_least_bytes=_whole(self._figures[HOST_AVAILABLE_BYTES].least),
            )


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
