"""What we rely on of ComfyUI-WanVideoWrapper, in order: its names, finding it, models that cannot be swapped, what is
read from a transformer, and what is set on one.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import WrapperError, WrapperMissingError
from ..model.profile import blocks_of
from ..model.wan import WanArchitecture, activation_bytes
from ..run.history import Workload
from ..settings import EVERY_BLOCK

LOAD, START, END = "load_weights", "init_blockswap", "offload_transformer"
"""Functions that the wrapper calls to load a run's weights, to start the run, and to end it."""

SET = "loadmodel"
"""Method of the node that gives a loaded model other arguments."""

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
"""What the source of each method of the model must contain: there is the wrapper's own swapping, and there is ours."""

COUNTERS = {"blocks_to_swap": -1, "vace_blocks_to_swap": -1, "prefetch_blocks": 0}
"""Attributes that control the wrapper's own swapping, and their values in a new model, which switch it off."""

ATTRIBUTES = ("blocks", "main_device", "offload_device", "patched_linear", *COUNTERS)
"""Attributes that a transformer must have."""

HINTS_TO_HOST = 0.5
"""As `vace_blocks_to_swap`: above 0, so that hints go to the host, and below 1, so that no VACE block is moved."""

CACHES = {"teacache": "TeaCache", "magcache": "MagCache", "easycache": "EasyCache"}
"""Step caches: with one of these a forward changes what it keeps for later ones before its blocks run. A transformer
has a switch, a first and a last step of each.
"""

CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Modes of torch.compile that replay kernels at fixed addresses, which a block in changing slots does not have."""


@dataclass(frozen=True, slots=True)
class Wrapper:
    """The loaded wrapper.

    Attributes:
        holders: For LOAD, START and END, the modules that hold this function, or what another pack has made of it; for
            SET, the node class that has this method, in wrappers that have such a node.
    """

    holders: Mapping[str, Sequence[ModuleType | type]]


def find_wrapper(node_classes: Mapping[str, type]) -> Wrapper:
    """Finds the wrapper behind ComfyUI's registered nodes and checks it.

    Args:
        node_classes: ComfyUI's NODE_CLASS_MAPPINGS.

    Raises:
        WrapperMissingError: It is not installed.
        WrapperError: It lacks something we rely on; the message names all of it.
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
    functions = {LOAD: getattr(loader, LOAD, None)} | {name: getattr(sampler, name, None) for name in (START, END)}
    missing = _missing_of_functions(functions) + _missing_of_model(getattr(loader, "WanModel", None))
    if missing:
        raise _changed(missing)
    package = loader.__name__.rpartition(".")[0]
    inside = [module for name, module in list(sys.modules.items()) if name.startswith(f"{package}.") and module]
    holders: dict[str, Sequence[ModuleType | type]] = {
        name: tuple(module for module in inside if _can_be_wrapped(vars(module).get(name), name)) for name in functions
    }
    setter = node_classes.get("WanVideoSetBlockSwap")
    has_method = setter is not None and _can_be_wrapped(vars(setter).get(SET), SET)
    holders[SET] = (setter,) if setter is not None and has_method else ()
    return Wrapper(holders)


def _changed(missing: Sequence[str]) -> WrapperError:
    """What it lacks does not show whether it is newer than we know or too old."""
    return WrapperError(
        f"ComfyUI-WanVideoWrapper has changed, or is too old: {', '.join(missing)} "
        f"{'is' if len(missing) == 1 else 'are'} not as expected; update it and WanVideo Enhanced BlockSwap"
    )


def _missing_of_functions(functions: Mapping[str, Any]) -> list[str]:
    missing = [name for name, function in functions.items() if not callable(function)]
    return missing + [
        f"{name}({parameter}=…)"
        for name, function in functions.items()
        if callable(function)
        for parameter in PARAMETERS[name]
        if parameter not in _parameters(function)
    ]


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
    """Raises WrapperError if the transformer lacks an attribute that its swapping needs."""
    missing = [name for name in ATTRIBUTES if not hasattr(transformer, name)]
    if missing:
        raise WrapperError(
            f"{type(transformer).__name__} has no {', '.join(missing)}, which block swapping needs; update WanVideo "
            "Enhanced BlockSwap"
        )


