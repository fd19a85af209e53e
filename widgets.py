"""What the nodes show: widgets with their ranges, defaults and tooltips, in the order that saved workflows store."""

from __future__ import annotations

from typing import Any

from .blockswap.settings import RANGES, SwapSettings

Widget = tuple[str, dict[str, Any]]

_DEFAULTS = SwapSettings()

SWAP_WIDGETS: dict[str, Widget] = {}
"""Widgets of the swap node by input name. Saved workflows store values by position: new ones go to the end."""


def _whole(name: str, tooltip: str, *, advanced: bool = False) -> None:
    bounds = {"min": int(RANGES[name].lowest), "max": int(RANGES[name].highest), "step": 1}
    SWAP_WIDGETS[name] = ("INT", {"default": getattr(_DEFAULTS, name), **bounds, **_said(tooltip, advanced=advanced)})


def _share(name: str, tooltip: str, *, step: float, advanced: bool = False) -> None:
    bounds = {"min": RANGES[name].lowest, "max": RANGES[name].highest, "step": step}
    SWAP_WIDGETS[name] = ("FLOAT", {"default": getattr(_DEFAULTS, name), **bounds, **_said(tooltip, advanced=advanced)})


def _switch(name: str, tooltip: str, *, advanced: bool = False) -> None:
    SWAP_WIDGETS[name] = ("BOOLEAN", {"default": getattr(_DEFAULTS, name), **_said(tooltip, advanced=advanced)})


def _said(tooltip: str, *, advanced: bool) -> dict[str, Any]:
    return {"tooltip": tooltip, "advanced": True} if advanced else {"tooltip": tooltip}


_whole(
    "blocks_to_swap",
    "How many transformer blocks live in host memory and stream to the GPU. Read only when auto_hardware_tuning is "
    "off. Wan 14B has 40 blocks, 1.3B and 5B have 30; a larger number is cut, and said in the log.",
)
_switch(
    "enable_cuda_optimization",
    "On: copies run on streams of their own, beside the computation (NVIDIA and AMD). Off: each copy waits its turn, "
    "which is slower and only useful to look for faults.",
    advanced=True,
)
_switch(
    "enable_dram_optimization",
    "On: streamed weights are page-locked in host memory, at their exact size, so that copies overlap computation. "
    "Off: ordinary memory; try it if page-locking causes trouble on your system.",
    advanced=True,
)
_switch(
    "auto_hardware_tuning",
    "On (recommended): the number of swapped blocks, the streams and the share of VRAM follow from the memory that is "
    "free, the measured link and your GPU. Off: blocks_to_swap, "
    "vace_blocks_to_swap, num_cuda_streams and bandwidth_target are used.",
)
_share(
    "vram_threshold_percent",
    "Ceiling on the whole card's use, in percent, once the weights are in place. What other programs use counts; the "
    "rest is for activations. Raise it to keep more blocks on the GPU, lower it if VRAM overflows.",
    step=5.0,
)
_whole(
    "num_cuda_streams",
    "Copy streams that share each transfer. Read only when auto_hardware_tuning is off.",
    advanced=True,
)
_share(
    "bandwidth_target",
    "Share of the available VRAM that block weights and the streaming window may fill. Read only when "
    "auto_hardware_tuning is off.",
    step=0.05,
    advanced=True,
)
_switch("offload_txt_emb", "Move the text embedding layers to host memory after use. Saves little.", advanced=True)
_switch("offload_img_emb", "Move the image embedding layers to host memory after use. Saves little.", advanced=True)
_whole(
    "vace_blocks_to_swap",
    "How many VACE blocks (a VACE 14B model has 8, 1.3B has 15) live in host memory. Read only when "
    "auto_hardware_tuning is off.",
    advanced=True,
)
_switch(
    "debug_mode",
    "Log the configuration and the times of each block, check each copy of weights against its source (slow), and "
    "write a trace file for ui.perfetto.dev into ComfyUI's temp folder.",
    advanced=True,
)

MODEL = (
    "WANVIDEOMODEL",
    {
        "tooltip": "The model from WanVideo Model Loader or a node after it. A native MODEL does not fit: ComfyUI "
        "offloads its own Wan models by itself."
    },
)

SHAPE_WIDGETS: dict[str, Widget] = {
    "width": ("INT", {"default": 832, "min": 64, "max": 8192, "step": 16, "tooltip": "Width of the video in pixels."}),
    "height": (
        "INT",
        {"default": 480, "min": 64, "max": 8192, "step": 16, "tooltip": "Height of the video in pixels."},
    ),
    "num_frames": (
        "INT",
        {"default": 81, "min": 1, "max": 10001, "step": 4, "tooltip": "Frames of the video: 4 n + 1."},
    ),
}
"""Widgets of the plan node beside its connections."""
