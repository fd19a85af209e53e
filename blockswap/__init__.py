"""The core: profile, budget, plan, and the engine that runs a model's blocks swapped."""

from .backend import Backend, backend_for
from .budget import MemoryBudget, MemoryReadings, make_budget
from .decision import HostTier, PlanRequest, SwapPlan, Timing
from .errors import (
    BlockSwapError,
    CheckpointError,
    DeviceMemoryError,
    HostMemoryError,
    PlanError,
    SettingsError,
    TransferError,
    UnsupportedModelError,
)
from .layout import BlockProfile, ModelProfile, Placement, TensorProfile
from .pages import PinBudget
from .plan import plan_swap
from .profile import blocks_of, profile_model
from .session import SessionState, SwapSession
from .settings import SwapSettings

__all__ = [
    "Backend",
    "BlockProfile",
    "BlockSwapError",
    "CheckpointError",
    "DeviceMemoryError",
    "HostMemoryError",
    "HostTier",
    "MemoryBudget",
    "MemoryReadings",
    "ModelProfile",
    "PinBudget",
    "Placement",
    "PlanError",
    "PlanRequest",
    "SessionState",
    "SettingsError",
    "SwapPlan",
    "SwapSession",
    "SwapSettings",
    "TensorProfile",
    "Timing",
    "TransferError",
    "UnsupportedModelError",
    "backend_for",
    "blocks_of",
    "make_budget",
    "plan_swap",
    "profile_model",
]
