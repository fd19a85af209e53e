"""Runs a model's blocks swapped: what the example of docs/python.md uses."""

from ..hardware.pinning import PinBudget
from .device.backend import backend_for
from .model.profile import blocks_of
from .run.history import Workload
from .run.machine import TorchMachine
from .run.run import SwapRun
from .settings import SwapSettings

__all__ = [
    "PinBudget",
    "SwapRun",
    "SwapSettings",
    "TorchMachine",
    "Workload",
    "backend_for",
    "blocks_of",
]
