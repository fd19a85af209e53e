"""A stand-in for ComfyUI-WanVideoWrapper: its life cycle around a small video transformer, on any device."""

from .management import InterruptProcessingException
from .model import WanModel
from .request import Request
from .variants import VARIANTS, Variant
from .workflow import NODE_CLASS_MAPPINGS, Fault, Workflow, run, swap_args

__all__ = [
    "NODE_CLASS_MAPPINGS",
    "VARIANTS",
    "Fault",
    "InterruptProcessingException",
    "Request",
    "Variant",
    "WanModel",
    "Workflow",
    "run",
    "swap_args",
]
