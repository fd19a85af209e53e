"""Prompts as a browser queues them, executed by ComfyUI's own worker and caches; run by comfy_process.py only."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import comfy_cases
import execution
import server
import tiny_wan

import nodes

SECONDS = 120
"""A prompt takes a few."""


class RigText:
    """The prompt embeds of comfy_cases, as a text encoder gives them."""

    RETURN_TYPES = ("WANVIDEOTEXTEMBEDS",)
    FUNCTION = "run"
    CATEGORY = "rig"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {}}

    def run(self) -> tuple[Any]:
        return (comfy_cases.text(),)


class RigDigest:
    """Where a prompt ends: what the latents are."""

    RETURN_TYPES = ()
    FUNCTION = "run"
    CATEGORY = "rig"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"samples": ("LATENT",)}}

    def run(self, samples: dict[str, Any]) -> dict[str, Any]:
        return {"ui": {"latents": [comfy_cases.digest(samples["samples"])]}}


class Prompts:
    """One queue and its worker.

    Args:
        models: The folder of model files, which are made as they are needed.
    """

    def __init__(self, models: Path) -> None:
        import main

        self._models = models
        self._sent: list[tuple[Any, Any]] = []
        self._count = 0
        nodes.NODE_CLASS_MAPPINGS |= {"RigText": RigText, "RigDigest": RigDigest}
        instance = server.PromptServer.instance
        instance.send_sync = lambda event, data, sid=None: self._sent.append((event, data))
        self._queue = instance.prompt_queue
        threading.Thread(target=main.prompt_worker, args=(self._queue, instance), daemon=True).start()

    def run(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What came of a prompt.

        These are asked for:
            model: A file.
            seed: Of the sampler.
            swap: As in comfy_cases.Cases.run; None for none.
            workflow: The id of its workflow.
        """
        tiny_wan.make(self._models, f"diffusion_models/{asked['model']}", comfy_cases.FILES)
        self._sent.clear()
        self._count += 1
        name = str(self._count)
        extra = {"client_id": "rig", "extra_pnginfo": {"workflow": {"id": asked["workflow"]}}}
        # The last part came later.
        sensitive = [{}] if hasattr(execution, "SENSITIVE_EXTRA_DATA_KEYS") else []
        self._queue.put((self._count, name, _prompt(asked), extra, ["digest"], *sensitive))
        end = time.monotonic() + SECONDS
        while name not in self._queue.history and time.monotonic() < end:
            time.sleep(0.01)
        done = self._queue.history[name]
        events = [data for event, data in self._sent if str(event).startswith("wanvideo_enhanced_blockswap")]
        return {
            "messages": [message for message in done["status"]["messages"] if message[0] == "execution_error"],
            "latents": done["outputs"].get("digest", {}).get("latents"),
            "executed": [data["node"] for event, data in self._sent if event == "executing" and data["node"]],
            "phases": list(dict.fromkeys(event["phase"] for event in events)),
            "workflows": sorted({event["workflow"] for event in events}),
            "texts": sum(event == server.BinaryEventTypes.TEXT for event, _ in self._sent),
        }


def _prompt(asked: dict[str, Any]) -> dict[str, Any]:
    """In the format of ComfyUI's API; each node's id says what it is."""
    loading = comfy_cases.LOADING | {"model": asked["model"]}
    links = {"model": ["loader", 0], "text_embeds": ["text", 0], "image_embeds": ["image", 0]}
    prompt = {
        "loader": {"class_type": "WanVideoModelLoader", "inputs": loading},
        "text": {"class_type": "RigText", "inputs": {}},
        "image": {"class_type": "WanVideoEmptyEmbeds", "inputs": comfy_cases.SIZE},
        "sampler": {
            "class_type": "WanVideoSampler",
            "inputs": comfy_cases.SAMPLING | comfy_cases.PLAIN | {"seed": asked["seed"]} | links,
        },
        "digest": {"class_type": "RigDigest", "inputs": {"samples": ["sampler", 0]}},
    }
    if asked["swap"] is not None:
        prompt["swap"] = {"class_type": asked["swap"]["node"], "inputs": asked["swap"]["inputs"]}
        loading["block_swap_args"] = ["swap", 0]
    return prompt
