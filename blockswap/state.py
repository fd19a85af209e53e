"""SessionState: where a session is in its life; pure."""

from __future__ import annotations

from enum import Enum


class SessionState(Enum):
    """Where a session is in its life."""

    IDLE = "idle"
    """From the begin, or a release, until the next adopt: the session holds no device memory."""
    ADOPTED = "adopted"
    """From adopt until a forward begins, and between forwards."""
    RUNNING = "running"
    """From the begin of a forward until its end."""
    CLOSED = "closed"
    """From close on: nothing is left registered, and the weights are ordinary host memory."""
