"""Nothing is unpickled or executed, and nothing leaves the machine: shipped code has not the means."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoint_files import wan_tensors, write_gguf, write_safetensors
from wanvideo_enhanced_blockswap import comfyui
from wanvideo_enhanced_blockswap.cli import main
from wanvideo_enhanced_blockswap.commands.options import cache_dir
from watched import Watched

ROOT = Path(__file__).parents[1]
FOLDERS = ("blockswap", "commands", "hardware")
SHIPPED = sorted([*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in ROOT.glob(f"{folder}/**/*.py"))])
every_shipped_file = pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))

EXECUTES = {
    *("pickle", "_pickle", "cPickle", "pickletools", "marshal", "shelve", "dbm", "dill", "cloudpickle", "joblib"),
    *("subprocess", "_posixsubprocess", "multiprocessing", "concurrent.futures.process", "pty", "ctypes", "cffi"),
    *("code", "codeop", "runpy", "importlib", "imp", "pkgutil", "zipimport", "yaml", "sqlite3"),
}
"""Modules that unpickle, execute or load code."""

LEAVES = {
    *("socket", "_socket", "socketserver", "ssl", "select", "selectors", "asyncio", "urllib", "urllib3", "http"),
    *("ftplib", "smtplib", "poplib", "imaplib", "nntplib", "telnetlib", "xmlrpc", "webbrowser", "wsgiref"),
    *("requests", "httpx", "aiohttp", "websocket", "websockets", "huggingface_hub", "torch.hub", "torch.distributed"),
}
"""Modules through which something leaves the machine."""

CALLS = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
METHODS = {
    *("os.system", "os.popen", "os.startfile", "os.fork", "os.forkpty", "os.exec", "os.spawn", "os.posix_spawn"),
    *(
        "torch.load",
        "torch.save",
        "torch.hub",
        "torch.jit.load",
        "torch.ops.load_library",
        "torch.classes.load_library",
    ),
    *("torch.export.load", "torch.package", "torch.utils.cpp_extension", "torch.distributed"),
    *("numpy.load", "np.load", "numpy.fromfile", "np.fromfile", "np.memmap", "numpy.memmap", "sys.path"),
}
WRITERS = {
    "hardware/files.py": "traces and measurements, in folders that it is given",
    "commands/picture.py": "the picture, where the user says",
}
"""Shipped files that write files."""

WRITES = {
    *("write_text", "write_bytes", "savefig", "tofile", "mkdir", "makedirs", "symlink_to", "hardlink_to", "symlink"),
    *("unlink", "rmdir", "rmtree", "removedirs", "copyfile", "copy2", "copytree", "copyfileobj", "chmod", "chown"),
    *("mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory", "SpooledTemporaryFile"),
}
"""Functions and methods that nothing but a file has."""

WRITES_OF_OS = {"remove", "replace", "rename", "renames", "link", "truncate", "ftruncate", "write", "move", "mkfifo"}
"""Of `os` and `shutil`; texts, lists and others have methods of these names."""


def imported(tree: ast.AST) -> Iterator[str]:
    """Absolute names of what is imported anywhere, whole and by its parts."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def forbidden(source: str) -> set[str]:
    """What a source has that unpickles, executes, or reaches beyond the machine."""
    tree = ast.parse(source)
    found = set(imported(tree)) & (EXECUTES | LEAVES | METHODS)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in CALLS | {"__builtins__"}:
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            found |= {method for method in METHODS if name == method or name.startswith(method)}
            found |= {node.attr} & {"__reduce__", "__globals__", "__subclasses__", "__builtins__", "__import__"}
    return found


