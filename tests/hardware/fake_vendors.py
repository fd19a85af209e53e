"""Vendor bindings made of a table of answers, some of which are exceptions."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

UUID = "11111111-2222-3333-4444-555555555555"
ADDRESS = "0000:01:00.0"


class NVMLError(Exception):
    """The base of what the binding raises."""


class NVMLError_NotFound(NVMLError):  # noqa: N801, N818 - the binding's name
    """No such device."""


class NVMLError_NotSupported(NVMLError):  # noqa: N801, N818 - the binding's name
    """The device cannot answer."""


class NVMLError_FunctionNotFound(NVMLError):  # noqa: N801, N818 - the binding's name
    """The driver lacks the function."""


class NVMLError_NoPermission(NVMLError):  # noqa: N801, N818 - the binding's name
    """The handle may not be asked, as that of a GPU in MIG mode."""


NVML_ERRORS = (
    NVMLError,
    NVMLError_NotFound,
    NVMLError_NotSupported,
    NVMLError_FunctionNotFound,
    NVMLError_NoPermission,
)


class AmdSmiException(Exception):  # noqa: N818 - the binding's name
    """The base of what amdsmi raises."""


def fake_module(name: str, answers: dict[str, Any]) -> ModuleType:
    """A module whose functions give the answers of a table: raised, looked up by the last argument, or returned."""
    module = ModuleType(name)
    module.calls = []  # type: ignore[attr-defined]

    def answering(function: str, answer: Any) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            module.calls.append((function, *arguments))  # type: ignore[attr-defined]
            found = answer.get(arguments[-1], NVMLError_NotFound()) if isinstance(answer, Lookup) else answer
            if isinstance(found, BaseException):
                raise found
            return found

        return call

    for function, answer in answers.items():
        setattr(module, function, answer if isinstance(answer, type) else answering(function, answer))
    return module


class Lookup(dict):  # type: ignore[type-arg]
    """Answers by the last argument of the call."""
