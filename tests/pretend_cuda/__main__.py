"""Runs Python on the pretend CUDA runtime, with the arguments that Python takes.

python -m tests.pretend_cuda -m wanvideo_enhanced_blockswap demo
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from . import build

SITE = Path(__file__).parent / "site"

if __name__ == "__main__":
    reason = build.why_not()
    if reason is not None:
        sys.exit(reason)
    paths = [str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
