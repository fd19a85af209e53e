"""What sampling does to the device, seen from outside of the package; and faults. Run by comfy_process.py only."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    began = time.perf_counter()
    try:
        with _told_of_blocks(watch.block_begins):
            yield found
    finally:
        for handle in handles:
            handle.remove()
        found |= MEMORY.copy_stats()
        found["peak_bytes"] = MEMORY.max_memory_allocated()
        found["sampling_s"] = time.perf_counter() - began
        found |= {"forwards": watch.forwards, "plans": watch.plans, "onloaded_bytes": watch.onloaded_bytes()}
        found["began_s"] = watch.began_s
        found["block_bytes"] = [watch.block_bytes.get(index, 0) for index in range(len(transformers))]


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
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what glibc keeps for later is not in use
    device = MEMORY.memory_allocated()
    runs = [run for run in map(_run_of, transformers) if run is not None]
    return {
        "after_bytes": device,
        # The pretend device's memory is the host's, too.
        "host_bytes": _anonymous_bytes() - device,
        "pinned_bytes": sum(run.session.pinned_bytes for run in runs),
        "slab_bytes": sum(run.session.slab_bytes for run in runs),
        "counters": [[getattr(transformer, name) for name in COUNTERS] for transformer in transformers],
        "places": sorted({p.device.type for transformer in transformers for p in transformer.parameters()}),
        "has_own_forward": any("forward" in vars(transformer) for transformer in transformers),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        **(MEMORY.standing() if IS_CUDA else {}),
    }


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/smaps_rollup has no line that begins with Anonymous:")


def _run_of(transformer: nn.Module) -> Any:
    """The package's run of a transformer; None without."""
    import nodes

    node = nodes.NODE_CLASS_MAPPINGS.get(OUR_NODE)
    gate = None if node is None else sys.modules[node.__module__].COMFYUI.gate
    return None if gate is None else gate.run_of(transformer)


def _adoptions(transformer: nn.Module) -> int:
    run = _run_of(transformer)
    return 0 if run is None else run.session.adoptions


def _onloaded_bytes(transformer: nn.Module) -> int:
    run = _run_of(transformer)
    return 0 if run is None else run.session.counters.onloaded_bytes


def _facts(run: Any) -> dict[str, Any]:
    plan, profile = run.session.plan, run.planner.profile
    return {
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
