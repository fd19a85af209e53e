"""What tests compare with: latents without swapping, bytes copied, the peak of memory, and where weights are."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .variants import VARIANTS, Variant
from .workflow import Workflow


@contextlib.contextmanager
def measured(device: torch.device | str) -> Iterator[SimpleNamespace]:
    """Bytes copied (`h2d_bytes`, … where the device counts them), and `peak` above what was in use before."""
    module, found = torch.get_device_module(torch.device(device)), SimpleNamespace()
    before = module.memory_allocated()
    counts = hasattr(module, "copy_stats")
    if counts:
        module.reset_copy_stats()
    module.reset_peak_memory_stats()
    yield found
    found.__dict__.update(module.copy_stats() if counts else {}, peak=module.max_memory_allocated() - before)


def unswapped(variant: str | Variant, device: torch.device | str) -> SimpleNamespace:
    """Latents and costs of a run without swapping and without compiling, offloaded at the end; found once.

    `second` has the latents of the next run, which are the same unless a LoRA was added.
    """
    variant = VARIANTS[variant] if isinstance(variant, str) else variant
    return _unswapped(replace(variant, compiles=None, force_offload=True), str(device))


@functools.cache
def _unswapped(variant: Variant, device: str) -> SimpleNamespace:
    workflow = Workflow(variant, device=device)
    workflow.load()
    with measured(device) as cost:
        cost.latents = cost.second = workflow.sample()
    if variant.lora == "set_at_times":
        cost.second = workflow.sample()
    return cost


def places(module: nn.Module) -> set[str]:
    """Kinds of devices on which its parameters are."""
    return {parameter.device.type for parameter in module.parameters()}


def at_forwards(transformer: nn.Module, look: Callable[[Any], Any]) -> list[Any]:
    """A list that receives the result of `look(transformer)` at the start of each forward."""
    seen: list[Any] = []
    transformer.register_forward_pre_hook(lambda module, arguments: seen.append(look(module)))
    return seen
