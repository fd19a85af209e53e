"""Finds ComfyUI-WanVideoWrapper and its renamed copies among the loaded packs, by what their modules are."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..errors import WrapperError, WrapperMissingError
from .parts import PUT

LOAD, START, END = "load_weights", "init_blockswap", "offload_transformer"
"""Functions that the wrapper calls to load the weights of a run, to start the run, and to end it."""

SET = "loadmodel"
"""Method of the wrapper's node that gives a loaded model new arguments."""

PARAMETERS = {
    LOAD: ("transformer", "block_swap_args"),
    START: ("transformer", "block_swap_args", "model"),
    END: ("transformer",),
}
"""Parameters that each function must have."""

SETTING = {"self", "model", "block_swap_args"}
"""Parameters of the method SET; the loader's method of that name has more."""

SOURCE_PHRASES = {
    "forward": ("enumerate(self.blocks)", "self.blocks_to_swap > 0"),
    "forward_vace": ("before_proj", "block.forward(", "after_proj", "self.vace_blocks_to_swap > 0"),
}
"""What the source of the model's methods must contain, where the wrapper swaps and this package does instead."""

MANAGES = {"block_swap_args", "vram_management_args"}
"""Parameters of the loader's method SET with which a user can ask for two that move the same weights."""

LOADER = "loader"
"""Among the holders: the node classes whose method SET has these parameters."""

MODEL = "WanModel"
"""Class of the wrapper's transformers, which the module of LOAD holds."""

NODE = "WanVideoModelLoader"
"""Node in the module of LOAD, by which a wrapper without that function is known."""


@dataclass(frozen=True, slots=True)
class Wrapper:
    """The loaded wrapper, with every renamed copy that can be swapped in.

    Attributes:
        packages: Name of the package of each.
        holders: For LOAD, START, END and PUT: the modules that hold the function, or another pack's wrapping of it. For
            SET and LOADER: the node classes with the method; a wrapper may have none.
        refused: Of each copy that cannot be swapped in, one sentence with its folder and the reason.
    """

    packages: Sequence[str]
    holders: Mapping[str, Sequence[ModuleType | type]]
    refused: Sequence[str] = ()


def find_wrapper(node_classes: Mapping[str, type]) -> Wrapper:
    """Finds the wrapper, and packs that are copies of it, and checks each.

    Args:
        node_classes: ComfyUI's NODE_CLASS_MAPPINGS. They show which packs are loaded; their names do not count.

    Raises:
        WrapperMissingError: None is loaded.
        WrapperError: Each lacks something that this package relies on; the message names all of it.
    """
    holders: dict[str, list[ModuleType | type]] = {name: [] for name in (*PARAMETERS, PUT, SET, LOADER)}
    packages, refused = [], []
    for loader in _loaders(node_classes):
        package = loader.__name__.rpartition(".")[0]
        inside = [module for name, module in list(sys.modules.items()) if name.startswith(f"{package}.") and module]
        missing = _missing(loader, inside)
        if missing:
            refused.append(f"{_called(package)} has changed, or is too old: {_not_as_expected(missing)}")
            continue
        packages.append(package)
        for name in PARAMETERS:
            holders[name] += [module for module in inside if callable(vars(module).get(name))]
        holders[PUT] += [loader] if callable(vars(loader).get(PUT)) else []
        classes = {one for one in node_classes.values() if one.__module__.startswith(f"{package}.")}
        methods = {one: set(_parameters(vars(one).get(SET))) for one in classes}
        holders[SET] += [one for one, names in methods.items() if names == SETTING]
        holders[LOADER] += [one for one, names in methods.items() if names >= MANAGES]
    if not packages and refused:
        raise WrapperError(f"{refused[0]}; update it and WanVideo Enhanced BlockSwap")
    if not packages:
        raise WrapperMissingError(
            "ComfyUI-WanVideoWrapper is not loaded: no pack has its loader, and without it WanVideo Enhanced BlockSwap "
            "swaps nothing; install it through ComfyUI Manager, or look in ComfyUI's log for why its import failed"
        )
    return Wrapper(packages, holders, refused)


def _loaders(node_classes: Mapping[str, type]) -> list[ModuleType]:
    """The module of each pack that loads the weights. Others hold the function, too; its own says where it is from."""
    found = {}
    for name, node in node_classes.items():
        module = sys.modules.get(node.__module__)
        if module is None:
            continue
        defined_in = getattr(vars(module).get(LOAD), "__module__", None)
        if defined_in == module.__name__ or name == NODE:
            found[module.__name__] = module
    return list(found.values())


def _called(package: str) -> str:
    """A pack's folder; ComfyUI writes dots in its path so that it can be the name of a module."""
    return package.replace("\\", "/").rpartition("/")[2].replace("_x_", ".")


def _missing(loader: ModuleType, inside: Sequence[ModuleType]) -> list[str]:
    missing = []
    for name, parameters in PARAMETERS.items():
        functions = [vars(module)[name] for module in inside if callable(vars(module).get(name))]
        if not functions or (name == LOAD and not callable(vars(loader).get(name))):
            missing.append(name)
        known = [_parameters(function) for function in functions]
        missing += [f"{name}({one}=…)" for one in parameters if not all(one in names for names in known)]
    model = getattr(loader, MODEL, None)
    if model is None:
        return [*missing, MODEL]
    for method, phrases in SOURCE_PHRASES.items():
        try:
            source = inspect.getsource(getattr(model, method))
        except (AttributeError, OSError, TypeError):
            missing.append(f"the source of {MODEL}.{method}")
            continue
        missing += [f"{phrase!r} in {MODEL}.{method}" for phrase in phrases if phrase not in source]
    return missing


def _not_as_expected(missing: Sequence[str]) -> str:
    return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not as expected"


def _parameters(function: Callable[..., Any] | None) -> Sequence[str]:
    try:
        return list(inspect.signature(function).parameters) if function is not None else []
    except (TypeError, ValueError):
        return []
