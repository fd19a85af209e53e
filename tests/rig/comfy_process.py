"""Runs cases in the real ComfyUI: one JSON object a line comes in, one goes out; all else goes to standard error.

    python tests/rig/comfy_process.py COMFYUI_DIR SCRATCH

The interpreter is one that has ComfyUI's and the wrapper's requirements, and what the pretend accelerator needs, or
with RIG_DEVICE=cuda in the environment the pretend CUDA runtime. The
first line that goes out says what is there. The package is not loaded before it is asked for: what comes before has
never met it.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1]


def main(comfyui: Path, scratch: Path) -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.path.insert(0, str(HERE.parent / "pretend"))
    sys.path.append(str(HERE.parent))  # last: ComfyUI's modules win

    if not Path("/proc/self/smaps_rollup").exists():
        _say(answers, {"skip": "the rig reads host memory from /proc/self/smaps_rollup, which only Linux has"})
        return
    reason = _install_device()
    if reason is not None:
        _say(answers, {"skip": reason})
        return
    import comfy_loading
    import torch

    torch.set_num_threads(1)
    comfy_loading.load_comfyui(comfyui, scratch)
    comfy_loading.load_wrapper(comfyui)
    import comfy_cases

    cases = comfy_cases.Cases(scratch / "models")
    # What the imports made (a million objects) would take most of the time of each run's collections.
    gc.collect()
    gc.freeze()
    _say(answers, {"ready": True, "torch": torch.__version__})
    for line in sys.stdin:
        asked = json.loads(line)
        _say(answers, _answer(cases, asked))


def _install_device() -> str | None:
    """None if ComfyUI's device is there, else one sentence why not."""
    if os.environ.get("RIG_DEVICE") == "cuda":
        from pretend_cuda import build

        reason = build.why_not()
        if reason is None:
            import comfy_cuda  # noqa: F401 - the import installs it
        return reason
    import pretend_accelerator

    reason = pretend_accelerator.is_supported()
    if reason is None:
        pretend_accelerator.install()
    return reason


def _answer(cases: Any, asked: dict[str, Any]) -> dict[str, Any]:
    if asked.get("load_package"):
        import comfy_loading
        import comfy_watch

        comfy_loading.load_package(PACKAGE)
        comfy_watch.COUNTS.watch()
        return {}
    if "prompt" in asked:
        return _prompts(cases).run(asked["prompt"])
    return cases.run(asked)


@functools.cache
def _prompts(cases: Any) -> Any:
    import comfy_prompts

    return comfy_prompts.Prompts(cases.models)


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    folders = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    main(*folders)
