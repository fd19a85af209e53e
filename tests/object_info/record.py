"""Records the answer of a ComfyUI's /object_info for the nodes that the examples use, without what tests do not need.

    python tests/object_info/record.py http://127.0.0.1:8188 VERSION_OF_THE_WRAPPER ITS_COMMIT

The server needs ComfyUI-WanVideoWrapper, and in its models folders files with the names that the examples' `models`
entries have; empty ones will do, since only their names are listed. Its input folder needs example.png.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from urllib.request import urlopen

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "example_workflows"
WRAPPER = "custom_nodes.ComfyUI-WanVideoWrapper"
KEPT = ("name", "display_name", "input", "input_order", "output", "output_name", "output_is_list", "output_node")


def ask(address: str) -> Any:
    with urlopen(address) as answer:
        return json.load(answer)


def trimmed(value: Any) -> Any:
    """The same without tooltips, at any depth: dynamic combos contain inputs."""
    if isinstance(value, dict):
        return {key: trimmed(inner) for key, inner in value.items() if key != "tooltip"}
    return [trimmed(inner) for inner in value] if isinstance(value, list) else value


def write(file: str, nodes: dict[str, Any], **origin: str) -> None:
    recorded = {**origin, "nodes": {name: trimmed({key: nodes[name][key] for key in KEPT}) for name in sorted(nodes)}}
    (HERE / file).write_text(json.dumps(recorded, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(server: str, version: str, commit: str) -> None:
    used = {node["type"] for path in EXAMPLES.glob("*.json") for node in json.loads(path.read_bytes())["nodes"]}
    nodes = {name: node for name, node in ask(f"{server}/object_info").items() if name in used}
    of_wrapper = {name: node for name, node in nodes.items() if node["python_module"] == WRAPPER}
    of_core = {name: node for name, node in nodes.items() if not node["python_module"].startswith("custom_nodes.")}
    core_version = ask(f"{server}/system_stats")["system"]["comfyui_version"]
    write("wrapper.json", of_wrapper, package="ComfyUI-WanVideoWrapper", version=version, commit=commit)
    write("core.json", of_core, package="comfy-core", version=core_version)


if __name__ == "__main__":
    main(*sys.argv[1:])
