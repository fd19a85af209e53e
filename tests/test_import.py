"""Importing the package adds names to a process, and has no other effect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAME = "wanvideo_enhanced_blockswap"
FILES = [
    *sorted(ROOT.glob("*.py")),
    *(file for folder in ("blockswap", "commands", "hardware") for file in sorted(ROOT.glob(f"{folder}/**/*.py"))),
]
"""Of all that ships: what ComfyUI can reach, and the command line."""


def module(file: Path) -> str:
    *folders, name = file.relative_to(ROOT).with_suffix("").parts
    return ".".join([NAME, *folders, *([] if name == "__init__" else [name])])


MODULES = [module(file) for file in FILES]
CHILD = """
import importlib, json, logging, os, sys, threading
import psutil, torch

sys.path.insert(0, sys.argv[1])
for name in ("pynvml", "amdsmi"):
    sys.modules.pop(name, None)

def state():
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in list(logging.root.manager.loggerDict))]
    return {
        "environment": dict(os.environ),
        "threads": [threading.active_count(), psutil.Process().num_threads()],
        "context": torch.cuda.is_initialized(),
        "handlers": sum(len(logger.handlers) for logger in loggers),
        "vendors": sorted({"pynvml", "amdsmi"} & set(sys.modules)),
        "compiler": "torch._dynamo" in sys.modules,
        "default": [str(torch.get_default_dtype()), torch.is_grad_enabled(), torch.get_num_threads()],
    }

before = state()
for name in sys.argv[2:]:
    importlib.import_module(name)
print(json.dumps([before, state()]))
"""
STUBS = {
    "no vendor's library": "raise ModuleNotFoundError('no module named so')",
    "libraries that raise KeyError": "raise KeyError('libamd_smi.so')",
    "libraries that raise ImportError": "raise ImportError('undefined symbol')",
    "libraries that exit": "import sys\nsys.exit(3)",
}


@pytest.fixture(scope="module", params=STUBS)
def imported(request, tmp_path_factory):
    """The child's exit, and its state before and after it imported everything that ships."""
    stubs = tmp_path_factory.mktemp("stubs")
    for library in ("pynvml", "amdsmi"):
        (stubs / f"{library}.py").write_text(f"{STUBS[request.param]}\n")
    # An earlier test of this process may have made torch set variables, which would hide that importing sets them.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCH")}
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""} if "no vendor" in request.param else {}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(stubs), *MODULES],
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("elsewhere"),  # torch itself must not see them, which some would break
        env=inherited | hidden,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done, *json.loads(done.stdout.splitlines()[-1])


def test_every_module_of_the_package_is_imported():
    named = (
        "nodes",
        "cli",
        "__main__",
        "commands.plan",
        "commands.demo",
        "blockswap.engine.session",
        "hardware.device",
    )
    assert {NAME, *(f"{NAME}.{name}" for name in named)} <= {*MODULES}
    assert len(MODULES) == len(set(MODULES)) > 60


def test_importing_opens_no_gpu(imported):
    _, before, after = imported
    assert (before["context"], after["context"]) == (False, False)


def test_importing_starts_no_thread(imported):
    _, before, after = imported
    assert after["threads"] == before["threads"]


def test_importing_changes_no_environment_variable_and_none_of_torchs_defaults(imported):
    _, before, after = imported
    assert after["environment"] == before["environment"]
    assert after["default"] == before["default"]


def test_importing_reaches_for_no_vendors_library(imported):
    assert imported[2]["vendors"] == []


def test_importing_does_not_bring_torchs_compiler(imported):
    _, before, after = imported
    assert (before["compiler"], after["compiler"]) == (False, False)


def test_importing_says_nothing_and_adds_no_handler_to_any_log(imported):
    done, before, after = imported
    assert (done.stderr, len(done.stdout.splitlines())) == ("", 1)
    assert after["handlers"] == before["handlers"]
