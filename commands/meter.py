"""Counts bytes on a real device: its own allocator's, and the copies that torch makes to it and back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(slots=True)
class Moved:
    """Bytes copied between host and device."""

    to_device: int = 0
    to_host: int = 0


class CopyCounter(TorchDispatchMode):
    """Counts every copy that torch's dispatcher makes between the host and another device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moved = Moved()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            self._count(args[1], args[0])
        elif func is torch.ops.aten._to_copy.default:
            self._count(args[0], result)
        return result

    def _count(self, source: torch.Tensor, target: torch.Tensor) -> None:
        nbytes = source.numel() * source.element_size()
        if source.device.type == "cpu" and target.device.type != "cpu":
            self.moved.to_device += nbytes
        elif source.device.type != "cpu" and target.device.type == "cpu":
            self.moved.to_host += nbytes


@dataclass(slots=True)
class DeviceMeter:
    """Reads a device's own books.

    Attributes:
        device: A device with memory of its own.
    """

    device: torch.device
    module: Any = field(init=False)

    def __post_init__(self) -> None:
        self.module = torch.get_device_module(self.device)

    @property
    def measured_by(self) -> str:
        """Who counts: `cuda`, or what another device's module calls itself."""
        return str(getattr(self.module, "measured_by", self.device.type))

    def allocated(self) -> int:
        """Bytes allocated on the device now."""
        return int(self.module.memory_allocated(self.device))

    def reset_peak(self) -> None:
        """The peak counts from here."""
        self.module.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Most bytes allocated since `reset_peak`."""
        return int(self.module.max_memory_allocated(self.device))

    @contextlib.contextmanager
    def count_copies(self) -> Iterator[Callable[[], Moved]]:
        """Counts what is copied inside: by the device itself if it keeps count, else in torch's dispatcher."""
        stats = getattr(self.module, "copy_stats", None)
        if stats is None:
            with CopyCounter() as counter:
                yield lambda: counter.moved
            return
        before = stats()

        def moved() -> Moved:
            now = stats()
            return Moved(*(int(now[key] - before[key]) for key in ("h2d_bytes", "d2h_bytes")))

        yield moved
