"""Puts the pretend CUDA runtime under torch, for the life of the process: importing this before torch does it.

Settings are `PRETEND_CUDA_<name>` in the environment, see device.h, or `set_to`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

from . import build

reason = build.why_not()
if reason is not None:
    raise ImportError(reason)
if "torch" in sys.modules:
    raise ImportError("the pretend CUDA runtime must be there before torch is imported")

_folder = build.built()
# Global: what torch's libraries look for they find here first.
_runtime = ctypes.CDLL(str(_folder / build.CUDART), ctypes.RTLD_GLOBAL)
ctypes.CDLL(str(_folder / build.DRIVER), ctypes.RTLD_GLOBAL)
_runtime.pretend_fail.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int]
for _function in (_runtime.pretend_violations, _runtime.pretend_calls):
    _function.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
for _function in (_runtime.pretend_locked_bytes, _runtime.pretend_copied_bytes):
    _function.restype = ctypes.c_size_t
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a line for each refused allocation

import torch  # noqa: E402


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """For each operator that is replaced, torch writes to stderr that it is."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


with _quiet():
    ctypes.CDLL(str(_folder / build.OPERATORS))
# The CPU has no kernels that could stand in for fused attention: it is made of other operators, on both devices.
torch.backends.cuda.enable_flash_sdp(False)
torch.backends.cuda.enable_mem_efficient_sdp(False)
torch.backends.cuda.enable_cudnn_sdp(False)


def set_to(name: str, value: object) -> None:
    """Changes a setting of device.h from here on."""
    assert _runtime.pretend_set(name.encode(), str(value).encode()), name


def fail(function: str, code: int, *, calls: int = 0) -> None:
    """After `calls` more calls, a function of the runtime fails once with a code."""
    _runtime.pretend_fail(function.encode(), calls, code)


def restart() -> None:
    """What a new process would find: no fault is planned, no error stays, nothing of ours is page-locked."""
    _runtime.pretend_restart()


def violations() -> list[str]:
    """What was out of order since the last call."""
    return _text(_runtime.pretend_violations).splitlines()


def locked_bytes() -> int:
    """Host memory that is page-locked by cudaHostRegister."""
    return int(_runtime.pretend_locked_bytes())


def copied_bytes() -> dict[str, int]:
    """Bytes copied since the process began, to the device and to the host."""
    return {"h2d_bytes": _runtime.pretend_copied_bytes(0), "d2h_bytes": _runtime.pretend_copied_bytes(1)}


def calls() -> dict[str, int]:
    """How often each function of the runtime was called."""
    pairs = (line.rsplit(" ", 1) for line in _text(_runtime.pretend_calls).splitlines())
    return {name: int(count) for name, count in pairs}


def _text(function: ctypes._CFuncPtr) -> str:
    room = ctypes.create_string_buffer(1 << 20)
    function(room, len(room))
    return room.value.decode()
