"""Restores what a trial run of a module changes in Python: attributes, lists and dicts, and variables of closures."""

from __future__ import annotations

import contextlib
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import nn

MOST_OBJECTS = 100_000
"""Objects that are looked through, which takes a tenth of a second. A block of Wan 14B has some hundred."""

_HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_pre_hooks", "_backward_hooks"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
)


@contextlib.contextmanager
def restored(*roots: Any) -> Iterator[None]:
    """Inside, hooks of the modules are not called; afterwards all that can be reached from `roots` is as before.

    The values of tensors are not restored, only what they point at; nor is what is reached only by names of Python
    modules or by C code. Inside a mode of torch it would save and restore the mode's tensors: it is entered first.

    Args:
        *roots: Modules, functions, containers and objects that they refer to.

    Raises:
        RuntimeError: They refer to too many objects.
    """
    undo, modules = _saved(roots)
    try:
        for module in modules:
            vars(module).update({hooks: OrderedDict() for hooks in _HOOKS})
        yield
    finally:
        for restore in undo:
            restore()


def _saved(roots: Iterable[Any]) -> tuple[list[Callable[[], None]], list[nn.Module]]:
    undo: list[Callable[[], None]] = []
    modules: list[nn.Module] = []
    seen: dict[int, Any] = {}
    stack = list(roots)
    while stack:
        one = stack.pop()
        if id(one) in seen or isinstance(one, (str, bytes, int, float, type(None), type)):
            continue
        seen[id(one)] = one
        if len(seen) > MOST_OBJECTS:
            raise RuntimeError(f"it refers to more than {MOST_OBJECTS:,} objects")
        if isinstance(one, torch.Tensor):
            undo.append(partial(_restore_data, one, one.data))
            continue
        if isinstance(one, nn.Module):
            modules.append(one)
            for owner in filter(_is_of_a_pack, type(one).__mro__):
                shared = _shared(owner)
                undo.append(partial(_restore_attributes, owner, shared, _shared))
                stack += [value for value in shared.values() if isinstance(value, (dict, list, set))]
            seen |= {id(vars(one)[hooks]): None for hooks in _HOOKS if hooks in vars(one)}  # they refer to runs
        if isinstance(one, dict):
            undo.append(partial(_restore_dict, one, dict(one)))
            stack += one.values()
        elif isinstance(one, (list, deque)):
            undo.append(partial(_restore_list, one, list(one)))
            stack += one
        elif isinstance(one, set):
            undo.append(partial(_restore_set, one, set(one)))
        elif isinstance(one, tuple):
            stack += one
        elif isinstance(one, CellType):
            with contextlib.suppress(ValueError):  # an empty cell
                undo.append(partial(setattr, one, "cell_contents", one.cell_contents))
                stack.append(one.cell_contents)
        elif isinstance(one, MethodType):
            stack.append(one.__self__)
        elif isinstance(one, partial):
            stack += (one.func, one.args, one.keywords)
        if isinstance(one, FunctionType):
            stack += (*(one.__closure__ or ()), one.__defaults__, one.__kwdefaults__, vars(one))
        elif _is_of_a_pack(type(one)) or isinstance(one, (nn.Module, SimpleNamespace)):
            if isinstance(getattr(one, "__dict__", None), dict):
                stack.append(vars(one))
            slots = _slots(one)
            undo.append(partial(_restore_attributes, one, slots, _slots))
            stack += slots.values()
    return undo, modules


def _is_of_a_pack(owner: type) -> bool:
    """Whether the class is a pack's or a module's: not of torch or Python's library, such as a logger's."""
    return owner.__module__.partition(".")[0] not in {*sys.stdlib_module_names, "torch"}


def _shared(owner: type) -> dict[str, Any]:
    """Attributes of a class itself."""
    return {name: value for name, value in vars(owner).items() if not name.startswith("__")}


def _slots(one: Any) -> dict[str, Any]:
    """Attributes that are not in the object's dictionary."""
    found = [vars(owner).get("__slots__", ()) for owner in type(one).__mro__]
    names = [name for slots in found for name in ((slots,) if isinstance(slots, str) else slots)]
    return {name: getattr(one, name) for name in names if not name.startswith("__") and hasattr(one, name)}


def _restore_attributes(one: Any, before: dict[str, Any], present: Callable[[Any], dict[str, Any]]) -> None:
    kind, now = type if isinstance(one, type) else object, present(one)
    for added in now.keys() - before.keys():
        kind.__delattr__(one, added)
    for name, value in before.items():
        if name not in now or now[name] is not value:
            kind.__setattr__(one, name, value)


def _restore_dict(one: dict[Any, Any], before: dict[Any, Any]) -> None:
    for added in one.keys() - before.keys():
        del one[added]
    if before.keys() - one.keys():
        one.clear()  # for the order
    one.update(before)


def _restore_data(one: torch.Tensor, before: torch.Tensor) -> None:
    if one.untyped_storage()._cdata != before.untyped_storage()._cdata:
        one.data = before


def _restore_list(one: list[Any] | deque[Any], before: list[Any]) -> None:
    if len(one) == len(before) and all(now is value for now, value in zip(one, before, strict=True)):
        return
    one.clear()
    one.extend(before)


def _restore_set(one: set[Any], before: set[Any]) -> None:
    if one != before:
        one.clear()
        one.update(before)
