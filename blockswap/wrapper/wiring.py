"""Wiring: what is wrong with the nodes that are connected to a model, each with its cause and cure; pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..settings import NODE_KEY, is_ours

MARK = "blocks_to_swap"
"""Attribute that the wrapper's transformers have had since they swap blocks, and ComfyUI's own have not."""

THEIRS_WIN = (
    "WanVideo Set BlockSwap replaces the block_swap_args of WanVideo Enhanced BlockSwap, which the model has, by "
    "another node's: those hold, and the wrapper's own, slower swapping is used; disconnect one of the two nodes"
)
OURS_WIN = (
    "WanVideo Set BlockSwap replaces another node's block_swap_args, which the model has, by those of WanVideo "
    "Enhanced BlockSwap: these hold, and the other node's settings count for nothing; disconnect one of the two nodes"
)


@dataclass(frozen=True, slots=True)
class Miswired:
    """Two nodes that do not go together.

    Attributes:
        why: Cause and cure.
        in_vain: Our arguments, if it is them that come to nothing; None if they hold.
    """

    why: str
    in_vain: Mapping[str, Any] | None = None


def arguments_of(patcher: Any) -> Any:
    """The BLOCKSWAPARGS that a loaded model has from its loader or from WanVideo Set BlockSwap; None without any."""
    options = getattr(patcher, "model_options", None)
    inner = options.get("transformer_options") if isinstance(options, Mapping) else None
    return inner.get("block_swap_args") if isinstance(inner, Mapping) else None


def is_theirs(arguments: Any) -> bool:
    """Whether BLOCKSWAPARGS come from another node: ours marks those for the wrapper's own swapping as well."""
    return isinstance(arguments, Mapping) and NODE_KEY not in arguments and not is_ours(arguments)


def wrong_with_setting(patcher: Any, given: Any) -> Miswired | None:
    """What is wrong with giving a loaded model these arguments in place of those that it has; None if nothing is.

    Args:
        patcher: The model that comes to WanVideo Set BlockSwap.
        given: The arguments that it is given; None leaves it as it is.
    """
    present = arguments_of(patcher)
    if not is_ours(given):
        return Miswired(THEIRS_WIN, in_vain=present) if is_theirs(given) and is_ours(present) else None
    why_not = why_not_the_wrappers(patcher)
    if why_not is not None:
        return Miswired(why_not, in_vain=given)
    return Miswired(OURS_WIN) if is_theirs(present) else None


def why_not_the_wrappers(patcher: Any) -> str | None:
    """Why this is no model of the wrapper's loader; None if it is one. ComfyUI checks the types of links, but not
    behind nodes that pass anything on, such as switches.
    """
    model = getattr(patcher, "model", patcher)
    if hasattr(getattr(model, "diffusion_model", None), MARK):
        return None
    return (
        f"block swapping expects a WANVIDEOMODEL but got {type(model).__name__}; load the file with WanVideo Model "
        "Loader, or leave swapping off for ComfyUI's own Wan models (MODEL): ComfyUI offloads those by itself"
    )
