"""Whether a forward of the wrapper's model that has failed may be called once more, with the same result."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from .inputs import Inputs
from .profile import blocks_of
from .wanvideo import unwrapped

CACHES = {"teacache": "TeaCache", "magcache": "MagCache", "easycache": "EasyCache"}
"""With these a forward changes what it keeps for later ones before its blocks run. A transformer has a switch, a first
and a last step of each.
"""


def why_not_again(transformer: Any, original: Any, inputs: Inputs, arguments: Any, keywords: Any) -> str | None:
    """What keeps a forward that has begun from being repeated, as a clause; None if nothing does.

    The wrapper's own forward keeps nothing that a second one would meet, but for its step caches; what other packs put
    in its place, or behind its blocks, may keep anything.

    Args:
        transformer: The model.
        original: Its forward, as found when ours was put in front of it.
        inputs: Of the forward, before it began.
        arguments: The same objects now.
        keywords: The same objects now.
    """
    step = keywords.get("current_step", 0)
    caches = [name for cache, name in CACHES.items() if _acts(transformer, cache, step)]
    if caches:
        return f"{' and '.join(caches)} keeps state from one forward to the next"
    function = original.func if isinstance(original, functools.partial) else original
    if function is not type(transformer).forward or function.__module__ != type(transformer).__module__:
        return "another pack has changed the model's forward"
    if any(unwrapped(block)._forward_hooks for _, block in blocks_of(transformer) if isinstance(block, nn.Module)):
        return "another pack has hooks on the model's blocks"
    return None if inputs.are_still(arguments, keywords) else "it has changed its inputs"


def _acts(transformer: Any, cache: str, step: int) -> bool:
    """Whether a step cache changes what it keeps in a forward of this step."""
    first, last = getattr(transformer, f"{cache}_start_step", 0), getattr(transformer, f"{cache}_end_step", -1)
    return getattr(transformer, f"enable_{cache}", False) and first <= step and (last < 0 or step <= last)
