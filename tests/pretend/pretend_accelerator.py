"""Builds and installs the pretend accelerator: the device `hpu:0` without hardware (see accelerator.cpp).

As a script it installs the device and hands its arguments to the package's command line:

    python tests/pretend/pretend_accelerator.py demo --json
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

SOURCES = (Path(__file__).with_name("accelerator.cpp"), Path(__file__).with_name("device_memory.h"))

DEFAULT_MEMORY_BYTES = 16 * 2**30
"""Memory of the device when no cap is set: that of a common GPU."""


def is_supported() -> str | None:
    """None if the accelerator can be built here, else the reason why not: no C++ compiler, no ninja, or Windows."""
    if os.name != "posix":
        return "the pretend accelerator is built on Linux and macOS only"
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        return f"the pretend accelerator needs a C++ compiler, but there is no {compiler!r}: install g++ or set CXX"
    if _ninja_folder() is None:
        return "the pretend accelerator needs ninja to be built: pip install ninja"
    return None


def install() -> types.ModuleType:
    """Makes `hpu:0` a device of this process, building it first if no earlier process has; returns `torch.hpu`.

    The build takes about half a minute and is kept in the folder PRETEND_BUILD_DIR, by default one in the system's
    folder for temporary files. Calling it again returns the same module. torch looks for accelerators once: after
    anything has asked `torch.accelerator`, that module does not learn of this one, while tensors and operators do.

    Raises:
        RuntimeError: The build failed, or another `hpu` backend (a real Gaudi) is installed.
    """
    installed: types.ModuleType | None = getattr(torch, "hpu", None)
    if installed is None:
        torch._register_device_module("hpu", PretendHpu(_load_library()))
        return torch.hpu
    if getattr(installed, "measured_by", None) != "pretend":
        raise RuntimeError(f"torch.hpu is taken by {installed!r}: the pretend accelerator needs a process without it")
    return installed


class PretendHpu(types.ModuleType):
    """`torch.hpu`: the part of a device module that torch itself and users of this device ask for.

    Arguments named `device` are accepted as in torch.cuda and not looked at: there is one device.
    """

    measured_by = "pretend"

    def __init__(self, library: Any) -> None:
        super().__init__("torch.hpu")
        self._library = library
        self.set_memory_limit(None)

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def device(self, device: object) -> contextlib.AbstractContextManager[None]:
        """The context in which a device is the current one, which this one always is."""
        return contextlib.nullcontext()

    def synchronize(self, device: object = None) -> None:
        """Does nothing: every operator and copy has finished when its call returns."""

    def memory_allocated(self, device: object = None) -> int:
        """Bytes in use, each allocation rounded up to 512 as torch's CUDA allocator does."""
        return self._library.memory_stats()["in_use"]

    def max_memory_allocated(self, device: object = None) -> int:
        """Most bytes in use at once since `reset_peak_memory_stats`."""
        return self._library.memory_stats()["peak"]

    def reset_peak_memory_stats(self, device: object = None) -> None:
        self._library.reset_peak()

    def allocation_count(self) -> int:
        """Allocations made since the device was installed."""
        return self._library.memory_stats()["allocations"]

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        """Free and total bytes, as torch.cuda.mem_get_info; the total is the memory limit."""
        stats = self._library.memory_stats()
        return max(0, stats["limit"] - stats["in_use"]), stats["limit"]

    def set_memory_limit(self, nbytes: int | None) -> None:
        """Makes allocations beyond `nbytes` in use raise torch.OutOfMemoryError; None sets the default."""
        self._library.set_limit(DEFAULT_MEMORY_BYTES if nbytes is None else nbytes)

    def copy_stats(self) -> dict[str, int]:
        """Bytes and numbers of copies since the last reset: `h2d_bytes`, `h2d_copies`, and the same for d2h and d2d.

        Operators' own results are not copies. `.item()` is one of d2h.
        """
        return self._library.copy_stats()

    def reset_copy_stats(self) -> None:
        self._library.reset_copy_stats()

    # What torch looks up by itself: autocast, and seeding every device.

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def _lazy_init(self) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        """Nothing to seed: random numbers come from the CPU's generator."""


def _ninja_folder() -> Path | None:
    """The folder of the ninja executable: on PATH, or next to an interpreter whose environment is not activated."""
    found = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    return Path(found).parent if found else None


def _load_library() -> types.ModuleType:
    """The compiled library, from the cache or built now; waits while another process builds it."""
    import fcntl  # Linux and macOS only

    key = hashlib.sha256(f"{torch.__version__} {sys.implementation.cache_tag}".encode())
    for source in SOURCES:
        key.update(source.read_bytes())
    name = f"pretend_accelerator_{key.hexdigest()[:16]}"
    default = Path(tempfile.gettempdir()) / f"pretend_accelerator_{os.getuid()}"
    folder = Path(os.environ.get("PRETEND_BUILD_DIR") or default)
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{name}.so"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system drops it even if this process is killed while building
        return _import_library(name, library) if library.exists() else _build_library(name, library)


def _build_library(name: str, library: Path) -> types.ModuleType:
    """Builds in a temporary folder and moves the finished result to `library`."""
    path = os.environ.get("PATH", "")
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        os.environ["PATH"] = f"{_ninja_folder()}{os.pathsep}{path}"
        try:
            module = cpp_extension.load(name, [str(SOURCES[0])], build_directory=scratch, extra_cflags=["-O1"])
        finally:
            os.environ["PATH"] = path
        os.replace(Path(scratch) / library.name, library)
    return module


def _import_library(name: str, library: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    from wanvideo_enhanced_blockswap.cli import main

    reason = is_supported()
    if reason is not None:
        sys.exit(reason)
    install()
    sys.exit(main(sys.argv[1:]))