def refuse_cuda_graphs(compile_args: Mapping[str, Any] | None) -> None:
    """Raises WrapperError if blocks are compiled into CUDA graphs."""
    if compile_args is None:
        return
    mode, backend = compile_args.get("mode"), compile_args.get("backend")
    if mode in CUDA_GRAPH_MODES or backend == "cudagraphs":
        what = f"mode {mode}" if mode in CUDA_GRAPH_MODES else f"backend {backend}"
        raise WrapperError(
            f"swapped blocks cannot run in CUDA graphs, which fix the addresses of weights: torch.compile has {what}; "
            "choose mode max-autotune-no-cudagraphs or default in the WanVideo torch compile settings"
        )


def refuse_vram_management(transformer: Any, model: Any = None) -> None:
    """Raises WrapperError if the wrapper's own VRAM management has the model: it moves the same weights.

    Either mark counts: weights are loaded without the model at hand, and older wrappers make no such entry.
    """
    if getattr(transformer, "vram_management_enabled", False) or entry(model, "auto_cpu_offload"):
        raise WrapperError(
            "swapped blocks cannot run with vram_management_args, which move the same weights; disconnect "
            "vram_management_args from the loader, or disconnect WanVideo Enhanced BlockSwap"
        )


def entry(model: Any, key: str) -> Any:
    """An entry of the wrapper's model, which is no mapping but has items; None if it has none of that name."""
    try:
        return model[key]
    except (KeyError, TypeError, AttributeError):
        return None


def unwrapped(module: Any) -> Any:
    """The module inside torch.compile's OptimizedModule, however often it is wrapped."""
    while (inner := getattr(module, "_orig_mod", None)) is not None:
        module = inner
    return module


def current_blocks(transformer: nn.Module) -> list[nn.Module]:
    """The modules that a forward will call: torch.compile wraps the blocks anew at every run."""
    return [block for _, block in blocks_of(transformer)]


def named_blocks(transformer: nn.Module) -> tuple[tuple[str, nn.Module], ...]:
    """Name and module of each block, without torch.compile's wrapping."""
    return tuple((name, unwrapped(block)) for name, block in blocks_of(transformer))


def vace_blocks_of(transformer: Any) -> Sequence[nn.Module]:
    """The VACE blocks, as they are now; none in a model without VACE."""
    return tuple(getattr(transformer, "vace_blocks", None) or ())


def host_weight_bytes(transformer: nn.Module) -> int:
    """Bytes of the blocks' weights that are in host memory now."""
    tensors = [tensor for _, block in named_blocks(transformer) for tensor in block.parameters()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.device.type == "cpu")


