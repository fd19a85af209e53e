"""ComfyUI's view of the package: node classes, from widgets to settings and back to text; no arithmetic."""

from __future__ import annotations

import logging
from typing import Any

from .blockswap.errors import BlockSwapError, WrapperError
from .blockswap.report_text import plan_text, summary
from .blockswap.settings import EVERY_BLOCK, SwapSettings, is_ours
from .comfyui import ComfyUI
from .hardware import HardwareUnavailableError
from .widgets import MODEL, SHAPE_WIDGETS, SWAP_WIDGETS

logger = logging.getLogger(__name__)

COMFYUI = ComfyUI()
"""Of this process. Nothing is asked of it before a node runs."""

CATEGORY = "WanVideoWrapper/Enhanced"


class WanVideoEnhancedBlockSwap:
    """Gives the arguments with which the wrapper hands its blocks over to us."""

    CATEGORY = CATEGORY
    FUNCTION = "setargs"
    RETURN_TYPES = ("BLOCKSWAPARGS",)
    RETURN_NAMES = ("block_swap_args",)
    OUTPUT_TOOLTIPS = (
        "Connect to block_swap_args of WanVideo Model Loader, or of WanVideo Set BlockSwap. Nothing else is needed.",
    )
    DESCRIPTION = (
        "Runs Wan models that are larger than the GPU: blocks that do not fit stay in host memory and stream to the "
        "GPU while it computes the ones before. The number of blocks is chosen automatically; outputs are exactly "
        "those of the unswapped model."
    )
    SEARCH_ALIASES = ("block swap", "offload", "low vram", "vram", "oom", "out of memory", "low memory")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        # Optional, so that a prompt which leaves some out gets their defaults.
        return {"required": {}, "optional": dict(SWAP_WIDGETS), "hidden": {"unique_id": "UNIQUE_ID"}}

    def setargs(self, unique_id: str | None = None, **widgets: Any) -> tuple[dict[str, object] | None]:
        settings = SwapSettings(**widgets)
        why_not = COMFYUI.why_not_swapped(settings)
        if why_not is not None:
            COMFYUI.say_off(f"WanVideo Enhanced BlockSwap passes through: {why_not}", node=unique_id)
            return (None,)
        try:
            COMFYUI.install_gate()
        except WrapperError as failure:
            COMFYUI.say_off(f"{failure}; until then the wrapper's own, slower swapping is used", node=unique_id)
            return (native_arguments(settings),)
        return (settings.to_blockswapargs(node=unique_id),)


class WanVideoBlockSwapPlan:
    """What would be swapped, before anything is sampled."""

    CATEGORY = CATEGORY
    FUNCTION = "preview"
    RETURN_TYPES = ("WANVIDEOMODEL", "BLOCKSWAPARGS", "STRING")
    RETURN_NAMES = ("model", "block_swap_args", "plan")
    OUTPUT_TOOLTIPS = ("The model, as it came.", "The arguments, as they came.", "The plan and its reasons.")
    DESCRIPTION = (
        "Place it between WanVideo Model Loader and the sampler: how many blocks would stay and how many would stream, "
        "for this model, video size and the memory that is free now."
    )
    SEARCH_ALIASES = ("block swap preview", "vram preview")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        arguments = ("BLOCKSWAPARGS", {"tooltip": "From WanVideo Enhanced BlockSwap."})
        return {"required": {"model": MODEL, "block_swap_args": arguments}, "optional": dict(SHAPE_WIDGETS)}

    def preview(
        self, model: Any, block_swap_args: Any, width: int = 832, height: int = 480, num_frames: int = 81
    ) -> tuple[Any, Any, str]:
        return model, block_swap_args, self._text(model, block_swap_args, (width, height, num_frames))

    def _text(self, model: Any, block_swap_args: Any, shape: tuple[int, int, int]) -> str:
        if not is_ours(block_swap_args):
            return "nothing is planned: the arguments are not those of WanVideo Enhanced BlockSwap"
        try:
            settings = SwapSettings.from_blockswapargs(block_swap_args)
            assert settings is not None, "is_ours has found them"
            plan, card = COMFYUI.preview(model, settings, shape)
        except (BlockSwapError, HardwareUnavailableError) as failure:
            return str(failure)
        return plan_text(plan, card=card, budget_bytes=plan.budget_bytes)


class WanVideoBlockSwapReport:
    """What came of a run, as text."""

    CATEGORY = CATEGORY
    FUNCTION = "report"
    RETURN_TYPES = ("LATENT", "STRING")
    RETURN_NAMES = ("samples", "report")
    OUTPUT_TOOLTIPS = ("The samples, as they came.", "Predicted beside measured, at most 12 lines.")
    DESCRIPTION = "Place it behind WanVideo Sampler: what was swapped, what it took and cost, beside predictions."
    SEARCH_ALIASES = ("block swap report", "vram report")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        samples = ("LATENT", {"tooltip": "The samples of WanVideo Sampler: the report is made once they are there."})
        return {"required": {"samples": samples, "model": MODEL}}

    def report(self, samples: Any, model: Any) -> tuple[Any, str]:
        gate = COMFYUI.gate
        run = None if gate is None else gate.run_of(model.model.diffusion_model)
        found = None if run is None else run.report()
        if found is None:
            return samples, "no block was swapped by WanVideo Enhanced BlockSwap; connect its node to the model"
        return samples, summary(found)


def native_arguments(settings: SwapSettings) -> dict[str, object]:
    """Arguments for the wrapper's own swapping: the user's counts, or every block where they were left to us."""
    is_auto = settings.auto_hardware_tuning
    return {
        "blocks_to_swap": EVERY_BLOCK if is_auto else settings.blocks_to_swap,
        "vace_blocks_to_swap": EVERY_BLOCK if is_auto else settings.vace_blocks_to_swap,
        "offload_txt_emb": settings.offload_txt_emb,
        "offload_img_emb": settings.offload_img_emb,
        "use_non_blocking": False,
        "prefetch_blocks": 0,
        "block_swap_debug": settings.debug_mode,
    }


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "WanVideoBlockSwapPlan": WanVideoBlockSwapPlan,
    "WanVideoBlockSwapReport": WanVideoBlockSwapReport,
    "WanVideoEnhancedBlockSwap": WanVideoEnhancedBlockSwap,
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "WanVideoBlockSwapPlan": "WanVideo BlockSwap Plan",
    "WanVideoBlockSwapReport": "WanVideo BlockSwap Report",
    "WanVideoEnhancedBlockSwap": "WanVideo Enhanced BlockSwap (CUDA Optimized)",
}
