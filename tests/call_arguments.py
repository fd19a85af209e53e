"""Whether a model's forwards leave their arguments alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten


@contextlib.contextmanager
def arguments_compared(model: nn.Module) -> Iterator[list[bool]]:
    """A list that gets, of each forward that ends, whether its arguments are what they were when it began."""
    kept: list[bool] = []
    begun: list[Any] = []

    def copy(_: nn.Module, arguments: Any, keywords: Any) -> None:
        leaves, structure = tree_flatten((arguments, keywords))
        copies = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        begun[:] = [(leaves, copies, structure)]

    def compare(_: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
        leaves, copies, structure = begun.pop()
        now, structure_now = tree_flatten((arguments, keywords))
        kept.append(
            structure == structure_now
            and all(leaf is found for leaf, found in zip(leaves, now, strict=True))
            and all(torch.equal(a, b) for a, b in zip(copies, now, strict=True) if isinstance(a, torch.Tensor))
        )

    handles = [
        model.register_forward_pre_hook(copy, with_kwargs=True),
        model.register_forward_hook(compare, with_kwargs=True),
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
