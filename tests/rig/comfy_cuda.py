"""tests/pretend_cuda as ComfyUI's device: importing this, before torch, installs it; imported by comfy_process.py only.

What the rig asks `torch.hpu` (tests/pretend) for has the same name here.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

IS_NATIVE = "--disable-cuda-malloc" in os.environ.get("RIG_FLAGS", "")

SETTINGS = {
    # ComfyUI's choice, which it makes before it imports torch
    "PYTORCH_ALLOC_CONF": "backend:native" if IS_NATIVE else "backend:cudaMallocAsync",
    "PRETEND_CUDA_CONTEXT": "0",
    "PRETEND_CUDA_LATE": "copies",
    "PRETEND_CUDA_POISON": "1",
    "PRETEND_CUDA_FLOAT_PRODUCTS": "1",
}
"""The environment, where it has nothing else."""

for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)

from pretend_cuda import runtime  # noqa: E402

# isort: split
import torch  # noqa: E402

DEVICE_BYTES = 24e9

LEAST_CHUNK_BYTES = 4096
"""Blocks of a few megabytes are cut for all copy streams."""

_copied_before: dict[str, int] = {}
_peaks = [0]
"""Before each reset by others: the sampler makes one when it ends."""

_reset_peak = torch.cuda.reset_peak_memory_stats


def _note_and_reset_peak(device: object = None) -> None:
    _peaks.append(torch.cuda.max_memory_allocated())
    _reset_peak(device)


torch.cuda.reset_peak_memory_stats = _note_and_reset_peak


def leave_out_kernels_of_others() -> None:
    """Nothing computes fused attention here, which ComfyUI switches on, nor comfy-kitchen's kernels."""
    import comfy_kitchen

    for name in ("flash", "mem_efficient", "cudnn"):
        setattr(torch._C, f"_set_sdp_use_{name}", lambda *_: None)
    comfy_kitchen.disable_backend("cuda")


def cut_small_slabs() -> None:
    """The package under test uses all copy streams for small blocks, too."""
    (module,) = (module for name, module in sys.modules.items() if name.endswith(".blockswap.device.streams"))
    module.CudaStreams.least_chunk_bytes = LEAST_CHUNK_BYTES


def standing() -> dict[str, Any]:
    """What was out of order since the last call, and what the package has page-locked."""
    gc.collect()
    torch.cuda.synchronize()
    return {"violations": runtime.violations(), "locked_bytes": runtime.locked_bytes()}


def lock_calls() -> dict[str, int]:
    """How often host memory was page-locked, and unlocked, since the process began."""
    calls = runtime.calls()
    return {"locks": calls.get("cudaHostRegister", 0), "unlocks": calls.get("cudaHostUnregister", 0)}


def memory_allocated() -> int:
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def max_memory_allocated() -> int:
    return max(*_peaks, torch.cuda.max_memory_allocated())


def reset_peak_memory_stats() -> None:
    torch.cuda.synchronize()
    _peaks[:] = [0]
    _reset_peak()


def copy_stats() -> dict[str, int]:
    return {name: nbytes - _copied_before.get(name, 0) for name, nbytes in runtime.copied_bytes().items()}


def reset_copy_stats() -> None:
    torch.cuda.synchronize()
    _copied_before.update(runtime.copied_bytes())


def set_memory_limit(nbytes: int | None) -> None:
    """Lets tensors have so many bytes; without a limit, those of a large device."""
    runtime.set_to("VRAM", DEVICE_BYTES if nbytes is None else nbytes + _used_by_others())


def set_link_speed(gbps: float) -> None:
    """Of each way; with 0, copies are as fast as the host's."""
    runtime.set_to("COPY_GBPS", gbps)


def _used_by_others() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_allocated()
