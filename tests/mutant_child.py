"""The process that tests one copy of the package; see test_mutants.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = "wanvideo_enhanced_blockswap"
OUTPUT = "output.txt"
IMPORTED_FROM = "imported_from.txt"


def run(folder: Path, tests: Sequence[str]) -> None:
    """Runs tests of test_happens_before.py with the package in `folder`, and ends the process with pytest's exit code.

    Writes the output there, and the file from which the package was imported.
    """
    said = os.open(folder / OUTPUT, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(said, stream)
    import pytest

    assert PACKAGE not in sys.modules
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # importing hypothesis takes longer than these tests
    sys.path.insert(0, str(folder))
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    arguments = ["-q", "-x", "-p", "no:cacheprovider", f"--rootdir={folder}", f"-c={folder / 'pytest.ini'}"]
    targets = [f"{TESTS / 'test_happens_before.py'}::{test}" for test in tests]
    code = pytest.main([*arguments, f"--confcutdir={TESTS}", *targets])
    (folder / IMPORTED_FROM).write_text(str(sys.modules[PACKAGE].__file__), encoding="utf-8")
    sys.exit(code)
