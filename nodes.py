"""ComfyUI's view of the package: the node classes it offers. None yet; the engine is driven from the command line."""

from __future__ import annotations

NODE_CLASS_MAPPINGS: dict[str, type] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}
