"""Runs the whole suite in two processes where pytest-xdist is installed; `-n 0` runs it in one."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from typing import Any

import pytest
import torch

INJECTED = "injected"
FROM_WORKERS: Counter[str] = Counter()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Two processes, if all tests are run: a few files are done before another process has imported torch, and what
    `-m` selects may be measured. One where there is a GPU, which the tests would share.
    """
    is_ours_to_say = config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None
    if not is_ours_to_say or hasattr(config, "workerinput") or config.option.usepdb:
        return
    is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.markexpr
    if is_whole and (os.cpu_count() or 1) > 1 and not torch.cuda.is_available():
        config.option.numprocesses = 2


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests share a process and its fixtures; so do those of one version of the front end, and their pages."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            page = re.search(r"^tests/frontend/.*\[(pinned|newest)-", nodeid)
            return page[1] if page else nodeid.partition("::")[0]

    return ByFile(config, log)


def injected() -> Counter[str]:
    """Faults by place, of this process and those that it has started."""
    return FROM_WORKERS + Counter(getattr(sys.modules.get("faults"), "INJECTED", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[INJECTED] = dict(injected())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    FROM_WORKERS.update(getattr(node, "workeroutput", {}).get(INJECTED, {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints how many faults were injected."""
    faults = injected()
    if faults:
        terminalreporter.write_line(f"{faults.total():,} faults were injected at {len(faults)} places")
