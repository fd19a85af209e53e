"""One case: nodes are called as ComfyUI calls them, and what they cost is measured; run by comfy_process.py only."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy_watch
import family_inputs
import tiny_families
import tiny_wan
import torch
from call_arguments import arguments_compared
from comfy_loading import DEVICE, MEMORY

import nodes

TEXT_TOKENS = {"prompt_embeds": 12, "negative_prompt_embeds": 8}

SIZE = {"width": 64, "height": 64, "num_frames": 5}

LOADING = {"base_precision": "bf16", "quantization": "disabled", "load_device": "offload_device"}
"""Inputs of the loader, unless the case says otherwise."""

SAMPLING = {
    "steps": 2,
    "cfg": 4.0,
    "shift": 5.0,
    "seed": 42,
    "force_offload": True,
    "scheduler": "euler",
    "rope_function": "comfy",
}
"""Inputs of both samplers, unless the case says otherwise."""

PLAIN = {"riflex_freq_index": 0, "batched_cfg": False}
FORCING = {"addnoise_condition": 10, "fps": 24.0}
"""Inputs of one sampler only."""


FILES = tiny_wan.FILES | tiny_families.FILES


def outputs(name: str, **inputs: Any) -> tuple[Any, ...]:
    """The outputs of a node that is registered under this name."""
    node = nodes.NODE_CLASS_MAPPINGS[name]()
    found = getattr(node, node.FUNCTION)(**inputs)
    return found["result"] if isinstance(found, dict) else found  # a node that shows something gives both


def call(name: str, **inputs: Any) -> Any:
    """The first output of a node."""
    return outputs(name, **inputs)[0]


class Cases:
    """Runs cases in one process.

    Attributes:
        models: The folder of model files, which are made as they are needed.
    """

    def __init__(self, models: Path) -> None:
        self.models = models
        self._loaded: dict[str, Any] = {}

    def run(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """What came of a case; of one that fails, `error` has the exception's type and text.

        A case has these keys, all but the first optional:
            load: Inputs of WanVideoModelLoader; `extra_model` is a file, and what is a node loads a file, too.
            second: A file: the second expert, which takes over after the first step.
            lora: Inputs of WanVideoLoraSelect, or of several, one behind the other.
            lora_at: "loader", or "set": through WanVideoSetLoRAs.
            swap: `{"node": name, "inputs": {…}}`: the node that gives BLOCKSWAPARGS.
            swap_at: "loader", or "set": through WanVideoSetBlockSwap.
            also: Such a node for the other place: both have arguments then.
            cached: Loaded models of the case before are used again, where their inputs are the same.
            vace: The sampler gets a VACE context.
            family: The sampler gets what this one of family_inputs.FAMILIES adds.
            left_out: It gets nothing of that.
            changed: Weights whose names begin so have other values than in the file.
            size: Of the video: width, height, num_frames.
            sampler: Its node.
            sample: Inputs of the sampler.
            nodes: Nodes that give further inputs of the sampler.
            limit_bytes: Memory of the device.
            memory: `host_peaks` has the most host memory from loading to the end, which is given up before.
            pin_bytes: The most that the package may page-lock.
            link_gbps: Speed of the pretend CUDA runtime's link; 0 is no limit. Forwards are timed then.
            fault: See comfy_watch.watched.
            mover: Another pack moves weights meanwhile, see comfy_watch.MOVERS; `warnings` has those of the engine.
            arguments: `kept_arguments` has, of each forward of the first model, whether it left its arguments alone.
            texts: What the package's other two nodes say: `plan_text` before sampling, `report_text` after it.
        """
        MEMORY.set_memory_limit(case.get("limit_bytes"))
        if "link_gbps" in case:
            MEMORY.set_link_speed(case["link_gbps"])
        try:
            with torch.inference_mode(), comfy_watch.pin_budget(case.get("pin_bytes")):
                if not case.get("memory"):
                    return self._run(case)
                self._loaded.clear()
                with comfy_watch.HostPeaks() as host:
                    found = self._run(case)
                return found | {"host_peaks": host.peaks}
        finally:
            MEMORY.set_memory_limit(None)

    def _run(self, case: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        models: list[Any] = []
        began, used = time.perf_counter(), time.process_time()
        try:
            models += self._models_of(case)
            if "changed" in case:
                _change(models[0], case["changed"])
            found["load_s"] = time.perf_counter() - began
            if case.get("texts"):
                found["plan_text"] = _plan_text(case, models[-1])
            watched = comfy_watch.watched(_transformers(models), case.get("fault"), is_timed="link_gbps" in case)
            moved = comfy_watch.moved(_transformers(models), case.get("mover"))
            with watched as seen, moved as found["warnings"], _compared(case, models) as kept:
                samples = self._sample_all(case, models)
            found["kept_arguments"] = kept
            found["latents"] = digest(samples["samples"] if "samples" in samples else samples["video"])
            if case.get("texts"):
                found["report_text"] = outputs("WanVideoEnhancedBlockSwapReport", samples=samples, model=models[-1])[-1]
        except BaseException as failure:  # noqa: BLE001 - an interrupt is one; ComfyUI catches it at this very place
            found["error"] = f"{type(failure).__name__}: {failure}"
        found |= {"total_s": time.perf_counter() - began, "cpu_s": time.process_time() - used}
        return found | (seen if "load_s" in found else {}) | comfy_watch.standing(_transformers(models))

    def _sample_all(self, case: Mapping[str, Any], models: list[Any]) -> dict[str, Any]:
        """What the last of the models leaves; each takes one step, and the last one the rest."""
        if len(models) == 1:
            return self._sample(case, models[0])
        samples: dict[str, Any] = {}
        for index, model in enumerate(models):
            end = index + 1 if model is not models[-1] else -1
            earlier = {"samples": samples} if samples else {}
            samples = self._sample(case, model, **earlier, start_step=index, end_step=end)
        return samples

    def _models_of(self, case: Mapping[str, Any]) -> list[Any]:
        """What goes into the samplers."""
        swap_args, other_args = _output_of(case.get("swap")), _output_of(case.get("also"))
        loras = self._loras(case.get("lora"))
        inputs: dict[str, Any] = LOADING | case["load"]
        is_set = loras is not None and case.get("lora_at") == "set"
        by_loader = case.get("swap_at", "loader") == "loader"
        at_loader, at_set = (swap_args, other_args) if by_loader else (other_args, swap_args)
        inputs |= {"lora": loras} if loras is not None and not is_set else {}
        inputs |= {"block_swap_args": at_loader} if at_loader is not None else {}
        loaded = self._load([inputs | {"model": file} for file in _files(case)], again=not case.get("cached"))
        if is_set:
            loaded = [call("WanVideoSetLoRAs", model=model, lora=loras) for model in loaded]
        if not by_loader or at_set is not None:
            loaded = [call("WanVideoSetBlockSwap", model=model, block_swap_args=at_set) for model in loaded]
        return loaded

    def _loras(self, selected: Any) -> Any:
        """The output of the last WanVideoLoraSelect; None without one."""
        loras = None
        for inputs in [selected] if isinstance(selected, dict) else selected or ():
            self._make(f"loras/{inputs['lora']}")
            loras = call("WanVideoLoraSelect", unique_id=None, prev_lora=loras, **inputs)
        return loras

    def _load(self, wanted: Sequence[dict[str, Any]], *, again: bool) -> list[Any]:
        """The loader's outputs for these inputs. As in ComfyUI, what this case does not use is dropped first."""
        keys = [json.dumps(inputs, sort_keys=True) for inputs in wanted]
        self._loaded = {key: model for key, model in self._loaded.items() if key in keys and not again}
        gc.collect()
        for key, inputs in zip(keys, wanted, strict=True):
            if key not in self._loaded:
                self._make(f"diffusion_models/{inputs['model']}")
                for name, value in inputs.items():
                    if isinstance(value, dict) and "node" in value:
                        self._make(f"diffusion_models/{value['inputs']['model']}")
                        inputs |= {name: _output_of(value)}
                if "extra_model" in inputs:
                    self._make(f"diffusion_models/{inputs['extra_model']}")
                    inputs |= {"extra_model": call("WanVideoExtraModelSelect", extra_model=inputs["extra_model"])}
                self._loaded[key] = call("WanVideoModelLoader", **inputs)
        return [self._loaded[key] for key in keys]

    def _make(self, name: str) -> None:
        tiny_wan.make(self.models, name, FILES)

    def _sample(self, case: Mapping[str, Any], model: Any, **part: Any) -> Any:
        name = case.get("sampler", "WanVideoSampler")
        size = SIZE | case.get("size", {})
        own = FORCING if name == "WanVideoDiffusionForcingSampler" else PLAIN
        inputs: dict[str, Any] = SAMPLING | own | part | case.get("sample", {})
        inputs["text_embeds"] = text()
        inputs["image_embeds"] = _vace_context(**size) if case.get("vace") else call("WanVideoEmptyEmbeds", **size)
        inputs |= {"model": model} | {key: _output_of(node) for key, node in case.get("nodes", {}).items()}
        if "family" in case and not case.get("left_out"):
            inputs |= family_inputs.FAMILIES[case["family"]](inputs)
        return call(name, **inputs)


