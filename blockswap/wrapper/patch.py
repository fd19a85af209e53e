"""Replaces functions in modules and `forward` on one object, and restores both exactly."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")

Notice = Callable[[Any, Mapping[str, Any]], "AbstractContextManager[None] | None"]
"""Called with the transformer (None if it is not among the arguments) and with all arguments by name. Returns a context
in which the function runs, or None.
"""

RunForward = Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Runs a forward; called with the module, its original function, and the arguments."""


class Watched:
    """Wraps one function of the wrapper in every module that holds it or another pack's wrapping of it.

    Args:
        name: Name of the function.
        modules: The modules that hold a callable of that name, or the class that holds a method of that name.
        before: Called before the function. If it raises, the function does not run, unless `always`.
        after: Called with the transformer after the function, also if the function raised; None for no call.
        always: Whether the function runs even if `before` raises; the error of `before` is raised afterwards.
    """

    def __init__(
        self,
        name: str,
        modules: Sequence[ModuleType | type],
        before: Notice,
        after: Callable[[Any], None] | None = None,
        *,
        always: bool = False,
    ) -> None:
        self._name = name
        self._before = before
        self._after = after
        self._always = always
        self._is_inside = False
        ours: dict[int, Callable[..., Any]] = {}
        self._held = []
        for module in modules:
            original = vars(module)[name]
            wrapped = ours.setdefault(id(original), self._wrap(original))
            setattr(module, name, wrapped)
            self._held.append((module, original, wrapped))

    @property
    def is_whole(self) -> bool:
        """Whether every module still holds our function."""
        return all(vars(module).get(self._name) is wrapped for module, _, wrapped in self._held)

    def restore(self) -> None:
        """Puts the original back in every module that still holds our function; idempotent."""
        for module, original, wrapped in self._held:
            if vars(module).get(self._name) is wrapped:
                setattr(module, self._name, original)
        self._held = []

    def _wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def watched(*arguments: Any, **keywords: Any) -> Any:
            if self._is_inside:  # another pack's wrapper calls the function of a second module, which we wrap too
                return function(*arguments, **keywords)
            bound = signature.bind_partial(*arguments, **keywords).arguments
            transformer = bound.get("transformer")
            self._is_inside = True
            try:
                try:
                    context = self._before(transformer, bound)
                except BaseException:
                    if self._always:
                        function(*arguments, **keywords)
                    raise
                with context or nullcontext():
                    return function(*arguments, **keywords)
            finally:
                self._is_inside = False
                if self._after is not None:
                    self._after(transformer)

        return watched


class Forward:
    """Our `forward`, or another method, in the attributes of one module, between the start and the end of a run.

    Other packs may keep it: once disarmed, it calls what it has replaced. It alone holds what it has replaced, so that
    both go with the module. A deep copy of the module gets the copy's own original instead.

    Args:
        module: The module.
        run: Runs a forward.
        name: The method's name.
    """

    def __init__(self, module: nn.Module, run: RunForward, name: str) -> None:
        found = vars(module).get(name)
        # None if the module itself has no such attribute, so that the method of its class counts.
        self._replaced: Any = found._replaced if isinstance(found, Forward) else found
        self._name = name
        self._module = weakref.ref(module)
        self._run: RunForward | None = run
        # Not in the class body: it imports the compiler, which is slow and sets environment variables.
        self._uncompiled = torch.compiler.disable(Forward._forward)

    @classmethod
    def on(cls, module: nn.Module, run: RunForward, name: str = "forward") -> Forward:
        """Makes a new one the method of the module."""
        forward = vars(module)[name] = cls(module, run, name)
        return forward

    def disarm(self) -> None:
        """Puts back what it has replaced, unless another pack has replaced it since; idempotent."""
        self._run = None
        module = self._module()
        if module is None or vars(module).get(self._name) is not self:
            return
        if self._replaced is None:
            del vars(module)[self._name]
        else:
            vars(module)[self._name] = self._replaced

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._uncompiled(self, *arguments, **keywords)

    def _forward(self, *arguments: Any, **keywords: Any) -> Any:
        module = self._module()
        assert module is not None, "its own attribute is being called"
        # The class's method is looked up now: another pack may have patched the class since.
        original = (
            functools.partial(getattr(type(module), self._name), module) if self._replaced is None else self._replaced
        )
        if self._run is None:
            return original(*arguments, **keywords)
        return self._run(module, original, arguments, keywords)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._module()))
        return self if copied is None else functools.partial(getattr(type(copied), self._name), copied)


class OnModels(MutableMapping[nn.Module, T]):
    """Values by model, held by the models' own attributes. A value that refers to its model, as through a block that
    another pack has hooked, goes with it; in a WeakKeyDictionary it would keep it for ever. A deep copy of a model has
    none.
    """

    def __init__(self) -> None:
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._name = f"_enhanced_blockswap_{id(self)}"

    def __getitem__(self, model: nn.Module) -> T:
        held = vars(model).get(self._name) if isinstance(model, nn.Module) else None
        if held is None or held.value is None:
            raise KeyError(model)
        value: T = held.value
        return value

    def __setitem__(self, model: nn.Module, value: T) -> None:
        vars(model)[self._name] = _Held(value)
        self._models.add(model)

    def __delitem__(self, model: nn.Module) -> None:
        self._models.discard(model)
        del vars(model)[self._name]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(list(self._models))

    def __len__(self) -> int:
        return len(self._models)


class _Held:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> tuple[type[_Held], tuple[None]]:
        """Of a copy: it holds nothing."""
        return _Held, (None,)
