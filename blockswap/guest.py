"""Guest: a transformer that has our arguments, as the gate holds it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from .patch import Forward
from .run import SwapRun
from .state import SessionState


@dataclass(slots=True)
class Guest:
    """A transformer that has our arguments. Does not know it: its life is the wrapper's.

    Attributes:
        run: Its run.
        patched: What stands as `forward` on its modules now; those hold it themselves.
        hints_to_host: VACE hints go to the host.
    """

    run: SwapRun
    patched: list[weakref.ref[Forward]]
    hints_to_host: bool = False

    def disarm(self) -> None:
        """Every `forward` as it was."""
        patched, self.patched = self.patched, []
        for reference in patched:
            forward = reference()
            if forward is not None:
                forward.disarm()

    def release(self, failure: BaseException | None = None) -> None:
        """The run is over, if one is under way; what has ended it, if it has not ended well."""
        if self.run.session.state in (SessionState.IDLE, SessionState.ADOPTED):
            self.run.release(failure)
