"""The nodes as ComfyUI sees them: their widgets, their classes, and their texts for when nothing is swapped."""

from __future__ import annotations

import logging
from typing import Any

from .blockswap.errors import BlockSwapError, WrapperError, WrapperMissingError
from .blockswap.run.text import plan_text, summary
from .blockswap.settings import EVERY_BLOCK, NODE_KEY, RANGES, SwapSettings, is_ours
from .blockswap.wrapper.wiring import arguments_of, is_theirs, why_not_the_wrappers
from .comfyui import ComfyUI
from .hardware import HardwareUnavailableError

logger = logging.getLogger(__name__)

COMFYUI = ComfyUI()
"""The ComfyUI of this process, which is not read before it has loaded every pack."""

CATEGORY = "WanVideoWrapper/Enhanced"

NOT_FOLLOWED = (
    "the model here has another node's block_swap_args, with which the wrapper swaps by itself: this plan is followed "
    "only if WanVideo Set BlockSwap gives it ours after this node"
)
"""Added to a plan for a model that has other arguments."""

Widget = tuple[str, dict[str, Any]]
"""ComfyUI's type of an input, and its options."""

DEFAULTS = SwapSettings()


def _widget(name: str, tooltip: str, *, step: float = 1, advanced: bool = False) -> tuple[str, Widget]:
    """A widget of the swap node: type and default come from SwapSettings, the range from RANGES."""
    default = getattr(DEFAULTS, name)
    options: dict[str, Any] = {"default": default}
    if isinstance(default, bool):
        kind = "BOOLEAN"
    else:
        kind, number = ("INT", int) if isinstance(default, int) else ("FLOAT", float)
        options |= {"min": number(RANGES[name].lowest), "max": number(RANGES[name].highest), "step": step}
    options |= {"tooltip": tooltip} | ({"advanced": True} if advanced else {})
    return name, (kind, options)


_WIDGETS = (
    _widget(
        "blocks_to_swap",
        "How many blocks of the model stay in RAM and stream to the GPU. Read only when auto_hardware_tuning is "
        "off. Wan 14B has 40 blocks, 1.3B and 5B have 30; a larger number is cut, and the plan says so.",
    ),
    _widget(
        "enable_cuda_optimization",
        "On: the GPU computes while blocks are copied (NVIDIA and AMD). Off: copying and computing take turns, "
        "which is slower and only useful to look for faults.",
        advanced=True,
    ),
    _widget(
        "enable_dram_optimization",
        "On: RAM with streaming blocks is locked, that is fixed in place, so that copies are fast. Off: ordinary "
        "RAM; try it if locked RAM causes trouble on your system.",
        advanced=True,
    ),
    _widget(
        "auto_hardware_tuning",
        "On (recommended): how many blocks stream follows from the VRAM that is free, the speed of copies and your "
        "GPU. Off: blocks_to_swap, vace_blocks_to_swap, num_cuda_streams and bandwidth_target are used.",
    ),
    _widget(
        "vram_threshold_percent",
        "How much of the card may be in use once the weights are in place, in percent. What other programs use "
        "counts; the rest is for the computation. Raise it to keep more blocks on the GPU, lower it if VRAM runs "
        "out.",
        step=5.0,
    ),
    _widget(
        "num_cuda_streams",
        "Copy streams that share each transfer. Read only when auto_hardware_tuning is off.",
        advanced=True,
    ),
    _widget(
        "bandwidth_target",
        "Share of the available VRAM that the model's blocks may fill. Read only when auto_hardware_tuning is off.",
        step=0.05,
        advanced=True,
    ),
    *(
        _widget(name, f"Move the {kind} embedding layers to RAM after use. Saves little.", advanced=True)
        for name, kind in (("offload_txt_emb", "text"), ("offload_img_emb", "image"))
    ),
    _widget(
        "vace_blocks_to_swap",
        "How many VACE blocks (a VACE 14B model has 8, 1.3B has 15) stay in RAM and stream. Read only when "
        "auto_hardware_tuning is off.",
        advanced=True,
    ),
    _widget(
        "debug_mode",
        "Log the configuration and the times of each block, check each copy of weights against its source (slow), "
        "and write a trace file for ui.perfetto.dev into ComfyUI's temp folder.",
        advanced=True,
    ),
)

SWAP_WIDGETS: dict[str, Widget] = dict(_WIDGETS)
"""Widgets of the swap node by input name. Saved workflows store values by position: new ones go to the end."""

MODEL = (
    "WANVIDEOMODEL",
    {
        "tooltip": "The model from WanVideo Model Loader or a node after it. A native MODEL does not fit: ComfyUI "
        "offloads its own Wan models by itself."
    },
)

