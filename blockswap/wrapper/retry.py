"""A forward that runs out of device memory is called again with a smaller plan, if that cannot change its result."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from ...hardware import is_out_of_memory
from ..errors import DeviceMemoryError
from ..model.profile import blocks_of
from .wanvideo import unwrapped

logger = logging.getLogger(__name__)

T = TypeVar("T")

CACHES = {"teacache": "TeaCache", "magcache": "MagCache", "easycache": "EasyCache"}
"""With these a forward changes what it keeps for later ones before its blocks run. A transformer has a switch, a first
and a last step of each.
"""


def within_memory(
    prepare: Callable[[], T],
    forward: Callable[[T], Any],
    *,
    shrink: Callable[[str], None],
    blocker: Callable[[], str | None],
) -> Any:
    """One forward, with ever smaller plans while device memory runs out.

    Args:
        prepare: Puts a plan in place; what it returns is given to `forward`.
        forward: Runs the forward.
        shrink: Makes the next plan smaller, given the device's own message; raises if there is none.
        blocker: Gives what keeps a forward that has started from being repeated; None if nothing does.

    Raises:
        DeviceMemoryError: Memory ran out and no smaller plan may be tried.
    """
    while True:
        has_started = False
        try:
            workload = prepare()
            has_started = True
            return forward(workload)
        except RuntimeError as failure:
            if not (isinstance(failure, DeviceMemoryError) or is_out_of_memory(failure)):
                raise
            message = str(failure).partition("\n")[0]
        # Not in the handler: the failure's traceback holds what the forward had allocated.
        logger.warning("%s; trying a smaller plan", message)
        shrink(message)
        why_not = blocker() if has_started else None
        if why_not is not None:
            raise DeviceMemoryError(
                f"a forward ran out of device memory and cannot be repeated, since {why_not}; a smaller plan is "
                f"remembered for this video size: queue the prompt again (the device reported: {message})"
            )


def retry_blocker(transformer: Any, original: Any, *, step: int) -> str | None:
    """What keeps a forward that has started from being repeated, as a clause; None if nothing does.

    The wrapper's own forward leaves its arguments alone (tests show it, on the real wrapper too) and keeps nothing that
    a second one would meet, except for its step caches. What other packs put in its place, or behind its blocks, may
    keep anything.

    Args:
        transformer: The model.
        original: Its forward, as found when ours was put in front of it.
        step: Number of the sampling step.
    """
    caches = [name for cache, name in CACHES.items() if _acts(transformer, cache, step)]
    if caches:
        return f"{' and '.join(caches)} keeps state from one forward to the next"
    function = original.func if isinstance(original, functools.partial) else original
    if function is not type(transformer).forward or function.__module__ != type(transformer).__module__:
        return "another pack has changed the model's forward"
    if any(unwrapped(block)._forward_hooks for _, block in blocks_of(transformer) if isinstance(block, nn.Module)):
        return "another pack has hooks on the model's blocks"
    return None


def _acts(transformer: Any, cache: str, step: int) -> bool:
    """Whether a step cache changes what it keeps in a forward of this step."""
    first, last = getattr(transformer, f"{cache}_start_step", 0), getattr(transformer, f"{cache}_end_step", -1)
    return getattr(transformer, f"enable_{cache}", False) and first <= step and (last < 0 or step <= last)
