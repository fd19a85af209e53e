"""What sampling does to the device, seen from outside of the package; and faults. Run by comfy_process.py only."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management as management
import torch
from comfy_loading import DEVICE, IS_CUDA, MEMORY
from torch import nn

COUNTERS = ("blocks_to_swap", "vace_blocks_to_swap", "prefetch_blocks")

OUR_NODE = "WanVideoEnhancedBlockSwap"


class Watch:
    """One sampling, or two that follow one another.

    Attributes:
        forwards: Of each forward: the transformer's index, the blocks that its main loop came to, and, where the
            package swaps it, the number of the adoption that was in force when it ended.
        plans: Of each transformer and adoption, what was planned.
        began_s: When each forward began, if they are timed.
        block_bytes: Of each transformer, bytes of its blocks as stored when its first forward began.
    """

    def __init__(
        self, transformers: Sequence[nn.Module], fault: Mapping[str, Any] | None, *, is_timed: bool = False
    ) -> None:
        self.forwards: list[dict[str, Any]] = []
        self.began_s: list[float] = []
        self._is_timed = is_timed
        self.plans: dict[str, dict[str, Any]] = {}
        self.block_bytes: dict[int, int] = {}
        self._transformers = transformers
        self._fault = fault
        self._came_to = 0
        self._inside: int | None = None
        self._adopted_before = [_adoptions(transformer) for transformer in transformers]
        self._onloaded_before = [_onloaded_bytes(transformer) for transformer in transformers]

    def forward_begins(self, index: int) -> None:
        transformer = self._transformers[index]
        if index not in self.block_bytes:
            inside = [blocks for name in ("vace_blocks", "blocks") if (blocks := getattr(transformer, name, None))]
            self.block_bytes[index] = sum(map(stored_bytes, inside))
        self._inside = index
        if self._is_timed:
            torch.get_device_module(DEVICE).current_stream().synchronize()
            self.began_s.append(time.perf_counter())
        self.forwards.append({"model": index, "blocks": 0, "adoption": None})

    def forward_ends(self, index: int) -> None:
        self._inside = None
        run = _run_of(self._transformers[index])
        if run is None:
            return
        adoption = run.session.adoptions - self._adopted_before[index]
        self.forwards[-1]["adoption"] = adoption
        self.plans.setdefault(f"{index}.{adoption}", _facts(run))

    def onloaded_bytes(self) -> list[int]:
        """Of each transformer, what the package has copied into slots by its own count."""
        now = [_onloaded_bytes(transformer) for transformer in self._transformers]
        return [after - before for after, before in zip(now, self._onloaded_before, strict=True)]

    def block_begins(self) -> None:
        """The main loop has come to a block."""
        if self._inside is None:
            return
        self._came_to += 1
        block = self.forwards[-1]["blocks"]
        self.forwards[-1]["blocks"] += 1
        if self._fault is not None and self._came_to == self._fault["at"]:
            FAULTS[self._fault["kind"]](self._transformers[self._inside].blocks[block])


def stored_bytes(module: nn.Module) -> int:
    """Of all its tensors."""
    tensors = [*module.parameters(), *module.buffers()]
    with torch._C.DisableTorchFunctionSubclass():
        return sum(tensor.nbytes for tensor in tensors)


@contextlib.contextmanager
def watched(
    transformers: Sequence[nn.Module], fault: Mapping[str, Any] | None, *, is_timed: bool = False
) -> Iterator[dict[str, Any]]:
    """Watches what samples with these transformers; the dict has the figures when it is over, however it ends.

    Args:
        transformers: In the order in which they are used.
        fault: `{"kind": one of FAULTS, "at": n}`: the fault that is raised at the n-th block.
        is_timed: Each forward begins when the device has computed what came before, and this time is noted.
    """
    found: dict[str, Any] = {"before_bytes": MEMORY.memory_allocated()}
    watch, handles = Watch(transformers, fault, is_timed=is_timed), []
    for index, transformer in enumerate(transformers):
        handles += [
            transformer.register_forward_pre_hook(lambda *_, i=index: watch.forward_begins(i)),
            transformer.register_forward_hook(lambda *_, i=index: watch.forward_ends(i)),
        ]
    MEMORY.reset_copy_stats()
    MEMORY.reset_peak_memory_stats()
    peaks: list[int] = []
    counted = COUNTS.now()
    began = time.perf_counter()
    try:
        with _told_of_blocks(watch.block_begins), _told_of_peaks(peaks.append):
            yield found
    finally:
        for handle in handles:
            handle.remove()
        found |= MEMORY.copy_stats()
        found["peak_bytes"] = MEMORY.max_memory_allocated()
        found["whole_peak_bytes"] = max([*peaks, found["peak_bytes"]])
        found["sampling_s"] = time.perf_counter() - began
        found |= {"forwards": watch.forwards, "plans": watch.plans, "onloaded_bytes": watch.onloaded_bytes()}
        found["began_s"] = watch.began_s
        found |= {name: count - counted[name] for name, count in COUNTS.now().items()}
        found["block_bytes"] = [watch.block_bytes.get(index, 0) for index in range(len(transformers))]


def _moves_data(block: nn.Module, *_: Any) -> None:
    block.ffn[0].weight.data = block.ffn[0].weight.data.clone()


def _replaces(block: nn.Module, *_: Any) -> None:
    block.ffn[0].weight = nn.Parameter(block.ffn[0].weight.detach().clone(), requires_grad=False)


MOVERS: dict[str, tuple[Callable[..., None] | None, Callable[..., None] | None]] = {
    "points elsewhere": (_moves_data, None),
    "replaces": (None, _replaces),
    "offloads": (lambda block, *_: block.to(DEVICE) and None, lambda block, *_: block.to("cpu") and None),
}
"""What another pack does to each block before and after it runs."""


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "engine" in record.name:
            self.texts.append(record.getMessage())


@contextlib.contextmanager
def moved(transformers: Sequence[nn.Module], mover: str | None) -> Iterator[list[str]]:
    """Another pack moves the weights of these transformers; the list has what the package's engine warns of."""
    before, after = (None, None) if mover is None else MOVERS[mover]
    handler, stack = _Warnings(), contextlib.ExitStack()
    logging.getLogger().addHandler(handler)
    stack.callback(logging.getLogger().removeHandler, handler)
    for function in (before, after):
        if function is not None:
            function.__module__ = "/somewhere/custom_nodes/ComfyUI-Mover.nodes"
    for block in (block for transformer in transformers for block in transformer.blocks):
        if before is not None:
            stack.callback(block.register_forward_pre_hook(before).remove)
        if after is not None:
            stack.callback(block.register_forward_hook(after).remove)
    with stack:
        yield handler.texts


