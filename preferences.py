"""Preferences: what the user has set in ComfyUI's settings dialog, as far as Python needs it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .blockswap.errors import SettingsError
from .hardware import GIB

MOST_GIB = 1024
"""As the dialog's own limit."""

KEEP_HOST_SLABS = "WanVideoEnhancedBlockSwap.KeepHostSlabs"
PIN_BUDGET_GIB = "WanVideoEnhancedBlockSwap.PinBudgetGiB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """The user's, each at its default where it was never touched.

    Attributes:
        keep_host_slabs: The page-locked copies are kept from one run to the next, while memory allows.
        pin_budget_bytes: Host memory that may be page-locked at most; None leaves it to the host's own figure.
    """

    keep_host_slabs: bool = True
    pin_budget_bytes: int | None = None

    @classmethod
    def read(cls, path: Path) -> Preferences:
        """From ComfyUI's file of settings; one that is not there has only defaults.

        Raises:
            SettingsError: It cannot be read, or one of our values is none that the dialog could have written.
        """
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, RecursionError) as exc:
            raise SettingsError(f"{path.name} expects ComfyUI's settings as JSON but it cannot be read: {exc}") from exc
        if not isinstance(stored, Mapping):
            raise SettingsError(f"{path.name} expects a JSON object but got {type(stored).__name__}")
        return cls(
            keep_host_slabs=_switch(stored.get(KEEP_HOST_SLABS, True)),
            pin_budget_bytes=_gib(stored.get(PIN_BUDGET_GIB, 0)),
        )


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise SettingsError(f"{KEEP_HOST_SLABS} expects true or false but got {value!r}; set it again")
    return value


def _gib(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MOST_GIB:
        raise SettingsError(f"{PIN_BUDGET_GIB} expects 0 to {MOST_GIB} GiB but got {value!r}; set it again")
    return int(value * GIB) or None
