"""The core: profile, budget, plan, and the engine that runs a model's blocks swapped."""

from .architecture import WanArchitecture, activation_bytes
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
from .experience import Workload
from .forwards import EVERY_FORWARD
from .layout import BlockProfile, ModelProfile, Placement, TensorProfile
from .machine import Machine, TorchMachine
from .pages import PinBudget
from .plan import plan_swap
from .planner import Limits
from .planning import Facts, make_plan
from .profile import blocks_of, profile_model
from .report import RunReport
from .report_text import summary
from .run import SwapRun
from .session import SwapSession
from .settings import SwapSettings
from .state import SessionState

__all__ = [
    "EVERY_FORWARD",
    "Backend",
    "BlockProfile",
    "BlockSwapError",
    "CheckpointError",
    "DeviceMemoryError",
    "Facts",
    "HostMemoryError",
    "HostTier",
    "Limits",
    "Machine",
    "MemoryBudget",
    "MemoryReadings",
    "ModelProfile",
    "PinBudget",
    "Placement",
    "PlanError",
    "PlanRequest",
    "RunReport",
    "SessionState",
    "SettingsError",
    "SwapPlan",
    "SwapRun",
    "SwapSession",
    "SwapSettings",
    "TensorProfile",
    "Timing",
    "TorchMachine",
    "TransferError",
    "UnsupportedModelError",
    "WanArchitecture",
    "Workload",
    "activation_bytes",
    "backend_for",
    "blocks_of",
    "make_budget",
    "make_plan",
    "plan_swap",
    "profile_model",
    "summary",
]
