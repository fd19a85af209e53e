"""The ways in which users run the wrapper, as cases for comfy_process.py, and the nodes that swap blocks."""

from __future__ import annotations

from typing import Any

BLOCKS, VACE_BLOCKS = 30, 15
"""Of every tiny model, and of one with VACE besides."""

Case = dict[str, Any]


def ours(blocks: int | None, **widgets: Any) -> Case:
    """Our node with a count of blocks (VACE blocks in proportion), or None for automatic tuning."""
    manual = {} if blocks is None else {"blocks_to_swap": blocks, "vace_blocks_to_swap": blocks * VACE_BLOCKS // BLOCKS}
    inputs = {"auto_hardware_tuning": blocks is None, **manual, **widgets}
    return {"node": "WanVideoEnhancedBlockSwap", "inputs": inputs}


def native(blocks: int = BLOCKS, prefetch: int = 0) -> Case:
    """The wrapper's own node; all blocks by default."""
    inputs = {
        "blocks_to_swap": blocks,
        "vace_blocks_to_swap": VACE_BLOCKS,
        "offload_img_emb": False,
        "offload_txt_emb": False,
        "use_non_blocking": False,
        "prefetch_blocks": prefetch,
        "block_swap_debug": False,
    }
    return {"node": "WanVideoBlockSwap", "inputs": inputs}


def _case(model: str, **further: Any) -> Case:
    """A case from a file, inputs of the loader and the sampler by their names, and keys of the case."""
    load = {name: further.pop(name) for name in LOADER_INPUTS & further.keys()}
    sample = {name: further.pop(name) for name in SAMPLER_INPUTS & further.keys()}
    return {"load": {"model": model, **load}, "sample": sample, **further}


LOADER_INPUTS = {
    *("base_precision", "quantization", "load_device", "extra_model", "compile_args", "vram_management_args"),
    *("multitalk_model", "fantasytalking_model", "fantasyportrait_model"),
}
SAMPLER_INPUTS = {"steps", "cfg", "shift", "force_offload"}

BF16, FP8, SCALED, GGUF = "bf16.safetensors", "fp8.safetensors", "fp8_scaled.safetensors", "q8_0.gguf"
SCALED_FP8 = {"quantization": "fp8_e4m3fn_scaled"}

_MERGED = {"lora": "lora.safetensors", "strength": 0.8, "merge_loras": True}
_UNMERGED = _MERGED | {"merge_loras": False}
_LARGE = _UNMERGED | {"lora": "large_lora.safetensors"}


def several(strengths: dict[str, float], *, merge: bool) -> list[Case]:
    """LoRAs with these names and strengths, one behind the other."""
    return [{"lora": f"{name}.safetensors", "strength": s, "merge_loras": merge} for name, s in strengths.items()]


FOUR = {"lora": 0.8, "large_lora": -0.4, "fp16_lora": 1.2, "large_fp32_lora": 0.3}
"""LoRAs on one model and their strengths: small and large ones, in the model's type and in others."""
OF_VACE = {"vace_lora": 0.7, "large_vace_lora": -0.5, "lora": 0.8}
"""Of VACE blocks, and one of the others."""
_MERGED_4, _UNMERGED_4 = several(FOUR, merge=True), several(FOUR, merge=False)
_VACE_LORAS = {"lora": several(OF_VACE, merge=False), "vace": True, "cfg": 1.0}
_SCHEDULE = [0.2, 0.9]
"""Strengths by step."""

_WINDOWS = {
    "node": "WanVideoContextOptions",
    "inputs": {
        "context_schedule": "uniform_standard",
        "context_frames": 9,
        "context_stride": 4,
        "context_overlap": 4,
        "freenoise": True,
        "verbose": False,
    },
}
_SKIPPED_LAYERS = {
    "node": "WanVideoSLG",
    "inputs": {"blocks": "3,10,20", "start_percent": 0.0, "end_percent": 1.0},
}
SLG_SKIPS = 3
"""Blocks that each unconditional forward leaves out."""

_LATE = {"start_step": 1, "end_step": -1, "cache_device": "offload_device"}
_TEACACHE = {
    "node": "WanVideoTeaCache",
    "inputs": {**_LATE, "rel_l1_thresh": 0.9, "use_coefficients": False, "mode": "e"},
}
_MAGCACHE = {"node": "WanVideoMagCache", "inputs": {**_LATE, "magcache_thresh": 0.3, "magcache_K": 2}}
_EASYCACHE = {"node": "WanVideoEasyCache", "inputs": {**_LATE, "easycache_thresh": 0.9}}

COMPILED = {
    "backend": "aot_eager",
    "fullgraph": False,
    "mode": "default",
    "dynamic": False,
    "dynamo_cache_size_limit": 64,
    "dynamo_recompile_limit": 128,
    "compile_transformer_blocks_only": True,
    "force_parameter_static_shapes": True,
    "allow_unmerged_lora_compile": False,
}

VARIANTS: dict[str, Case] = {
    "bf16": _case(BF16),
    "fp16": _case(BF16, base_precision="fp16", steps=1),
    "fp32": _case(BF16, base_precision="fp32", cfg=1.0),
    "fp8": _case(FP8, quantization="fp8_e4m3fn", cfg=1.0),
    "fp8_at_load": _case(BF16, quantization="fp8_e4m3fn", cfg=1.0),
    "fp8_scaled": _case(SCALED, **SCALED_FP8, cfg=1.0),
    "gguf": _case(GGUF, cfg=1.0),
    "lora_merged": _case(BF16, lora=_MERGED, cfg=1.0),
    "lora_unmerged": _case(BF16, lora=_UNMERGED),
    "lora_unmerged_large": _case(BF16, lora=_LARGE, cfg=1.0),
    "lora_set": _case(BF16, lora=_UNMERGED, lora_at="set", cfg=1.0),
    "lora_fp8_scaled": _case(SCALED, **SCALED_FP8, lora=_UNMERGED, cfg=1.0),
    "lora_gguf": _case(GGUF, lora=_UNMERGED, cfg=1.0),
    "lora_scheduled": _case(BF16, lora=_LARGE | {"strength": _SCHEDULE}, lora_at="set", cfg=1.0),
    "loras_merged": _case(BF16, lora=_MERGED_4, cfg=1.0),
    "loras_merged_slowly": _case(BF16, lora=[_MERGED_4[0] | {"low_mem_load": True}, *_MERGED_4[1:]], cfg=1.0),
    "loras_unmerged": _case(BF16, lora=_UNMERGED_4, cfg=1.0),
    "loras_set": _case(BF16, lora=_UNMERGED_4, lora_at="set", cfg=1.0),
    "loras_fp8_merged": _case(FP8, quantization="fp8_e4m3fn", lora=_MERGED_4, cfg=1.0),
    "loras_fp8": _case(FP8, quantization="fp8_e4m3fn", lora=_UNMERGED_4, cfg=1.0),
    "loras_fp8_scaled_merged": _case(SCALED, **SCALED_FP8, lora=_MERGED_4, cfg=1.0),
    "loras_fp8_scaled": _case(SCALED, **SCALED_FP8, lora=_UNMERGED_4, cfg=1.0),
    "loras_gguf": _case(GGUF, lora=_UNMERGED_4, cfg=1.0),
    "loras_vace": _case("vace.safetensors", **_VACE_LORAS),
    "loras_vace_merged": _case("vace.safetensors", **_VACE_LORAS | {"lora": several(OF_VACE, merge=True)}),
    "loras_vace_fp8_scaled": _case("vace_fp8_scaled.safetensors", **SCALED_FP8, **_VACE_LORAS),
    "loras_vace_gguf": _case("vace_q8_0.gguf", **_VACE_LORAS),
    "vace": _case("vace.safetensors", vace=True),
    "vace_module": _case(BF16, extra_model="vace_module.safetensors", vace=True, cfg=1.0),
    "vace_fp8_scaled": _case("vace_fp8_scaled.safetensors", **SCALED_FP8, vace=True, cfg=1.0),
    "vace_gguf": _case("vace_q8_0.gguf", vace=True, cfg=1.0),
    "context_windows": _case(BF16, nodes={"context_options": _WINDOWS}, size={"num_frames": 17}, cfg=1.0),
    "two_experts": _case(BF16, second="low_noise.safetensors"),
    "two_experts_fp8_scaled": _case(SCALED, **SCALED_FP8, second="low_noise_fp8_scaled.safetensors"),
    "compiled": _case(BF16, compile_args=COMPILED, cfg=1.0),
    "compiled_lora_unmerged": _case(BF16, compile_args=COMPILED, lora=_UNMERGED, cfg=1.0),
    "stays": _case(BF16, force_offload=False, cfg=1.0),
    "stays_gguf": _case(GGUF, force_offload=False, cfg=1.0),
    "main_device": _case(BF16, load_device="main_device", cfg=1.0),
    "set_block_swap": _case(BF16, swap_at="set", cfg=1.0),
    "skipped_layers": _case(BF16, nodes={"slg_args": _SKIPPED_LAYERS}),
    "teacache": _case(BF16, nodes={"cache_args": _TEACACHE}, steps=4, shift=50.0, cfg=1.0),
    "magcache": _case(BF16, nodes={"cache_args": _MAGCACHE}, steps=4, cfg=1.0),
    "easycache": _case(BF16, nodes={"cache_args": _EASYCACHE}, steps=4, cfg=1.0),
    "one_forward_a_step": _case(BF16, cfg=1.0),
    "forcing": _case(BF16, sampler="WanVideoDiffusionForcingSampler", cfg=1.0),
}
"""By name. Four forwards, or two (with cfg=1.0) where that shows as much: the whole is to take minutes."""

REMOVED_FROM = ("bf16", "stays", "stays_gguf", "lora_unmerged", "gguf", "vace")
"""Those from which the node is taken away."""

_MULTITALK = {"node": "MultiTalkModelLoader", "inputs": {"model": "multitalk.safetensors"}}
_FANTASYTALKING = {
    "node": "FantasyTalkingModelLoader",
    "inputs": {"model": "fantasytalking.safetensors", "base_precision": "bf16"},
}
_FANTASYPORTRAIT = {
    "node": "FantasyPortraitModelLoader",
    "inputs": {"model": "fantasyportrait.safetensors", "base_precision": "bf16"},
}

_STAND_IN = {"lora": "stand_in.safetensors", "strength": 1.0, "merge_loras": True}
_WINDOWED = {"nodes": {"context_options": _WINDOWS}, "size": {"num_frames": 17}}

FAMILIES: dict[str, Case] = {
    "s2v": _case("s2v.safetensors", family="s2v"),
    "one_to_all": _case("one_to_all.safetensors", base_precision="fp16", family="one_to_all"),
    "uni3c_offload": _case(BF16, family="uni3c_offload", cfg=1.0),
    "uni3c_stay": _case(BF16, family="uni3c_stay", cfg=1.0),
    "animate": _case("animate.safetensors", family="animate", cfg=1.0),
    "controlnet": _case(BF16, family="controlnet", cfg=1.0),
    "ovi": _case("ovi.safetensors", family="ovi"),
    "multitalk": _case(BF16, family="multitalk", multitalk_model=_MULTITALK, cfg=1.0),
    "fantasytalking": _case(BF16, family="fantasytalking", fantasytalking_model=_FANTASYTALKING, cfg=1.0),
    "fantasyportrait": _case(BF16, family="fantasyportrait", fantasyportrait_model=_FANTASYPORTRAIT, cfg=1.0),
    "lynx": _case(BF16, family="lynx", extra_model="lynx.safetensors"),
    "recammaster": _case("recammaster.safetensors", family="recammaster", cfg=1.0),
    "humo": _case("humo.safetensors", family="humo", size={"num_frames": 17}, cfg=1.0),
    "scail": _case("scail.safetensors", family="scail", cfg=1.0),
    "longvie2": _case("longvie2.safetensors", family="longvie2", cfg=1.0),
    "phantom": _case(BF16, family="phantom", size={"num_frames": 9}),
    "mocha": _case(BF16, base_precision="fp16", family="mocha", cfg=1.0),
    "s2v_windows": _case("s2v.safetensors", family="s2v", **_WINDOWED, cfg=1.0),
    "s2v_framepack": _case("s2v.safetensors", family="s2v_framepack", size={"num_frames": 17}, cfg=1.0),
    "skyreels_v3": _case("skyreels_v3.safetensors", family="multitalk", cfg=1.0),
    "steadydancer": _case("steadydancer.safetensors", family="steadydancer", cfg=1.0),
    "flashvsr": _case("flashvsr.safetensors", family="flashvsr", cfg=1.0),
    "fun_control": _case("fun_control.safetensors", family="fun_control", cfg=1.0),
    "fun_camera": _case("fun_camera.safetensors", family="fun_camera", cfg=1.0),
    "minimax_remover": _case("minimax_remover.safetensors", family="minimax_remover", cfg=1.0),
    # In fp32, since the wrapper gives its motion tokens the type of the latents.
    "mtv": _case("mtv.safetensors", base_precision="fp32", family="mtv", cfg=1.0),
    "longcat_avatar": _case("longcat_avatar.safetensors", family="longcat_avatar", cfg=1.0),
    "control_lora": _case(BF16, lora=_MERGED | {"lora": "control_lora.safetensors"}, family="control_lora", cfg=1.0),
    "stand_in": _case(BF16, lora=_STAND_IN, family="stand_in", cfg=1.0),
    "stand_in_unmerged": _case(BF16, lora=_STAND_IN | {"merge_loras": False}, family="stand_in", cfg=1.0),
}
"""Of the families that only the wrapper runs. `family` is what the sampler gets: one of family_inputs.FAMILIES."""

BLOCKS_OF = dict.fromkeys(FAMILIES, BLOCKS) | {"longcat_avatar": 3}
"""Blocks of a family's model."""

PARTS: dict[str, tuple[str, ...]] = {
    "s2v": ("audio_injector.injector.", "audio_injector.injector_adain_layers.", "casual_audio_encoder."),
    "one_to_all": ("controlnet.blocks.9.", "refextractor.blocks.8.", "image_to_cond.", "input_hint_block."),
    "animate": ("motion_encoder.", "blocks.25.fuser_block.", "pose_patch_embedding."),
    "ovi": ("audio_model.blocks.5.", "blocks.29.cross_attn.k_fusion."),
    "multitalk": ("blocks.29.audio_cross_attn.", "multitalk_audio_proj."),
    "fantasytalking": ("blocks.29.cross_attn.k_proj.",),
    "fantasyportrait": ("blocks.29.cross_attn.ip_adapter_single_stream_",),
    "lynx": ("blocks.29.self_attn.ref_adapter.", "blocks.29.cross_attn.ip_adapter."),
    "recammaster": ("blocks.29.projector.", "blocks.29.cam_encoder."),
    "humo": ("blocks.29.audio_cross_attn_wrapper.", "audio_proj."),
    "scail": ("patch_embedding_pose.",),
    "longvie2": ("blocks.11.control_blocks_dense.", "blocks.11.control_blocks_sparse.", "dual_controller."),
    "s2v_windows": ("cond_encoder.",),
    "s2v_framepack": ("frame_packer.",),
    "skyreels_v3": ("blocks.29.audio_cross_attn.", "multitalk_audio_proj."),
    "steadydancer": ("condition_embedding_align.", "patch_embedding_fuse."),
    "flashvsr": ("LQ_proj_in.",),
    "fun_control": ("ref_conv.",),
    "fun_camera": ("control_adapter.",),
    "minimax_remover": ("patch_embedding.",),
    "mtv": ("blocks.28.motion_attn.",),
    "longcat_avatar": ("blocks.2.audio_cross_attn.", "blocks.2.audio_modulation.", "multitalk_audio_proj."),
}
"""What names of a family's own weights begin with, in the transformer; the others' are not in a model's file."""

BESIDE = (
    *("s2v", "s2v_windows", "s2v_framepack", "one_to_all", "uni3c_offload", "uni3c_stay", "animate", "controlnet"),
    *("ovi", "multitalk", "skyreels_v3", "humo", "longvie2", "longcat_avatar"),
)
"""Families with large weights that are in none of the blocks."""
