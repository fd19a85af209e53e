"""What code does outside the process, by Python's audit events."""

from __future__ import annotations

import sys
from typing import Any

EVENTS = (
    *("open", "os.", "shutil.", "socket.", "subprocess.", "urllib.", "http.", "webbrowser."),
    *("import", "exec", "compile", "marshal.", "pickle.", "ctypes.", "code.", "mmap."),
)

_watching: list[Watched] = []
_hooks: list[bool] = []


class Watched(list[tuple[str, str]]):
    """The events between `with` and its end, each with its first argument."""

    def __enter__(self) -> Watched:
        if not _hooks:  # a hook stays until the process ends, so that there is one for all
            sys.addaudithook(_hear)
            _hooks.append(True)
        _watching.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _watching.remove(self)


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event.startswith(EVENTS):
        for watched in _watching:
            watched.append((event, str(arguments[0]) if arguments else ""))