def written(source: str) -> set[str]:
    """Calls in a source that make, change or remove files."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return {ast.unparse(call) for call in calls if writes(call)}


def writes(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Name):
        name, owner = call.func.id, ""
    elif isinstance(call.func, ast.Attribute):
        name, owner = call.func.attr, ast.unparse(call.func.value)
    else:
        return False
    given = [*call.args, *(word.value for word in call.keywords)]
    if name == "open":
        modes = [one.value for one in given if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        return any(set(mode) <= set("rwxab+t") and set(mode) & set("wxa+") for mode in modes)
    if owner in ("os", "shutil"):
        return name in WRITES | WRITES_OF_OS
    # A text's replace takes two arguments, a path's one.
    return name in WRITES or (bool(owner) and name in ("replace", "rename", "touch") and len(given) == len("p"))


@every_shipped_file
def test_shipped_code_can_neither_execute_what_it_reads_nor_send_it(path: Path) -> None:
    assert forbidden(path.read_text(encoding="utf-8")) == set()


@every_shipped_file
def test_only_two_files_write_files(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    assert bool(written(path.read_text(encoding="utf-8"))) == (name in WRITERS)


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "import os, marshal", "from shelve import open", "import xml, subprocess as s"),
        *(
            "def f():\n    from urllib.request import urlopen",
            "import http.client",
            "from concurrent.futures import process",
        ),
        *("import ctypes", "from ctypes import CDLL", "import importlib", "import requests", "from torch import hub"),
        *("eval('1')", "e = exec", "compile('', '', 'exec')", "__import__('os')", "__builtins__['eval']"),
        *("import os\nos.system('ls')", "import os\nos.execv('a', [])", "import torch\ntorch.load('a')"),
        *("import numpy as np\nnp.load('a')", "x.__globals__", "import torch\ntorch.jit.load('a')", "import socket"),
        "if TYPE_CHECKING:\n    import pickle",
    ],
)
def test_each_forbidden_way_is_found(source: str) -> None:
    assert forbidden(source)


@pytest.mark.parametrize(
    "source",
    [
        *(
            "open(p, 'w')",
            "path.open('ab')",
            "open(p, mode='x')",
            "p.write_text('')",
            "os.replace(a, b)",
            "a.replace(b)",
        ),
        *("p.unlink()", "os.remove(p)", "shutil.rmtree(p)", "tempfile.mkstemp()", "figure.savefig(p)", "p.mkdir()"),
    ],
)
def test_each_way_to_write_is_found(source: str) -> None:
    assert written(source)


@pytest.mark.parametrize("source", ["open(p, 'rb')", "t.replace('a', 'b')", "replace(plan, reasons=())", "l.remove(x)"])
def test_what_writes_nothing_is_not_taken_for_it(source: str) -> None:
    assert not written(source)


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf"])
def test_plan_reads_the_named_file_and_the_machines_own_figures_and_does_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    file = tmp_path / f"wan{suffix}"
    _ = write_gguf(file) if suffix == ".gguf" else write_safetensors(file, wan_tensors())
    command = ["plan", str(file), "--gpu", "RTX 4090", "--ram", "64GiB", "--link", "25", "--shape", "64x64x5"]
    main(command)  # imports what it needs
    with Watched() as touched:
        assert main(command) == 0
    capsys.readouterr()
    own = {str(file)}
    opened = {name for event, name in touched if event == "open"} - own
    assert {name for name in opened if not name.startswith(("/proc/", "/sys/", "/run/", "/.dockerenv"))} == set()
    assert ("open", str(file)) in touched
    harmless = {"open", "os.listdir", "os.scandir"} | ({"mmap.__new__"} if suffix == ".gguf" else set())
    assert {event for event, _ in touched} <= harmless


def test_traces_and_measurements_go_to_folders_of_ours_inside_comfyuis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {f"get_{kind}_directory": lambda kind=kind: str(tmp_path / kind) for kind in ("temp", "user")}
    monkeypatch.setitem(sys.modules, "folder_paths", SimpleNamespace(**folders))
    assert comfyui._temp_folder() == tmp_path / "temp" / "wanvideo-enhanced-blockswap"
    assert comfyui._user_folder() == tmp_path / "user" / "wanvideo-enhanced-blockswap"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems name the user's cache folder in other ways")
def test_the_command_line_keeps_measurements_in_the_users_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "wanvideo-enhanced-blockswap"