class Counts:
    """What the package has read from files and filled since the process began, and its page-locks."""

    def __init__(self) -> None:
        self.file_bytes = self.slab_fills = 0

    def watch(self) -> None:
        """Counts in the package, which has been loaded."""
        reader, slab = _class("hardware.disk.reader", "FileReader"), _class("blockswap.host.slabs", "Slab")
        read, fill = reader.read, slab.fill

        def count_and_read(self_: Any, pieces: Sequence[tuple[int, memoryview]]) -> None:
            self.file_bytes += sum(buffer.nbytes for _, buffer in pieces)
            read(self_, pieces)

        def count_and_fill(self_: Any, *arguments: Any) -> None:
            self.slab_fills += 1
            fill(self_, *arguments)

        reader.read, slab.fill = count_and_read, count_and_fill

    def now(self) -> dict[str, int]:
        """All counts."""
        locks = MEMORY.lock_calls() if IS_CUDA else {"locks": 0, "unlocks": 0}
        return {"file_bytes": self.file_bytes, "slab_fills": self.slab_fills, **locks}


COUNTS = Counts()

SAMPLED_EVERY_S = 0.005


class HostPeaks:
    """The most host memory that the process has at once, above what it had before; not the device's, which is the
    host's, too.

    Attributes:
        peaks: In bytes, by kind; empty until it is watched.
    """

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> HostPeaks:
        _trim()
        self._before = self._now()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(SAMPLED_EVERY_S):
            now = self._now()
            above = {name: now[name] - before for name, before in self._before.items()}
            self.peaks = {name: max(nbytes, self.peaks.get(name, 0)) for name, nbytes in above.items()}

    def _now(self) -> dict[str, int]:
        before = MEMORY.memory_allocated()
        host = host_bytes()
        device = max(before, MEMORY.memory_allocated())  # what comes or goes meanwhile makes no peak
        everything, anonymous = host["Rss"], host["Anonymous"]
        return {"rss": everything - device, "anonymous": anonymous - device, "file": everything - anonymous}


def _class(module: str, name: str) -> Any:
    (found,) = (one for path, one in sys.modules.items() if path.endswith(f".{module}"))
    return getattr(found, name)


