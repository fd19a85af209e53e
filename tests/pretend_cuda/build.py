"""Builds the pretend CUDA runtime, once for each torch: libcudart, the driver, the operators."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = tuple(HERE / name for name in ("build.py", "order.h", "device.h", "runtime.cpp", "operators.cpp"))
TORCH = "2.14.1+cu130"
"""The version whose calls of the runtime the sources answer."""

CUDART, DRIVER, OPERATORS = "libcudart.so.13", "libcuda.so.1", "operators.so"
NEEDED_HEADERS = ("cuda_runtime_api.h", "crt/host_defines.h")


def why_not() -> str | None:
    """None if it can be built and used with this interpreter, else one sentence why not."""
    if sys.platform != "linux":
        return "the pretend CUDA runtime is built on Linux only"
    found = importlib.util.find_spec("torch") and importlib.metadata.version("torch")
    if found not in (TORCH, TORCH.split("+")[0]) or not _cudart().exists():
        kind = "a CUDA build of it" if found and _cudart().exists() else "no CUDA build of it"
        return f"the pretend CUDA runtime is made for torch {TORCH}, here is torch {found}, {kind}"
    if shutil.which(_compiler()) is None or shutil.which("nm") is None:
        return f"the pretend CUDA runtime needs a C++ compiler and nm, but there is no {_compiler()!r}: install g++"
    missing = [name for name in NEEDED_HEADERS if not any((folder / name).exists() for folder in _includes())]
    if missing:
        return f"the pretend CUDA runtime needs the header {missing[0]}: install triton, or set CUDA_HOME"
    return None


def built() -> Path:
    """The folder of the libraries, which are built first if no earlier process has: that takes about half a minute.
    Waits while another process builds them.
    """
    import fcntl  # Linux only

    key = hashlib.sha256(f"{TORCH} {_torch()} {sys.implementation.cache_tag}".encode())
    for source in SOURCES:
        key.update(source.read_bytes())
    default = Path(tempfile.gettempdir()) / f"pretend_cuda_{os.getuid()}"
    parent = Path(os.environ.get("PRETEND_BUILD_DIR") or default)
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f"pretend_cuda_{key.hexdigest()[:16]}"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system drops it even if this process is killed while building
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=parent) as scratch:
                whole = Path(scratch) / "whole"
                whole.mkdir()
                _build(whole)
                whole.rename(folder)
    return folder


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _cudart() -> Path:
    return _torch().parent / "nvidia" / "cu13" / "lib" / CUDART


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def _includes() -> list[Path]:
    """Folders of CUDA's headers: torch's wheels have the runtime's, triton has those that they include."""
    site = _torch().parent
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    folders = (site / "nvidia/cu13/include", site / "triton/backends/nvidia/include", home / "include")
    return [folder for folder in folders if folder.is_dir()]


def _build(folder: Path) -> None:
    torch, cuda = _torch(), [f"-I{include}" for include in _includes()]
    real = {name for name in _symbols(_cudart(), defined=True) if re.match("cuda|__cuda", name)}
    ours = set(re.findall(r"^API [^(]*?\b((?:__)?cuda\w+)\(", (HERE / "runtime.cpp").read_text(), re.MULTILINE))
    # Every other function of the real runtime answers "not supported".
    rest = [f'extern "C" int {name}() {{ return pretend_unsupported("{name}"); }}' for name in sorted(real - ours)]
    (folder / "rest.cpp").write_text("\n".join(['extern "C" int pretend_unsupported(const char*);', *rest]))
    exports = folder / "exports.map"
    exports.write_text(f"{CUDART} {{ global: cuda*; __cuda*; pretend_*; local: *; }};")
    sources = [HERE / "runtime.cpp", folder / "rest.cpp"]
    _compile(sources, folder / CUDART, *cuda, f"-Wl,--version-script={exports}", "-lpthread")
    (folder / "driver.cpp").write_text("\n".join(_driver(torch / "lib" / "libcaffe2_nvrtc.so")))
    _compile([folder / "driver.cpp"], folder / DRIVER)
    headers = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}", *cuda]
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch_cuda", "-lc10", "-lc10_cuda"]
    _compile([HERE / "operators.cpp"], folder / OPERATORS, *headers, *libraries, f"-L{folder}", f"-l:{CUDART}")


def _driver(asker: Path) -> list[str]:
    """The driver's functions that torch asks for. Of the answers, it needs only that of whether a context is there,
    before it says whether memory is page-locked.
    """
    has_context = "cuDevicePrimaryCtxGetState"
    others = {name for name in _symbols(asker, defined=False) if re.match("cu[A-Z]", name)} - {has_context}
    return [
        f'extern "C" int {has_context}(int, unsigned* flags, int* active) {{ return *flags = 0, *active = 1, 0; }}',
        *(f'extern "C" int {name}() {{ return 801; }}' for name in sorted(others)),
    ]


def _compile(sources: list[Path], library: Path, *options: str) -> None:
    command = [_compiler(), "-std=c++20", "-O1", "-fPIC", "-shared", f"-Wl,-soname,{library.name}", "-o", str(library)]
    subprocess.run([*command, *map(str, sources), *options], check=True)


def _symbols(library: Path, *, defined: bool) -> list[str]:
    """Names of functions that a library has, or needs, without their versions."""
    which = "--defined-only" if defined else "--undefined-only"
    told = subprocess.run(["nm", "-D", which, str(library)], check=True, capture_output=True, text=True).stdout
    fields = [line.split() for line in told.splitlines()]
    return sorted({line[-1].split("@")[0] for line in fields if line[-2] in "TU"})


if __name__ == "__main__":
    reason = why_not()
    sys.exit(reason) if reason else sys.stdout.write(f"{built()}\n")
