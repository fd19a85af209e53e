"""Finds nodes that conflict on one model, each case with its cause and remedy; pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..settings import NODE_KEY, is_ours

MARK = "blocks_to_swap"
"""Attribute that the wrapper's transformers have and those of ComfyUI lack."""

THEIRS_WIN = (
    "WanVideo Set BlockSwap replaces the model's block_swap_args from WanVideo Enhanced BlockSwap by those of another "
    "node, so that the wrapper's own, slower swapping is used; disconnect one of the two nodes"
)
OURS_WIN = (
    "WanVideo Set BlockSwap replaces the model's block_swap_args from another node by those of WanVideo Enhanced "
    "BlockSwap, so that the other node's settings have no effect; disconnect one of the two nodes"
)


@dataclass(frozen=True, slots=True)
class Miswired:
    """Two nodes that conflict.

    Attributes:
        why: Cause and remedy.
        lost: Our arguments if they have no effect; None if they have an effect.
    """

    why: str
    lost: Mapping[str, Any] | None = None


def arguments_of(patcher: Any) -> Any:
    """The BLOCKSWAPARGS that a loaded model has from its loader or from WanVideo Set BlockSwap; None without any."""
    options = getattr(patcher, "model_options", None)
    inner = options.get("transformer_options") if isinstance(options, Mapping) else None
    return inner.get("block_swap_args") if isinstance(inner, Mapping) else None


def is_theirs(arguments: Any) -> bool:
    """Whether BLOCKSWAPARGS come from another node; ours adds its id, also to those for the wrapper's own swapping."""
    return isinstance(arguments, Mapping) and NODE_KEY not in arguments and not is_ours(arguments)


def wrong_with_setting(patcher: Any, given: Any) -> Miswired | None:
    """The conflict between the arguments of a loaded model and new ones; None without a conflict.

    Args:
        patcher: The model at WanVideo Set BlockSwap.
        given: The new arguments; None keeps those of the model.
    """
    present = arguments_of(patcher)
    if not is_ours(given):
        return Miswired(THEIRS_WIN, lost=present) if is_theirs(given) and is_ours(present) else None
    why_not = why_not_the_wrappers(patcher)
    if why_not is not None:
        return Miswired(why_not, lost=given)
    return Miswired(OURS_WIN) if is_theirs(present) else None


def why_not_the_wrappers(patcher: Any) -> str | None:
    """Why this model is not from the wrapper's loader; None if it is.

    ComfyUI checks the types of links, but not across nodes that pass any type on, such as switches.
    """
    model = getattr(patcher, "model", patcher)
    if hasattr(getattr(model, "diffusion_model", None), MARK):
        return None
    return (
        f"expected a WANVIDEOMODEL, got {type(model).__name__}; load the file with WanVideo Model Loader, or leave "
        "swapping off for ComfyUI's own Wan models (MODEL): ComfyUI offloads those by itself"
    )
