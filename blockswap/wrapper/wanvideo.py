"""What this package relies on in ComfyUI-WanVideoWrapper: its names, how to find it, models that cannot be swapped, and
what is read from a transformer and set on it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..errors import WrapperError, WrapperMissingError
from ..model.groups import VACE
from ..model.tensors import stored_bytes
from ..settings import EVERY_BLOCK
from .parts import PUT, Part, parts_of, unwrapped

LOAD, START, END = "load_weights", "init_blockswap", "offload_transformer"
"""Functions that the wrapper calls to load the weights of a run, to start the run, and to end it."""

SET = "loadmodel"
"""Method of the wrapper's node that gives a loaded model new arguments."""

PARAMETERS = {
    LOAD: ("transformer", "block_swap_args"),
    START: ("transformer", "block_swap_args", "model"),
    END: ("transformer", "remove_lora"),
    SET: ("model", "block_swap_args"),
}
"""Parameters that each function must have."""

SOURCE_PHRASES = {
    "forward": ("enumerate(self.blocks)", "self.blocks_to_swap > 0"),
    "forward_vace": ("before_proj", "block.forward(", "after_proj", "self.vace_blocks_to_swap > 0"),
}
"""What the source of the model's methods must contain, where the wrapper swaps and this package does instead."""

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


@dataclass(frozen=True, slots=True)
class Wrapper:
    """The loaded wrapper.

    Attributes:
        package: Name of its package.
        holders: For LOAD, START, END and PUT: the modules that hold the function, or another pack's wrapping of it. For
            SET: the node class with the method, or none in a wrapper without that node.
    """

    package: str
    holders: Mapping[str, Sequence[ModuleType | type]]


def find_wrapper(node_classes: Mapping[str, type]) -> Wrapper:
    """Finds the wrapper from ComfyUI's registered nodes and checks it.

    Args:
        node_classes: ComfyUI's NODE_CLASS_MAPPINGS.

    Raises:
        WrapperMissingError: The wrapper is not loaded.
        WrapperError: The wrapper lacks something that this package relies on; the message names all of it.
    """
    needed = ("WanVideoModelLoader", "WanVideoSampler")
    missing = [f"node {name}" for name in needed if name not in node_classes]
    if len(missing) == len(needed):
        raise WrapperMissingError(
            f"ComfyUI-WanVideoWrapper is not loaded: neither {' nor '.join(missing)} is registered, and nothing is "
            "swapped without it; install it through ComfyUI Manager, or look in ComfyUI's log for why its import failed"
        )
    if missing:
        raise _changed(missing)
    loader, sampler = (sys.modules[node_classes[name].__module__] for name in needed)
    functions = {name: getattr(loader if name == LOAD else sampler, name, None) for name in (LOAD, START, END)}
    missing = _missing_of_functions(functions) + _missing_of_model(getattr(loader, "WanModel", None))
    if missing:
        raise _changed(missing)
    package = loader.__name__.rpartition(".")[0]
    inside = [module for name, module in list(sys.modules.items()) if name.startswith(f"{package}.") and module]
    holders: dict[str, Sequence[ModuleType | type]] = {
        name: tuple(module for module in inside if _can_be_wrapped(vars(module).get(name), name)) for name in functions
    }
    holders[PUT] = (loader,) if callable(vars(loader).get(PUT)) else ()
    setter = node_classes.get("WanVideoSetBlockSwap")
    holders[SET] = (setter,) if setter is not None and _can_be_wrapped(vars(setter).get(SET), SET) else ()
    return Wrapper(package, holders)


def _changed(missing: Sequence[str]) -> WrapperError:
    # What is missing does not show whether the wrapper is too new or too old.
    return WrapperError(
        f"ComfyUI-WanVideoWrapper has changed, or is too old: {', '.join(missing)} "
        f"{'is' if len(missing) == 1 else 'are'} not as expected; update it and WanVideo Enhanced BlockSwap"
    )


def _missing_of_functions(functions: Mapping[str, Any]) -> list[str]:
    missing = []
    for name, function in functions.items():
        if callable(function):
            missing += [f"{name}({one}=…)" for one in PARAMETERS[name] if one not in _parameters(function)]
        else:
            missing.append(name)
    return missing


def _missing_of_model(model: Any) -> list[str]:
    if model is None:
        return ["WanModel"]
    missing = [] if "transformer_options" in _parameters(model.forward) else ["WanModel.forward(transformer_options=…)"]
    for method, phrases in SOURCE_PHRASES.items():
        try:
            source = inspect.getsource(getattr(model, method))
        except (AttributeError, OSError, TypeError):
            missing.append(f"the source of WanModel.{method}")
            continue
        missing += [f"{phrase!r} in WanModel.{method}" for phrase in phrases if phrase not in source]
    return missing


def _can_be_wrapped(found: Any, name: str) -> bool:
    return callable(found) and set(PARAMETERS[name]) <= set(_parameters(found))


def _parameters(function: Callable[..., Any]) -> Sequence[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


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


def refuse_vram_management(transformer: Any, model: Any = None) -> None:
    """Raises WrapperError if the wrapper's own VRAM management, which moves the same weights, has the model.

    Either mark counts: `model` is unknown while weights are loaded, and older wrappers make no such entry in it.
    """
    if getattr(transformer, "vram_management_enabled", False) or entry(model, "auto_cpu_offload"):
        raise WrapperError(
            "swapped blocks cannot run with vram_management_args, which move the same weights; disconnect "
            "vram_management_args from the loader, or disconnect WanVideo Enhanced BlockSwap"
        )


def entry(model: Any, key: str) -> Any:
    """An item of the wrapper's model, which is not a mapping; None if it has no item of that name."""
    try:
        return model[key]
    except (KeyError, TypeError, AttributeError):
        return None


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
        return f"{' and '.join(caches)} keeps state from one forward to the next"
    function = original.func if isinstance(original, functools.partial) else original
    if function is not type(transformer).forward or function.__module__ != type(transformer).__module__:
        return "another pack has changed the model's forward"
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
