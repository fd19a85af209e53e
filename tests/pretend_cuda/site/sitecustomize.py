"""With this folder on PYTHONPATH, Python starts on the pretend CUDA runtime, and its subprocesses do too."""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[3])
OUT_OF_ORDER = 70
"""Exit code of a process that did something out of order."""

sys.path.insert(0, ROOT)  # no longer than for this import: the checkout has modules with common names
from tests.pretend_cuda import runtime  # noqa: E402

sys.path.remove(ROOT)


@atexit.register
def _fail_if_out_of_order() -> None:
    if runtime.violations():  # each has been printed
        sys.stdout.flush()
        os._exit(OUT_OF_ORDER)
