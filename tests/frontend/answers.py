"""The answers of a ComfyUI with this package and the wrapper to its front end."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import wanvideo_enhanced_blockswap as package

ROOT = Path(__file__).parents[2]
FOLDER = "WanVideo_Enhanced-BlockSwap-main"
"""What our folder in custom_nodes is called: the front end, and our own modules, must do with any name."""

OBJECT_INFO = ROOT / "tests" / "object_info"
RECORDED = {"core.json": "nodes", "wrapper.json": "custom_nodes.ComfyUI-WanVideoWrapper"}
EXAMPLES = ROOT / "example_workflows"
WEB = ROOT / package.WEB_DIRECTORY
LOCALES = ROOT / "locales"

FEATURES = {
    "supports_preview_metadata": True,
    "supports_model_type_tags": True,
    "max_upload_size": 100 << 20,
    "extension": {"manager": {"supports_v4": True}},
    "node_replacements": True,
    "assets": False,
}

SYSTEM_STATS = {
    "system": {
        "os": "linux",
        "ram_total": 64 << 30,
        "ram_free": 48 << 30,
        "comfyui_version": "0.33.0",
        "required_frontend_version": "1.49.6",
        "python_version": "3.11.0",
        "pytorch_version": "2.13.0",
        "embedded_python": False,
        "argv": ["main.py"],
    },
    "devices": [],
}


def object_info() -> dict[str, Any]:
    """Each node's definition: recorded ones with what `object_info/record.py` left out, and ours as they are now."""
    nodes: dict[str, Any] = {}
    for file, module in RECORDED.items():
        recorded = json.loads((OBJECT_INFO / file).read_text(encoding="utf-8"))["nodes"]
        missing = {"description": "", "python_module": module, "category": "recorded", "is_input_list": False}
        nodes |= {name: missing | node for name, node in recorded.items()}
    return nodes | {name: definition(name) for name in package.NODE_CLASS_MAPPINGS}


def definition(name: str) -> dict[str, Any]:
    """One of our nodes as ComfyUI 0.33 describes it."""
    node: Any = package.NODE_CLASS_MAPPINGS[name]
    inputs = node.INPUT_TYPES()
    return {
        "input": inputs,
        "input_order": {group: list(members) for group, members in inputs.items()},
        "is_input_list": getattr(node, "INPUT_IS_LIST", False),
        "output": node.RETURN_TYPES,
        "output_is_list": getattr(node, "OUTPUT_IS_LIST", [False] * len(node.RETURN_TYPES)),
        "output_name": getattr(node, "RETURN_NAMES", node.RETURN_TYPES),
        "output_tooltips": getattr(node, "OUTPUT_TOOLTIPS", ()),
        "name": name,
        "display_name": package.NODE_DISPLAY_NAME_MAPPINGS[name],
        "description": getattr(node, "DESCRIPTION", ""),
        "python_module": f"custom_nodes.{FOLDER}",
        "category": node.CATEGORY,
        "output_node": getattr(node, "OUTPUT_NODE", False),
        "has_intermediate_output": getattr(node, "HAS_INTERMEDIATE_OUTPUT", False),
        "search_aliases": getattr(node, "SEARCH_ALIASES", []),
        **({"deprecated": True} if getattr(node, "DEPRECATED", False) else {}),
    }


def translations() -> dict[str, Any]:
    """The texts of locales/ by language: the entries of main.json, and one entry for each of the other files."""
    languages: dict[str, Any] = {}
    for folder in sorted(LOCALES.iterdir()):
        texts = json.loads(main.read_bytes()) if (main := folder / "main.json").exists() else {}
        others = [folder / f"{name}.json" for name in ("nodeDefs", "commands", "settings")]
        languages[folder.name] = texts | {file.stem: json.loads(file.read_bytes()) for file in others if file.exists()}
    return languages


def model_folders() -> dict[str, list[str]]:
    """The models folders with the files that the examples name."""
    folders: dict[str, set[str]] = {}
    for path in EXAMPLES.glob("*.json"):
        for node in json.loads(path.read_bytes())["nodes"]:
            for model in node["properties"].get("models", ()):
                folders.setdefault(model["directory"], set()).add(model["name"])
    return {folder: sorted(names) for folder, names in folders.items()}


def grey_image() -> bytes:
    """What the input folder holds: a small PNG."""
    width, height = 32, 18
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = (b"\0" + b"\x80" * width) * height
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
