"""Whether a forward of the wrapper's model that has failed may be called once more, with the same result."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...hardware import is_out_of_memory
from ..model.profile import blocks_of
from ..model.tensors import flat, version_of
from .wanvideo import unwrapped

CACHES = {"teacache": "TeaCache", "magcache": "MagCache", "easycache": "EasyCache"}
"""With these a forward changes what it keeps for later ones before its blocks run. A transformer has a switch, a first
and a last step of each.
"""


def retry_blocker(transformer: Any, original: Any, inputs: Inputs, arguments: Any, keywords: Any) -> str | None:
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


DEEPEST = 8
"""Containers inside containers that are looked into; the wrapper's arguments have three."""

CHUNKS, SAMPLED_WORDS = 64, 1024
"""A tensor's bytes are added up in so many chunks, so that contents that change places are seen too. In host memory at
most so many words of each chunk are read: the host's own time must not grow with its size.
"""

SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.device, torch.dtype)


@dataclass(frozen=True, slots=True)
class Inputs:
    """A picture of a call's arguments. Tensors count their edits, except for inference tensors, as all of ComfyUI's
    are: of those sums of their bytes are kept, on their device, so that nothing is waited for.

    Attributes:
        facts: Of everything but the bytes of inference tensors, in a fixed order.
        tensors: The inference tensors.
        sums: Of their bytes, `(chunks + 1,)` of each; None of one that cannot be added up.
    """

    facts: tuple[Any, ...]
    tensors: tuple[torch.Tensor, ...]
    sums: tuple[torch.Tensor | None, ...]

    @classmethod
    def of(cls, *arguments: Any) -> Inputs:
        """Of these objects as they are now."""
        facts: list[Any] = []
        tensors: list[torch.Tensor] = []
        _walk(arguments, facts, tensors, depth=0)
        return cls(tuple(facts), tuple(tensors), tuple(map(_byte_sums, tensors)))

    def are_still(self, *arguments: Any) -> bool:
        """Whether these are the same objects with the same contents, as far as sums can tell. Waits for the device."""
        now = Inputs.of(*arguments)
        if self.facts != now.facts:
            return False
        pairs = zip(self.sums, now.sums, strict=True)
        return all(one is not None and other is not None and torch.equal(one, other) for one, other in pairs)


def _walk(value: Any, facts: list[Any], tensors: list[torch.Tensor], *, depth: int) -> None:
    if isinstance(value, torch.Tensor):
        is_strided = value.layout is torch.strided and not value.is_meta
        facts.append((id(value), value.data_ptr() if is_strided else 0, tuple(value.shape), version_of(value)))
        if version_of(value) is None and is_strided:
            tensors.append(value)
    elif isinstance(value, SCALARS):
        facts.append((type(value), value) if value == value else (type(value), "nan"))
    elif isinstance(value, Mapping) and depth < DEEPEST:
        facts.append((id(value), len(value)))
        for key, inside in value.items():
            _walk(key, facts, tensors, depth=depth + 1)
            _walk(inside, facts, tensors, depth=depth + 1)
    elif isinstance(value, (list, tuple)) and depth < DEEPEST:
        facts.append((type(value), len(value)))
        for inside in value:
            _walk(inside, facts, tensors, depth=depth + 1)
    else:
        facts.append(id(value))


def _byte_sums(tensor: torch.Tensor) -> torch.Tensor | None:
    """Sums of a tensor's bytes chunk by chunk, in the widest words they fill, wrapping around; None where they cannot
    be had, as of conjugate or quantised tensors.
    """
    try:
        with torch.inference_mode():
            data = flat(tensor).view(torch.uint8)
            word = next(size for size in (8, 4, 2, 1) if data.numel() % size == 0 and tensor.data_ptr() % size == 0)
            words = data.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[word])
            length = words.numel() // CHUNKS
            chunks, rest = words[: CHUNKS * length].view(CHUNKS, length), words[CHUNKS * length :]
            if words.device.type == "cpu":
                chunks = chunks[:, :SAMPLED_WORDS]
            return torch.cat([chunks.sum(dim=1, dtype=torch.int64), rest.sum(dtype=torch.int64).reshape(1)])
    except RuntimeError as failure:
        if is_out_of_memory(failure):
            raise
        return None