def workload_of(transformer: Any, latents: Any, *, hints_to_host: bool) -> Workload | None:
    """The workload of a forward with these latents; None if they are not what the wrapper gives.

    Args:
        transformer: The model.
        latents: A list of `(channels, frames, rows, columns)`, or one tensor with a batch before that.
        hints_to_host: VACE hints take no device memory.
    """
    patch = getattr(transformer, "patch_size", None)
    shapes = [tuple(one.shape[-3:]) for one in latents if isinstance(one, torch.Tensor) and one.dim() > 3]  # noqa: PLR2004
    if patch is None or not shapes:
        return None
    tokens = sum(f // patch[0] * (h // patch[1]) * (w // patch[2]) for f, h, w in shapes)
    architecture = WanArchitecture(
        width=int(transformer.dim),
        ffn_width=int(transformer.ffn_dim),
        heads=int(transformer.num_heads),
        blocks=len(transformer.blocks),
        vace_blocks=len(vace_blocks_of(transformer)),
        patch=tuple(patch),
        in_channels=int(transformer.in_dim),
    )
    expected = activation_bytes(architecture, tokens, vace_hints=not hints_to_host)
    return Workload(tokens=tokens, expected_activation_bytes=expected, latent_frames=max(f for f, _, _ in shapes))


def retry_blocker(transformer: Any, original: Any, *, step: int) -> str | None:
    """Why a forward that has begun cannot be repeated with the same result, as a clause; None if it can.

    The wrapper's own forward leaves its arguments alone and keeps nothing that a second call would meet, except in its
    step caches. What other packs put in its place, or behind its blocks, may keep anything.

    Args:
        transformer: The model.
        original: Its forward, as found when ours was put in front of it.
        step: The sampling step that the forward belongs to.
    """
    caches = [name for cache, name in CACHES.items() if _cache_acts(transformer, cache, step)]
    if caches:
        return f"{' and '.join(caches)} keeps state from one forward to the next"
    function = original.func if isinstance(original, functools.partial) else original
    if function is not type(transformer).forward or function.__module__ != type(transformer).__module__:
        return "another pack has changed the model's forward"
    if any(unwrapped(block)._forward_hooks for _, block in blocks_of(transformer) if isinstance(block, nn.Module)):
        return "another pack has hooks on the model's blocks"
    return None


def _cache_acts(transformer: Any, cache: str, step: int) -> bool:
    """Whether a step cache changes what it keeps in a forward of this step."""
    first, last = getattr(transformer, f"{cache}_start_step", 0), getattr(transformer, f"{cache}_end_step", -1)
    return getattr(transformer, f"enable_{cache}", False) and first <= step and (last < 0 or step <= last)


@contextlib.contextmanager
def native_swapping_disabled(transformer: nn.Module, *, hints_to_host: bool) -> Iterator[None]:
    """Meanwhile the wrapper's loop finds nothing to swap.

    Args:
        transformer: The model.
        hints_to_host: VACE hints go to the host.
    """
    before = {name: getattr(transformer, name) for name in COUNTERS}
    neutral = COUNTERS | ({"vace_blocks_to_swap": HINTS_TO_HOST} if hints_to_host else {})
    try:
        for name, value in neutral.items():
            setattr(transformer, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(transformer, name, value)


@contextlib.contextmanager
def vace_blocks_entered(transformer: nn.Module, enter: Callable[[int], None]) -> Iterator[None]:
    """Meanwhile `enter` is called before each VACE block runs. The wrapper calls their `forward` itself, which skips
    all hooks on them: block 0 is entered before its `before_proj`, each other one after the `after_proj` of the block
    before it.
    """
    handles: list[RemovableHandle] = []
    blocks = vace_blocks_of(transformer)
    entering = torch.compiler.disable(enter)
    try:
        if blocks:
            first = unwrapped(blocks[0]).before_proj
            handles.append(first.register_forward_pre_hook(lambda module, arguments: entering(0), prepend=True))
        for index, block in enumerate(blocks[:-1], start=1):
            after = unwrapped(block).after_proj
            handles.append(after.register_forward_hook(lambda module, arguments, output, i=index: entering(i)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def reset_counters(transformer: nn.Module) -> None:
    """Switches the wrapper's own swapping off: it never resets a count by itself, so that ours would stay for ever."""
    for name, value in COUNTERS.items():
        setattr(transformer, name, value)


def reset_our_count(transformer: nn.Module) -> None:
    """Resets the counters if the count is ours: a run that failed before its start has left it behind."""
    if getattr(transformer, "blocks_to_swap", 0) == EVERY_BLOCK:
        reset_counters(transformer)


def discard_packed_weights(transformer: nn.Module) -> None:
    """Empties the packed (GGUF) weights of the blocks. The wrapper's loader would keep them on the device that they are
    on; now it reads them anew.
    """
    for _, block in named_blocks(transformer):
        for module in block.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and hasattr(parameter, "quant_type"):
                    module._parameters[name] = nn.Parameter(parameter.new_empty(0).as_subclass(torch.Tensor), False)  # noqa: FBT003
