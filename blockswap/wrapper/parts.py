"""The modules of the wrapper's transformer that are swapped, and how its own moves of them are switched off."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..model.groups import GROUPS, LOADED_WITH_BLOCKS, Group, in_order, is_beside

PUT = "set_module_tensor_to_device"
"""Function with which the wrapper's loader puts a weight on a device: `(module, tensor_name, device=…, …)`."""


@dataclass(frozen=True, slots=True)
class Part:
    """A module that is swapped.

    Attributes:
        name: Its dotted name in the transformer.
        module: The module that a forward calls; torch.compile wraps the blocks again at every run.
        weights: The module that holds its tensors: without the wrapping, and without the parts inside it.
    """

    name: str
    module: nn.Module
    weights: nn.Module

    @property
    def is_beside(self) -> bool:
        """Whether it is neither a block nor a VACE block."""
        return is_beside(self.name)


def parts_of(transformer: nn.Module) -> tuple[Part, ...]:
    """The modules of a transformer that are swapped, in the order in which a forward runs them."""
    found = {part.name: part for group in GROUPS for part in _parts_of_group(transformer, group)}
    return tuple(found[name] for name in in_order(found))


def unwrapped(module: Any) -> Any:
    """The module inside any number of torch.compile's OptimizedModules."""
    while (inner := getattr(module, "_orig_mod", None)) is not None:
        module = inner
    return module


def _parts_of_group(transformer: nn.Module, group: Group) -> Iterator[Part]:
    found: Any = transformer
    for name in group.path.split("."):
        found = getattr(found, name, None)
        if unwrapped(found) is not found:
            return  # compiled as a whole, its modules are called without their hooks
    if group.is_list:
        for number, module in enumerate(found or ()):
            if isinstance(module, nn.Module):
                yield Part(f"{group.path}.{number}", module, unwrapped(module))
    elif isinstance(found, nn.Module):
        yield Part(group.path, found, _without_parts(found, group.path))


def _without_parts(module: nn.Module, path: str) -> nn.Module:
    """A module with the same tensors and children, without those that are parts themselves."""
    inside = {group.path.removeprefix(f"{path}.") for group in GROUPS if group.path.startswith(f"{path}.")}
    if not inside:
        return module
    rest = nn.Module()
    rest._parameters, rest._buffers = module._parameters, module._buffers
    rest._modules = {name: child for name, child in module._modules.items() if name not in inside}
    return rest


@contextlib.contextmanager
def moves_disabled(modules: Iterable[nn.Module]) -> Iterator[None]:
    """A context in which `to` and the like do nothing to modules, called on them or on a module around them."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(_replaced(module, "_apply", functools.partial(_unmoved, id(module), module)))
        yield


def _unmoved(key: int, module: nn.Module, function: Callable[..., Any], recurse: bool = True) -> nn.Module:  # noqa: FBT001, FBT002
    if id(module) != key:  # a deep copy that was made inside the context
        return type(module)._apply(module, function, recurse)
    return module


@contextlib.contextmanager
def hidden(outer: nn.Module, parts: Sequence[Part]) -> Iterator[None]:
    """A context in which `outer.named_parameters` leaves out the modules beside the blocks: when a run starts, the
    wrapper moves to the device whatever has no "block" in its name.

    Args:
        outer: The transformer, or the module that torch.compile made of it.
        parts: The modules that are swapped.
    """
    outside = tuple(f"{part.name}." for part in parts if part.is_beside)
    original = outer.named_parameters

    def named_parameters(*arguments: Any, **keywords: Any) -> Iterator[tuple[str, nn.Parameter]]:
        named = original(*arguments, **keywords)
        return ((name, one) for name, one in named if not name.replace("_orig_mod.", "").startswith(outside))

    with _replaced(outer, "named_parameters", named_parameters) if outside else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def loaded_to_host(modules: Sequence[object], transformer: nn.Module) -> Iterator[None]:
    """A context in which the wrapper's loader puts the weights of the modules beside the blocks on the host, as it does
    with blocks that are to be swapped, and not on the device.

    Args:
        modules: Those that hold the function PUT.
        transformer: The model that is loaded.
    """
    outside = (*(f"{part.name}." for part in parts_of(transformer) if part.is_beside), *LOADED_WITH_BLOCKS)

    def put(function: Callable[..., Any], module: Any, name: str, *further: Any, **keywords: Any) -> Any:
        if module is transformer and name.startswith(outside) and "device" in keywords:
            keywords["device"] = transformer.offload_device
        return function(module, name, *further, **keywords)

    with contextlib.ExitStack() as stack:
        for holder in modules:
            stack.enter_context(_replaced(holder, PUT, functools.partial(put, vars(holder)[PUT])))
        yield


@contextlib.contextmanager
def _replaced(holder: object, name: str, value: object) -> Iterator[None]:
    """A context in which an object's own attribute has another value."""
    own = vars(holder)
    missing = name not in own
    before = own.get(name)
    try:
        own[name] = value
        yield
    finally:
        if missing:
            own.pop(name, None)
        else:
            own[name] = before


def offload(parts: Sequence[Part], device: torch.device) -> None:
    """Moves what is on a GPU of the parts to the host: of a GGUF file, the wrapper's loader puts the tensors before the
    first block on the device, and Stand-In's layers are there from the time that they were added.
    """
    for part in parts:
        if any(tensor.device.type not in ("cpu", "meta") for tensor in part.weights.parameters()):
            part.weights.to(device)
