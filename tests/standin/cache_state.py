"""What step caches remember of each prediction."""

from __future__ import annotations

from typing import Any


class CacheState:
    """Predictions by number: the conditional one and the unconditional one."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Any]] = {}

    def new_prediction(self) -> int:
        self.states[len(self.states)] = {"previous_residual": None, "asked": 0}
        return len(self.states) - 1

    def get(self, pred_id: int) -> dict[str, Any]:
        return self.states[pred_id]

    def update(self, pred_id: int, **values: Any) -> None:
        self.states[pred_id].update(values)

    def clear_all(self) -> None:
        self.states.clear()