SHAPE_WIDGETS: dict[str, Widget] = {
    name: ("INT", {"default": default, "min": lowest, "max": highest, "step": step, "tooltip": tooltip})
    for name, default, lowest, highest, step, tooltip in (
        ("width", 832, 64, 8192, 16, "Width of the video in pixels."),
        ("height", 480, 64, 8192, 16, "Height of the video in pixels."),
        ("num_frames", 81, 1, 10001, 4, "Frames of the video: 4 n + 1."),
    )
}
"""Widgets of the plan node beside its connections."""


class WanVideoEnhancedBlockSwap:
    """Makes the arguments with which the wrapper leaves its blocks to us."""

    CATEGORY = CATEGORY
    FUNCTION = "setargs"
    RETURN_TYPES = ("BLOCKSWAPARGS",)
    RETURN_NAMES = ("block_swap_args",)
    OUTPUT_TOOLTIPS = (
        "Connect to block_swap_args of WanVideo Model Loader, or of WanVideo Set BlockSwap. Nothing else is needed.",
    )
    DESCRIPTION = (
        "Runs Wan models that are larger than the GPU's memory: blocks that do not fit stay in RAM and stream to "
        "the GPU while it computes the ones before. The number of blocks is chosen automatically; outputs are "
        "exactly those of the whole model. For models of WanVideo Model Loader: ComfyUI offloads its own native Wan "
        "models (MODEL) by itself."
    )
    SEARCH_ALIASES = (
        "vram",
        "low vram",
        "oom",
        "out of memory",
        "wan low memory",
        "block swap",
        "swap",
        "offload",
        "8 GB",
        "12 GB",
        "16 GB",
        # In Chinese: VRAM, too little VRAM, VRAM bursts, low VRAM, RAM, block swap.
        "\u663e\u5b58",
        "\u663e\u5b58\u4e0d\u8db3",
        "\u7206\u663e\u5b58",
        "\u4f4e\u663e\u5b58",
        "\u5185\u5b58",
        "\u5757\u4ea4\u6362",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        # Optional, so that a prompt which leaves some out gets their defaults.
        return {"required": {}, "optional": dict(SWAP_WIDGETS), "hidden": {"unique_id": "UNIQUE_ID"}}

    def setargs(self, unique_id: str | None = None, **widgets: Any) -> tuple[dict[str, object] | None]:
        settings = SwapSettings(**widgets)
        why_not = COMFYUI.why_not_swapped(settings)
        if why_not is not None:
            COMFYUI.report_off(f"WanVideo Enhanced BlockSwap passes through: {why_not}", node=unique_id)
            return (None,)
        try:
            COMFYUI.install_gate()
        except WrapperError as failure:
            is_missing = isinstance(failure, WrapperMissingError)
            meanwhile = "" if is_missing else f"; until then {_native_swapping(settings)}"
            COMFYUI.report_off(f"{failure}{meanwhile}", node=unique_id)
            return (native_arguments(settings, node=unique_id),)
        return (settings.to_blockswapargs(node=unique_id),)


class WanVideoEnhancedBlockSwapPlan:
    """Shows what would be swapped, before anything is sampled."""

    CATEGORY = CATEGORY
    FUNCTION = "preview"
    OUTPUT_NODE = True  # so that the node gets its text to show
    RETURN_TYPES = ("WANVIDEOMODEL", "BLOCKSWAPARGS", "STRING")
    RETURN_NAMES = ("model", "block_swap_args", "plan")
    OUTPUT_TOOLTIPS = ("The model, as it came.", "The arguments, as they came.", "The plan and its reasons.")
    DESCRIPTION = (
        "Place it between WanVideo Model Loader and the sampler: how many blocks would stay and how many would stream, "
        "for this model, video size and the memory that is free now."
    )
    SEARCH_ALIASES = ("block swap preview",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        arguments = ("BLOCKSWAPARGS", {"tooltip": "From WanVideo Enhanced BlockSwap."})
        # Optional: without it, as behind a bypassed swap node, the text says what is missing.
        return {"required": {"model": MODEL}, "optional": {"block_swap_args": arguments, **SHAPE_WIDGETS}}

    def preview(
        self, model: Any, block_swap_args: Any = None, width: int = 832, height: int = 480, num_frames: int = 81
    ) -> dict[str, Any]:
        text = self._text(model, block_swap_args, (width, height, num_frames))
        return {"ui": {"text": [text]}, "result": (model, block_swap_args, text)}

    def _text(self, model: Any, block_swap_args: Any, shape: tuple[int, int, int]) -> str:
        why_not = why_not_the_wrappers(model)
        try:
            if why_not is not None or not is_ours(block_swap_args):
                return f"nothing is planned: {why_not or _why_not_ours(block_swap_args)}"
            settings = SwapSettings.from_blockswapargs(block_swap_args)
            assert settings is not None, "is_ours is true"
            plan, card = COMFYUI.preview(model, settings, shape)
        except (BlockSwapError, HardwareUnavailableError) as failure:
            return str(failure)
        text = plan_text(plan, card=card, details=settings.debug_mode)
        return f"{text}\n- {NOT_FOLLOWED}" if is_theirs(arguments_of(model)) else text


class WanVideoEnhancedBlockSwapReport:
    """Shows the report of a run."""

    CATEGORY = CATEGORY
    FUNCTION = "report"
    OUTPUT_NODE = True  # as above
    RETURN_TYPES = ("LATENT", "STRING")
    RETURN_NAMES = ("samples", "report")
    OUTPUT_TOOLTIPS = ("The samples, as they came.", "Predicted beside measured, at most 12 lines.")
    DESCRIPTION = "Place it behind WanVideo Sampler: what was swapped, what it took and cost, beside predictions."
    SEARCH_ALIASES = ("block swap report",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        samples = ("LATENT", {"tooltip": "The samples of WanVideo Sampler: the report is made once they are there."})
        return {"required": {"samples": samples, "model": MODEL}}

    def report(self, samples: Any, model: Any) -> dict[str, Any]:
        text = self._text(model)
        return {"ui": {"text": [text]}, "result": (samples, text)}

    def _text(self, model: Any) -> str:
        why_not, gate = why_not_the_wrappers(model), COMFYUI.gate
        if why_not is None and gate is not None:
            run = gate.run_of(model.model.diffusion_model)
            report = None if run is None else run.report()
            if run is not None and report is not None:
                return summary(report, details=run.planner.settings.debug_mode)
        try:
            why_not = why_not or _why_not_ours(arguments_of(model))
        except HardwareUnavailableError as failure:
            why_not = str(failure)
        return f"no block was swapped by WanVideo Enhanced BlockSwap: {why_not}"


def _why_not_ours(arguments: Any) -> str:
    """Why we swap nothing for a model with these BLOCKSWAPARGS."""
    if arguments is None:
        # Our node gives None if device or flags rule out the defaults; a manual blocks_to_swap may still work.
        why_not = COMFYUI.why_not_swapped(SwapSettings())
        if why_not is None:
            return "no arguments are connected; connect those of WanVideo Enhanced BlockSwap"
        return f"this device runs without swapping: {why_not}"
    if is_ours(arguments):
        return "no step has run with its arguments; connect the model that goes into the sampler"
    if is_theirs(arguments):
        return "the block_swap_args are another node's; connect those of WanVideo Enhanced BlockSwap in their place"
    return "the wrapper's own swapping is used; the log says why"


def _native_swapping(settings: SwapSettings) -> str:
    """What the wrapper does with `native_arguments`, as a clause."""
    if settings.auto_hardware_tuning:
        return "the wrapper's own, slower swapping is used, with every block"
    if not settings.blocks_to_swap:
        return "nothing is swapped, since blocks_to_swap is 0"
    return f"the wrapper's own, slower swapping is used, with blocks_to_swap = {settings.blocks_to_swap}"


def native_arguments(settings: SwapSettings, *, node: str | None) -> dict[str, object]:
    """Arguments for the wrapper's own swapping: the user's counts, or every block with automatic tuning."""
    is_auto = settings.auto_hardware_tuning
    return {
        "blocks_to_swap": EVERY_BLOCK if is_auto else settings.blocks_to_swap,
        "vace_blocks_to_swap": EVERY_BLOCK if is_auto else settings.vace_blocks_to_swap,
        "offload_txt_emb": settings.offload_txt_emb,
        "offload_img_emb": settings.offload_img_emb,
        "use_non_blocking": False,
        "prefetch_blocks": 0,
        "block_swap_debug": settings.debug_mode,
        NODE_KEY: node,
    }


class WanVideoBlockSwapPlan(WanVideoEnhancedBlockSwapPlan):
    """Its former name, for saved workflows; a search does not list it."""

    DEPRECATED = True


class WanVideoBlockSwapReport(WanVideoEnhancedBlockSwapReport):
    """As above."""

    DEPRECATED = True


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "WanVideoEnhancedBlockSwap": WanVideoEnhancedBlockSwap,
    "WanVideoEnhancedBlockSwapPlan": WanVideoEnhancedBlockSwapPlan,
    "WanVideoEnhancedBlockSwapReport": WanVideoEnhancedBlockSwapReport,
    "WanVideoBlockSwapPlan": WanVideoBlockSwapPlan,
    "WanVideoBlockSwapReport": WanVideoBlockSwapReport,
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "WanVideoEnhancedBlockSwap": "WanVideo Enhanced BlockSwap (CUDA Optimized)",
    "WanVideoEnhancedBlockSwapPlan": "WanVideo Enhanced BlockSwap Plan",
    "WanVideoEnhancedBlockSwapReport": "WanVideo Enhanced BlockSwap Report",
    "WanVideoBlockSwapPlan": "WanVideo Enhanced BlockSwap Plan",
    "WanVideoBlockSwapReport": "WanVideo Enhanced BlockSwap Report",
}
