"""What this package relies on in the wrapper's transformers: their names, models that cannot be swapped, what is read
from a transformer, and what is set on it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PureWindowsPath
from typing import Any

import torch
from torch import nn

from ..errors import WrapperError
from ..model.groups import VACE
from ..model.tensors import stored_bytes
from ..settings import EVERY_BLOCK
from .parts import Part, parts_of, unwrapped

COUNTERS = {"blocks_to_swap": -1, "vace_blocks_to_swap": -1, "prefetch_blocks": 0}
"""Attributes that control the wrapper's own swapping, with their values in a new model, which switch it off."""

ATTRIBUTES = ("blocks", "main_device", "offload_device", "patched_linear", *COUNTERS)
"""Attributes that a transformer must have."""

HINTS_TO_HOST = 0.5
"""A `vace_blocks_to_swap` above 0, so that hints go to the host, and below 1, so that no VACE block moves."""

CACHES = {"teacache": "TeaCache", "magcache": "MagCache", "easycache": "EasyCache"}
"""Step caches: a forward with one of these changes state of later forwards before its blocks run. A transformer has a
switch, a first step and a last step for each.
"""

CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Modes of torch.compile that replay kernels at fixed addresses; a block in changing slots has none."""


def check_transformer(transformer: nn.Module) -> None:
    """Raises WrapperError if the transformer lacks an attribute that block swapping needs."""
    missing = [name for name in ATTRIBUTES if not hasattr(transformer, name)]
    if missing:
        raise WrapperError(
            f"{type(transformer).__name__} lacks {', '.join(missing)}, which block swapping needs; update WanVideo "
            "Enhanced BlockSwap"
        )


def refuse_cuda_graphs(compile_args: Mapping[str, Any] | None) -> None:
    """Raises WrapperError if blocks are compiled into CUDA graphs."""
    mode, backend = ((compile_args or {}).get(key) for key in ("mode", "backend"))
    if mode in CUDA_GRAPH_MODES or backend == "cudagraphs":
        what = f"mode {mode}" if mode in CUDA_GRAPH_MODES else f"backend {backend}"
        raise WrapperError(
            f"swapped blocks cannot run in CUDA graphs, which fix the addresses of weights: torch.compile has {what}; "
            "choose mode max-autotune-no-cudagraphs or default in the WanVideo torch compile settings"
        )


MODEL_FILES = (".safetensors", ".sft", ".gguf", ".pt", ".pth", ".bin", ".ckpt")

MANAGED = (
    "swapped blocks cannot run with vram_management_args, which move the same weights; disconnect vram_management_args "
    "from the loader, or disconnect WanVideo Enhanced BlockSwap"
)
"""Why a model is refused that the wrapper's own VRAM management has, too."""


def refuse_vram_management(transformer: Any, model: Any = None) -> None:
    """Raises WrapperError if the wrapper's own VRAM management, which moves the same weights, has the model.

    Either mark counts: `model` is unknown while weights are loaded, and older wrappers make no such entry in it.
    """
    if getattr(transformer, "vram_management_enabled", False) or entry(model, "auto_cpu_offload"):
        raise WrapperError(MANAGED)


def entry(model: Any, key: str) -> Any:
    """An item of the wrapper's model, which is not a mapping; None if it has no item of that name."""
    try:
        return model[key]
    except (KeyError, TypeError, AttributeError):
        return None


def shown_name(file: Any) -> str:
    """What a model is called by its file: without folders, except where all models of a kind have files of one name."""
    path = PureWindowsPath(file) if isinstance(file, str) else PureWindowsPath()
    name = path.stem if path.suffix.lower() in MODEL_FILES else path.name
    return f"{path.parent.name}/{name}" if name.startswith("diffusion_pytorch_model") and path.parent.name else name


def vace_blocks_of(transformer: Any) -> Sequence[nn.Module]:
    """The current VACE blocks; none in a model without VACE."""
    return tuple(getattr(transformer, "vace_blocks", None) or ())


def host_weight_bytes(parts: Sequence[Part]) -> int:
    """Bytes of the weights in host memory now."""
    weights = [weight for part in parts for weight in part.weights.parameters()]
    return sum(stored_bytes(weight) for weight in weights if weight.device.type == "cpu")


