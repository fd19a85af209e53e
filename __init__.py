"""WanVideo Enhanced BlockSwap: Wan video models that are larger than the GPU."""

from .nodes import COMFYUI, NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]

WEB_DIRECTORY = "./web"

COMFYUI.check_at_start("WanVideoEnhancedBlockSwap", NODE_CLASS_MAPPINGS["WanVideoEnhancedBlockSwap"])
