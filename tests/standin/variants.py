"""The ways in which users run the wrapper, by name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from .checkpoints import Contents
from .request import Request


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A file, the loader's inputs, and a request.

    Attributes:
        contents: Of the file.
        precision: The loader's base_precision.
        quantization: The loader's input of that name.
        load_device: `offload_device`, or `main_device`: the state dict itself is on the device.
        lora: `merged` or `unmerged` by the loader, `set` on the loaded model, or `set_at_times`: in every second run.
        lora_strength: A number, or one a step (which the wrapper heeds for `set` alone).
        lora_seeds: One of each LoRA.
        lora_rank: Of each; 16 makes matrices that stream.
        has_stand_in: Stand-In's layers, which the wrapper puts on the device once.
        vace_in_module: VACE comes in a separate file.
        has_control_model: TheDenk's: the sampler runs it.
        has_vram_management: The loader gets vram_management_args.
        compiles: `blocks`, or `model`: as a whole.
        experts: Transformers that follow one another, each for its share of the steps.
        sampler: The node's name.
        force_offload: The sampler's input of that name.
        request: What the sampler is asked for.
    """

    contents: Contents = field(default_factory=Contents)
    precision: str = "fp32"
    quantization: str = "disabled"
    load_device: str = "offload_device"
    lora: str | None = None
    lora_strength: float | tuple[float, ...] = 0.8
    lora_seeds: tuple[int, ...] = (5,)
    lora_rank: int = 2
    has_stand_in: bool = False
    vace_in_module: bool = False
    has_control_model: bool = False
    has_vram_management: bool = False
    compiles: str | None = None
    experts: int = 1
    sampler: str = "WanVideoSampler"
    force_offload: bool = True
    request: Request = field(default_factory=Request)


def _of(storage: str = "fp32", **changes: Any) -> Variant:
    """A variant of a file stored so; `changes` are of any of the three dataclasses, each name being in one only."""
    contents = {name: changes.pop(name) for name in list(changes) if name in Contents.__dataclass_fields__}
    request = {name: changes.pop(name) for name in list(changes) if name in Request.__dataclass_fields__}
    return Variant(contents=Contents(storage=storage, **contents), request=Request(**request), **changes)


_VACE = {"vace": True, "vace_end": 1.0}
_FACE = {"face": True, "has_face": True}
_TALK = {"loop": "multitalk"}
_ANIMATE = {**_FACE, "loop": "animate"}
_FORCING = {"sampler": "WanVideoDiffusionForcingSampler"}
_FOUR = {"lora_seeds": (5, 6, 7, 8), "lora_rank": 16, "lora_strength": 0.2}
_SCHEDULED = {"lora": "set", "lora_strength": (0.2, 0.5, 0.9)}

VARIANTS: dict[str, Variant] = {
    "fp32": _of(),
    "bf16": _of("bf16", precision="bf16"),
    "fp16": _of("fp16", precision="fp16"),
    "fp8": _of("fp8"),
    "fp8_at_load": _of("bf16", precision="bf16", quantization="fp8_e4m3fn"),
    "fp8_scaled": _of("fp8_scaled"),
    "gguf": _of("gguf"),
    "main_device": _of(load_device="main_device"),
    "lora_merged": _of(lora="merged"),
    "lora_merged_main_device": _of(lora="merged", load_device="main_device"),
    "lora_unmerged": _of(lora="unmerged"),
    "lora_scheduled": _of(**_SCHEDULED),
    "lora_set": _of(lora="set"),
    "lora_set_at_times": _of(lora="set_at_times"),
    "lora_fp8_scaled": _of("fp8_scaled", lora="unmerged"),
    "stand_in": _of(has_stand_in=True),
    "stand_in_unmerged": _of(lora="unmerged", has_stand_in=True),
    "lora_gguf": _of("gguf", lora="unmerged"),
    "loras_merged": _of(lora="merged", **_FOUR),
    "loras_unmerged": _of(lora="unmerged", **_FOUR),
    "loras_set_at_times": _of(lora="set_at_times", **_FOUR),
    "loras_fp8_scaled": _of("fp8_scaled", lora="unmerged", **_FOUR),
    "loras_gguf": _of("gguf", lora="unmerged", **_FOUR),
    "loras_vace_merged": _of(lora="merged", **_FOUR, **_VACE),
    "loras_vace": _of(lora="unmerged", **_FOUR, **_VACE),
    "image": _of(image=True, has_image=True),
    "vace": _of(**_VACE),
    "vace_module": _of(**_VACE, vace_in_module=True),
    "vace_early_steps": _of(vace=True, vace_end=0.4),
    "vace_fp8_scaled": _of("fp8_scaled", **_VACE),
    "vace_gguf": _of("gguf", **_VACE),
    "vace_gguf_module": _of("gguf", **_VACE, vace_in_module=True),
    "vace_compiled": _of(**_VACE, compiles="blocks"),
    "animate": _of(**_FACE),
    "control": _of(control=True, has_control=True),
    "control_model": _of(has_control_model=True),
    "beside": _of(beside=True),
    "beside_fp8_scaled": _of("fp8_scaled", beside=True),
    "beside_gguf": _of("gguf", beside=True),
    "beside_lora_unmerged": _of(lora="unmerged", beside=True),
    "beside_main_device": _of(load_device="main_device", beside=True),
    "ovi": _of(audio=True, has_sound=True),
    "lynx": _of(has_reference=True),
    "compiled": _of(compiles="blocks"),
    "compiled_lora_scheduled": _of(**_SCHEDULED, compiles="blocks"),
    "compiled_whole": _of(compiles="model"),
    "two_experts": _of(experts=2, steps=4),
    "two_experts_fp8_scaled": _of("fp8_scaled", experts=2, steps=4),
    "context_windows": _of(context_frames=2, frames=4),
    "one_forward_a_step": _of(cfg=1.0),
    "skip_layers": _of(slg_blocks=(1, 3)),
    "teacache": _of(cache="teacache", steps=4),
    "magcache": _of(cache="magcache", steps=4),
    "easycache": _of(cache="easycache", steps=4),
    "multitalk": _of(**_TALK),
    "multitalk_kept": _of(**_TALK, offload_between=False),
    "multitalk_lora_unmerged": _of(**_TALK, lora="unmerged"),
    "multitalk_lora_merged": _of(**_TALK, lora="merged"),
    "multitalk_gguf": _of("gguf", **_TALK),
    "animate_loop": _of(**_ANIMATE),
    "animate_loop_fp8_scaled": _of("fp8_scaled", **_ANIMATE),
    "forcing": _of(**_FORCING),
    "forcing_fp8_scaled": _of("fp8_scaled", **_FORCING),
}
"""By name. The twin `…_stays` of some is without force_offload."""

for _name in ("fp32", "fp8_scaled", "gguf", "lora_merged", "compiled", "two_experts"):
    VARIANTS[f"{_name}_stays"] = replace(VARIANTS[_name], force_offload=False)
