"""What a run writes into the log: the brief's lines when it begins; summary, table and trace file when it is over."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from torch import nn

from ..hardware.samples import Samples
from .decision import SwapPlan
from .errors import BlockSwapError
from .planner import Planner
from .report import RunReport
from .report_text import ModelSize, block_table, brief_lines, summary
from .session import SwapSession
from .trace_file import chrome_trace, trace_name, write_trace

logger = logging.getLogger(__name__)


def log_in_the_briefs_words(plan: SwapPlan, planner: Planner, parameters: int | None) -> None:
    """Debug mode's lines when a plan has been made."""
    assert planner.profile is not None
    assert planner.host is not None
    size = ModelSize(parameters=parameters, nbytes=planner.profile.nbytes, layers=len(planner.profile.blocks))
    for line in brief_lines(plan, size, memory=planner.memory, host=planner.host, ratio=planner.ratio):
        logger.info("%s", line)


def log_run(
    report: RunReport, samples: Samples | None, session: SwapSession, planner: Planner, trace_dir: Path | None
) -> RunReport:
    """Logs the summary of a run that is over; in debug mode a table of its blocks and a trace file as well.

    Args:
        report: Of the run, before its release.
        samples: With the last one; None if nothing was sampled.
        session: Its session.
        planner: Its planner.
        trace_dir: Where the trace file goes; None writes none.

    Returns:
        The report, with these samples and notes on the trace.
    """
    report = replace(report, measured=replace(report.measured, samples=samples))
    try:
        return _tell(report, session, planner, trace_dir)
    except Exception:  # whatever it stumbles over, the run itself has succeeded
        logger.exception("the run's report could not be written; please report this")
        return report


def _tell(report: RunReport, session: SwapSession, planner: Planner, trace_dir: Path | None) -> RunReport:
    if planner.settings.debug_mode:
        logger.info("%s", block_table(report))
        notes = _write_trace(session, planner, trace_dir)
        report = replace(report, notes=(*report.notes, *notes))
    logger.info("%s", summary(report))
    return report


def _write_trace(session: SwapSession, planner: Planner, trace_dir: Path | None) -> tuple[str, ...]:
    trace = session.trace
    if trace is None or trace_dir is None or planner.profile is None:
        return ()
    names = [block.name for block in planner.profile.blocks]
    path = trace_dir / trace_name(datetime.now())
    try:
        write_trace(path, chrome_trace(trace.spans(), names=names))
    except BlockSwapError as failure:
        return (str(failure),)
    cut = f", without the last {trace.dropped:,} spans" if trace.dropped else ""
    return (f"trace: {path}{cut}",)


def count_parameters(modules: Sequence[nn.Module]) -> int | None:
    """Parameters of the modules; None where packed bytes hide how many they stand for, as in GGUF."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    if any(not parameter.is_floating_point() for parameter in parameters):
        return None
    return sum(parameter.numel() for parameter in parameters)