@contextlib.contextmanager
def pin_budget(nbytes: int | None) -> Iterator[None]:
    """The user lets the package page-lock at most so much; None: what the host allows."""
    comfyui = None if nbytes is None else _package()
    if comfyui is None:
        yield
        return
    preferences = comfyui._preferences
    comfyui._preferences = lambda: replace(preferences(), pin_budget_bytes=nbytes)
    try:
        yield
    finally:
        comfyui._preferences = preferences


@contextlib.contextmanager
def _told_of_blocks(block_begins: Callable[[], None]) -> Iterator[None]:
    """The wrapper's loop checks ComfyUI's interrupt before each block."""
    original = management.throw_exception_if_processing_interrupted

    def ask() -> None:
        block_begins()
        original()

    management.throw_exception_if_processing_interrupted = ask
    try:
        yield
    finally:
        management.throw_exception_if_processing_interrupted = original


@contextlib.contextmanager
def _told_of_peaks(ends: Callable[[int], None]) -> Iterator[None]:
    """The package forgets the peak when its first forward begins."""
    original = MEMORY.reset_peak_memory_stats

    def reset(*arguments: Any) -> None:
        ends(MEMORY.max_memory_allocated())
        original(*arguments)

    MEMORY.reset_peak_memory_stats = reset
    try:
        yield
    finally:
        MEMORY.reset_peak_memory_stats = original


def _interrupt(block: nn.Module) -> None:
    management.interrupt_current_processing()


def _run_out_of_memory(block: nn.Module) -> None:
    MEMORY.set_memory_limit(MEMORY.memory_allocated())


def _fail(block: nn.Module) -> None:
    """In the middle of the block."""

    def strike(module: nn.Module, arguments: object) -> None:
        handle.remove()
        raise RuntimeError("the block fails")

    handle = getattr(block, "_orig_mod", block).ffn.register_forward_pre_hook(strike)


FAULTS: dict[str, Callable[[nn.Module], None]] = {
    "interrupt": _interrupt,
    "memory": _run_out_of_memory,
    "error": _fail,
}


def standing(transformers: Sequence[nn.Module]) -> dict[str, Any]:
    """State of memory and transformers while nothing runs."""
    _trim()
    device = MEMORY.memory_allocated()
    runs = [run for run in map(_run_of, transformers) if run is not None]
    return {
        "after_bytes": device,
        # The pretend device's memory is the host's, too.
        "host_bytes": host_bytes()["Anonymous"] - device,
        "pinned_bytes": sum(run.session.pinned_bytes for run in runs),
        "slab_bytes": sum(run.session.slab_bytes for run in runs),
        "counters": [[getattr(transformer, name) for name in COUNTERS] for transformer in transformers],
        "places": sorted({p.device.type for transformer in transformers for p in transformer.parameters()}),
        "has_own_forward": any("forward" in vars(transformer) for transformer in transformers),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        **(MEMORY.standing() if IS_CUDA else {}),
    }


def _trim() -> None:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what glibc keeps for later is not in use


def host_bytes() -> dict[str, int]:
    """Memory of this process, by the names that the system gives to its kinds."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    return {name: int(size.split()[0]) * 1024 for name, _, size in (line.partition(":") for line in lines)}


def _run_of(transformer: nn.Module) -> Any:
    """The package's run of a transformer; None without."""
    comfyui = _package()
    return None if comfyui is None or comfyui.gate is None else comfyui.gate.run_of(transformer)


def _package() -> Any:
    """The package's link to ComfyUI; None where it is not loaded."""
    import nodes

    node = nodes.NODE_CLASS_MAPPINGS.get(OUR_NODE)
    return None if node is None else sys.modules[node.__module__].COMFYUI


def _adoptions(transformer: nn.Module) -> int:
    run = _run_of(transformer)
    return 0 if run is None else run.session.adoptions


def _onloaded_bytes(transformer: nn.Module) -> int:
    run = _run_of(transformer)
    return 0 if run is None else run.session.counters.onloaded_bytes


def _facts(run: Any) -> dict[str, Any]:
    plan, profile = run.session.plan, run.planner.profile
    return {
        "names": [block.name for block in profile.blocks],
        "swapped": list(plan.swapped),
        "slots": plan.slots,
        "streams": plan.streams,
        "slot_bytes": plan.slot_bytes,
        "device_bytes": plan.device_bytes,
        "streamed_bytes": [block.streamed_bytes for block in profile.blocks],
        "small_bytes": [
            sum(tensor.nbytes for tensor in block.tensors if tensor.placement.value in ("small", "fixed"))
            for block in profile.blocks
        ],
        "over_ceiling": plan.over_ceiling,
    }