def retry_blocker(transformer: Any, original: Any, *, step: int) -> str | None:
    """Why a second call of a started forward could give another result, as a clause; None if it cannot.

    The wrapper's own forward leaves its arguments unchanged and keeps no state except in its step caches. A forward or
    hook of another pack may keep state.

    Args:
        transformer: The model.
        original: The forward that ours calls.
        step: The sampling step of the forward.
    """
    caches = [name for cache, name in CACHES.items() if _cache_acts(transformer, cache, step)]
    if caches:
        return f"{' and '.join(caches)} keeps state from one step to the next"
    function = original.func if isinstance(original, functools.partial) else original
    if function is not type(transformer).forward or function.__module__ != type(transformer).__module__:
        return "another pack has changed how the model runs"
    if any(unwrapped(part.module)._forward_hooks for part in parts_of(transformer)):
        return "another pack has hooks on the model's blocks"
    return None


def _cache_acts(transformer: Any, cache: str, step: int) -> bool:
    """Whether a step cache changes what it keeps in a forward of this step."""
    first, last = getattr(transformer, f"{cache}_start_step", 0), getattr(transformer, f"{cache}_end_step", -1)
    return getattr(transformer, f"enable_{cache}", False) and first <= step and (last < 0 or step <= last)


@contextlib.contextmanager
def native_swapping_disabled(transformer: Any, *, hints_to_host: bool) -> Iterator[None]:
    """A context in which the wrapper's loop finds nothing to swap; VACE hints go to the host if `hints_to_host`."""
    before = {name: getattr(transformer, name) for name in COUNTERS}
    try:
        reset_counters(transformer)
        if hints_to_host:
            transformer.vace_blocks_to_swap = HINTS_TO_HOST
        yield
    finally:
        for name, value in before.items():
            setattr(transformer, name, value)


@contextlib.contextmanager
def vace_blocks_entered(parts: Sequence[Part], enter: Callable[[int, object], None]) -> Iterator[None]:
    """A context in which `enter` is called with the index of each VACE block among `parts` before it runs, and with a
    tensor that it is given. The wrapper calls `block.forward`, which skips hooks on the block, so that the hooks are on
    its layers: the first block is entered before its `before_proj`, and each other one after the `after_proj` of the
    previous one.
    """
    blocks: list[tuple[int, Any]] = [
        (index, part.weights) for index, part in enumerate(parts) if part.name.startswith(f"{VACE}.")
    ]
    entering = torch.compiler.disable(enter)
    with contextlib.ExitStack() as stack:  # removes the hooks
        for index, block in blocks[:1]:
            first = block.before_proj
            hook = functools.partial(_entering_first, entering, index)
            stack.enter_context(first.register_forward_pre_hook(hook, prepend=True))
        for (_, block), (index, _) in itertools.pairwise(blocks):
            stack.enter_context(block.after_proj.register_forward_hook(functools.partial(_entering, entering, index)))
        yield


def _entering_first(enter: Callable[[int, object], None], index: int, module: nn.Module, given: Any) -> None:
    enter(index, given)


def _entering(enter: Callable[[int, object], None], index: int, module: nn.Module, given: Any, output: Any) -> None:
    enter(index, (given, output))


def reset_counters(transformer: nn.Module) -> None:
    """Switches the wrapper's own swapping off. The wrapper never resets a count by itself."""
    for name, value in COUNTERS.items():
        setattr(transformer, name, value)


def reset_our_count(transformer: nn.Module) -> None:
    """Resets the counters if the count is ours, left by a run that failed before it started."""
    if getattr(transformer, "blocks_to_swap", 0) == EVERY_BLOCK:
        reset_counters(transformer)


def return_unloaded_weights(transformer: Any) -> None:
    """Puts weights of a patched model back on the device that the wrapper loads once, and not again for every run:
    Stand-In's, which have "loras" in their names.
    """
    if transformer.patched_linear:
        for name, module in transformer.named_modules():
            if name.endswith("_loras"):
                module.to(transformer.main_device)


def discard_packed_weights(transformer: nn.Module) -> None:
    """Empties the packed (GGUF) weights of the blocks, so that the wrapper's loader reads them again instead of keeping
    them on their device.
    """
    for part in parts_of(transformer):
        for module in part.weights.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and hasattr(parameter, "quant_type"):
                    module._parameters[name] = nn.Parameter(parameter.new_empty(0).as_subclass(torch.Tensor), False)  # noqa: FBT003
