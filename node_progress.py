"""NodeProgress: shows a run on its node in the browser: an event for our memory bar, and ComfyUI's own text."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from .blockswap.run.progress import Phase, Progress

logger = logging.getLogger(__name__)

EVENT = "wanvideo_enhanced_blockswap.progress"

INTERVAL_S = 0.1
"""Least time between two events of one phase, as for ComfyUI's own progress (comfy.utils.ProgressBar's sender)."""

SendEvent = Callable[[str, dict[str, object]], None]
SendText = Callable[[str, str], None]


class NodeProgress:
    """Sends a run's progress to the browsers that show its node. If sending fails, the run goes on.

    Args:
        node: The node's id, as ComfyUI executes it ("7:12" inside a subgraph).
        send_event: Takes an event's name and its data.
        send_text: Takes a text and the id of its node.
        model: The name of the model that runs; empty if unknown.
        workflow: The id of the node's workflow; None if unknown.
    """

    def __init__(
        self,
        node: str,
        send_event: SendEvent,
        send_text: SendText,
        *,
        model: str = "",
        workflow: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node = node
        self._of_run = {"node": node, "workflow": workflow, "model": model}
        self._send_event = send_event
        self._send_text = send_text
        self._clock = clock
        self._phase: Phase | None = None
        self._sent_at = 0.0
        self._works = True

    def __call__(self, progress: Progress) -> None:
        """Sends the progress, unless one of the same phase has just been sent."""
        now = self._clock()
        if not self._works or (progress.phase is self._phase and now - self._sent_at < INTERVAL_S):
            return
        self._phase, self._sent_at = progress.phase, now
        try:
            self._send_event(EVENT, {**self._of_run, **progress.as_json()})
            self._send_text(progress.text.replace("\n", " \n"), self._node)  # some renderers drop line ends
        except Exception:  # a server that shuts down or has changed: the run matters more
            self._works = False
            logger.exception("progress is not shown on the node any more; please report this")
