"""Step caches: what they remember of each prediction, and the forwards whose blocks they leave out for it."""

from __future__ import annotations

from typing import Any

import torch

CACHES = ("teacache", "magcache", "easycache")

RATIO, MOST_ERROR = 0.98, 0.05
"""MagCache: how much a residual is expected to shrink in a step, and how far what is left out may add up."""

LEAST_CHANGE = 0.265
"""EasyCache: change of the input since the blocks ran, relative to their output; below it they are skipped."""


class CacheState:
    """Predictions by number: the conditional one and the unconditional one."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Any]] = {}

    def new_prediction(self) -> int:
        self.states[len(self.states)] = {"residual": None, "ratio": 1.0, "error": 0.0}
        return len(self.states) - 1

    def get(self, pred_id: int) -> dict[str, Any]:
        return self.states[pred_id]

    def update(self, pred_id: int, **values: Any) -> None:
        self.states[pred_id].update(values)

    def clear_all(self) -> None:
        self.states.clear()


def choose_cache(model: Any, cache: str | None) -> None:
    """A run starts, with this step cache or without one."""
    for name in CACHES:
        setattr(model, f"enable_{name}", name == cache)


def ask_cache(
    model: Any, x: torch.Tensor, pred_id: int | None, current_step: int
) -> tuple[torch.Tensor, int | None, bool]:
    """The tokens, with the last residual if the blocks are left out; the prediction's number; whether the blocks are
    due. Changes state before any block runs.
    """
    name = _active(model)
    if name is None:
        return x, pred_id, True
    state: CacheState = getattr(model, f"{name}_state")
    if pred_id is None:
        return x, state.new_prediction(), True
    kept = state.get(pred_id)
    if _is_due(name, kept, x, current_step):
        return x, pred_id, True
    return x + kept["residual"].to(x.device), pred_id, False


def kept_input(model: Any, x: torch.Tensor, *, is_due: bool) -> torch.Tensor | None:
    """What the blocks' output is compared with afterwards. EasyCache copies it even where they are left out."""
    name = _active(model)
    return x.clone().to(model.cache_device) if name == "easycache" or (name and is_due) else None


def keep_output(model: Any, original: torch.Tensor | None, x: torch.Tensor, pred_id: int | None) -> None:
    """The blocks have run."""
    name = _active(model)
    if name is not None and original is not None:
        output = x.to(model.cache_device)
        getattr(model, f"{name}_state").update(pred_id, residual=output - original, input=original)


def keep_end(model: Any, x: torch.Tensor, pred_id: int | None) -> None:
    """The forward is nearly over. EasyCache keeps its output where it is, on the device."""
    if _active(model) == "easycache":
        model.easycache_state.update(pred_id, output=x.clone())


def _active(model: Any) -> str | None:
    return next((name for name in CACHES if getattr(model, f"enable_{name}")), None)


def _is_due(name: str, kept: dict[str, Any], x: torch.Tensor, current_step: int) -> bool:
    if name == "teacache":
        return current_step % 2 == 0
    if name == "magcache":
        kept["ratio"] *= RATIO
        kept["error"] += 1 - kept["ratio"]
        if kept["error"] <= MOST_ERROR:
            return False
        kept.update(ratio=1.0, error=0.0)
        return True
    change = (x - kept["input"].to(x.device)).abs().mean() / kept["output"].to(x.device).abs().mean()
    return not change < LEAST_CHANGE
