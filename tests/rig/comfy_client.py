"""The other end of comfy_process.py: starts it, asks it, and ends it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SCRIPT = Path(__file__).with_name("comfy_process.py")

LOG = "comfyui.log"

ON_CUDA = os.environ.get("RIG_DEVICE") == "cuda"
"""Whether ComfyUI runs on the pretend CUDA runtime, and not on the pretend accelerator."""

SECONDS_TO_START = 300
"""The device may have to be built first."""

SECONDS_TO_ANSWER = 180
"""A hundred times what a case takes: it ends a process that hangs."""


class ComfyProcessError(Exception):
    """The process has ended, or did not answer in time; the message ends with its log."""


class Comfy:
    """A process that runs ComfyUI.

    Attributes:
        models: Folder of the models' files, which are made as they are needed.
        skipped: Why nothing can be run there; None if it can.
    """

    def __init__(self, process: subprocess.Popen[str], scratch: Path) -> None:
        self._process = process
        self._log = scratch / LOG
        self.models = scratch / "models"
        self.skipped: str | None = self._receive(SECONDS_TO_START).get("skip")

    def load_package(self) -> None:
        """Has ComfyUI load the package under test."""
        self._ask({"load_package": True})

    def run(self, case: Mapping[str, Any], **changes: Any) -> SimpleNamespace:
        """What came of a case (see comfy_cases.Cases.run) with some keys changed; it may have failed."""
        return SimpleNamespace(**self._ask({**case, **changes}))

    def prompt(self, **asked: Any) -> SimpleNamespace:
        """What came of a prompt (see comfy_prompts.Prompts.run)."""
        return SimpleNamespace(**self._ask({"prompt": asked}))

    def latents(self, case: Mapping[str, Any], **changes: Any) -> str:
        """Of a case that must not fail."""
        outcome = self.run(case, **changes)
        assert not hasattr(outcome, "error"), outcome.error
        return outcome.latents

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as failure:
            raise self._failure() from failure
        return self._receive(SECONDS_TO_ANSWER)

    def _receive(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        watchdog = threading.Timer(seconds, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise self._failure()
        return json.loads(line)

    def _failure(self) -> ComfyProcessError:
        status = self._process.wait()
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return ComfyProcessError(f"the ComfyUI process has ended with status {status}:\n" + "\n".join(lines[-30:]))


@contextlib.contextmanager
def started(python: str, comfyui: Path, scratch: Path, **changes: str) -> Iterator[Comfy]:
    """Runs ComfyUI in its own process during the body.

    Args:
        python: An interpreter with ComfyUI's and the wrapper's requirements.
        comfyui: ComfyUI's folder.
        scratch: An empty folder for its models, its files and its log.
        changes: Of the environment.
    """
    command = [python, str(SCRIPT), str(comfyui), str(scratch)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": os.environ | changes}
    with (scratch / LOG).open("wb") as written:
        process = subprocess.Popen(command, **pipes, stderr=written, cwd=scratch, encoding="utf-8")
    with process:
        try:
            yield Comfy(process, scratch)
        finally:
            process.kill()