def _compared(case: Mapping[str, Any], models: list[Any]) -> contextlib.AbstractContextManager[list[bool] | None]:
    if not case.get("arguments"):
        return contextlib.nullcontext()
    return arguments_compared(_transformers(models)[0])


def _change(model: Any, prefix: str) -> None:
    """In the weights that the sampler gives to the transformer."""
    weights = model.model["sd"]
    names = [name for name in weights if name.startswith(prefix)]
    assert names, f"no weight's name begins with {prefix}"
    weights.update({name: weights[name].roll(1, dims=0) for name in names})


def _plan_text(case: Mapping[str, Any], model: Any) -> str:
    size = SIZE | case.get("size", {})
    return outputs("WanVideoEnhancedBlockSwapPlan", model=model, block_swap_args=_output_of(case["swap"]), **size)[-1]


def _output_of(node: Mapping[str, Any] | None) -> Any:
    return None if node is None else call(node["node"], **node["inputs"])


def _files(case: Mapping[str, Any]) -> list[str]:
    return [case["load"]["model"], *([case["second"]] if "second" in case else [])]


def _transformers(models: list[Any]) -> list[Any]:
    return [model.model.diffusion_model for model in models]


def text() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    drawn = {
        name: [(torch.randn(tokens, tiny_wan.TEXT_WIDTH, generator=generator) * 0.3).bfloat16().to(DEVICE)]
        for name, tokens in TEXT_TOKENS.items()
    }
    return drawn | {"echoshot": False}


def _vace_context(width: int, height: int, num_frames: int) -> dict[str, Any]:
    """What WanVideoVACEEncode gives, of random latents instead of a video's."""
    shape = (num_frames - 1) // 4 + 1, height // 8, width // 8
    generator = torch.Generator().manual_seed(3)
    return {
        "vace_context": [torch.randn(tiny_wan.VACE_CHANNELS, *shape, generator=generator).to(DEVICE)],
        "vace_scale": 1.0,
        "has_ref": False,
        "num_frames": num_frames,
        "target_shape": (tiny_wan.CHANNELS, *shape),
        "vace_start_percent": 0.0,
        "vace_end_percent": 1.0,
        "vace_seq_len": math.prod(shape) // 4,
        "additional_vace_inputs": [],
    }


def digest(latents: torch.Tensor) -> str:
    whole = latents.detach().cpu().contiguous()
    assert whole.isfinite().all(), "the latents are not finite"
    return hashlib.sha256(whole.view(torch.uint8).numpy().tobytes()).hexdigest()
