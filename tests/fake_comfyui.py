"""The parts of ComfyUI that the nodes use, with the stand-in wrapper loaded in it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import standin
import torch
import wanvideo_enhanced_blockswap as package
from standin import Workflow
from wanvideo_enhanced_blockswap import nodes as node_module
from wanvideo_enhanced_blockswap.comfyui import ComfyUI

HPU = torch.device("hpu:0")


@contextlib.contextmanager
def faked(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[SimpleNamespace]:
    """A process of it, in which nothing of ours has happened yet; its files are in `folder`."""
    flags = SimpleNamespace(gpu_only=False, highvram=False, novram=False, disable_pinned_memory=False)
    flags.disable_async_offload, flags.reserve_vram = False, None
    management = SimpleNamespace(get_torch_device=lambda: HPU, current_loaded_models=[])
    modules: dict[str, dict[str, Any]] = {
        "nodes": {"NODE_CLASS_MAPPINGS": dict(standin.NODE_CLASS_MAPPINGS)},
        "comfy": {"__path__": []},
        "comfy.model_management": vars(management),
        "comfy.cli_args": {"args": flags},
        "server": {"PromptServer": SimpleNamespace(instance=None)},
        "folder_paths": {
            "get_user_directory": lambda: str(folder / "user"),
            "get_temp_directory": lambda: str(folder / "temp"),
        },
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
    monkeypatch.setattr(node_module, "COMFYUI", ComfyUI())
    yield SimpleNamespace(
        flags=flags,
        set_device=lambda device: vars(sys.modules["comfy.model_management"]).update(get_torch_device=lambda: device),
        classes=sys.modules["nodes"].NODE_CLASS_MAPPINGS,
        temp=folder / "temp",
        settings=folder / "user" / "default" / "comfy.settings.json",
    )
    if node_module.COMFYUI.gate is not None:
        node_module.COMFYUI.gate.restore()


def watched_by_a_browser() -> list[dict[str, Any]]:
    """A list that gets what the browser that has queued the prompt is sent."""
    sent: list[dict[str, Any]] = []
    texts: list[tuple[str, str, str]] = []

    def send_sync(event: str, data: dict[str, Any], sid: str) -> None:
        assert (event, sid) == ("wanvideo_enhanced_blockswap.progress", "a browser")
        sent.append(data)

    def send_progress_text(text: str, node: str, sid: str) -> None:
        texts.append((text, node, sid))
        assert texts[-1] == (sent[-1]["text"].replace("\n", " \n"), sent[-1]["node"], "a browser")

    item = (0, "a prompt", {}, {"extra_pnginfo": {"workflow": {"id": "a workflow"}}}, [])
    sys.modules["server"].PromptServer.instance = SimpleNamespace(
        client_id="a browser",
        send_sync=send_sync,
        send_progress_text=send_progress_text,
        prompt_queue=SimpleNamespace(currently_running={0: item}),
    )
    return sent


def sampled(arguments: dict[str, object] | None, variant: str = "fp32") -> tuple[Workflow, torch.Tensor]:
    """A workflow whose loader has these arguments, and the latents of its first run."""
    workflow = Workflow(variant, device=HPU)
    workflow.load(arguments)
    return workflow, workflow.sample()


def ours(**widgets: Any) -> dict[str, object]:
    """What our node, whose id is 3, gives for three blocks."""
    inputs = {"unique_id": "3", "auto_hardware_tuning": False, "blocks_to_swap": 3} | widgets
    (arguments,) = package.NODE_CLASS_MAPPINGS["WanVideoEnhancedBlockSwap"]().setargs(**inputs)
    assert arguments is not None
    return arguments


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log has warned of."""
    return [record.message for record in caplog.records if record.levelname == "WARNING"]
