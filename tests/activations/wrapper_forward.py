"""Measures forwards of the real wrapper's WanModel on fake tensors; run by test_wrapper_forward.py in the rig's python.

    python tests/activations/wrapper_forward.py COMFYUI_DIR [NAME …] > tests/activations/measured.json

Weights, sizes and dtypes are as the wrapper's loader and sampler make them (load_weights in nodes_model_loading.py,
predict_with_cfg in nodes_sampler.py), with 2 blocks: a block leaves behind the residual stream only. With -v, standard
error shows what is alive at each peak.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cases import CASES, SIDE, SIZES, Case
from storages import Storages, flash_sdpa, let_fakes_be_on_cuda
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

WRAPPER = "ComfyUI-WanVideoWrapper"
CUDA = torch.device("cuda", 0)
FP8 = torch.float8_e4m3fn
KEPT = (
    "norm",
    "bias",
    "time_in",
    "patch_embedding",
    "time_",
    "img_emb",
    "modulation",
    "text_embedding",
    "adapter",
    "add",
)
"""Of params_to_keep in nodes_model_loading.py: parts of the names whose weights stay in the compute dtype."""


def load_wrapper(comfyui: Path) -> str:
    """Loads the wrapper as ComfyUI does at its start; the name of its package."""
    sys.path.insert(0, str(comfyui))
    sys.argv = ["main.py", "--disable-api-nodes", "--cpu", "--base-directory", tempfile.mkdtemp()]
    import comfy.options

    comfy.options.enable_args_parsing()
    import server

    import nodes

    server.PromptServer(asyncio.new_event_loop())
    if not asyncio.run(nodes.load_custom_node(str(comfyui / "custom_nodes" / WRAPPER))):
        raise RuntimeError("ComfyUI could not load the wrapper")
    return str(nodes.NODE_CLASS_MAPPINGS["WanVideoSampler"].__module__).rpartition(".")[0]


class Forward:
    """A forward of one case."""

    def __init__(self, package: str, case: Case) -> None:
        self._package, self._case = package, case
        self._width, self._ffn, self._heads, self._channels = SIZES[case.size]
        self._dtype = torch.float16 if case.weights == "fp16" else torch.bfloat16
        self._model = self._module("wanvideo.modules.model")

    def _module(self, name: str) -> Any:
        return sys.modules[f"{self._package}.{name}"]

    def measure(self, *, verbose: bool) -> int:
        case = self._case
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), self._kernels():
            transformer = self._transformer()
            inputs = self._inputs(transformer)
            storages = Storages()
            storages.ignore(*transformer.parameters(), *transformer.buffers())
            storages.ignore(*[leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)])
            with storages, self._autocast():
                transformer(**inputs)
        if verbose:
            unit = 2 * case.tokens * self._width
            _say(f"{case.name}: {storages.peak / unit:.3f} units")
            for made, nbytes in storages.at_peak.most_common(14):
                _say(f"    {nbytes / unit:7.3f} {made}")
        return storages.peak

    def _transformer(self) -> Any:
        case, width = self._case, self._width
        options: dict[str, Any] = {"in_dim": self._channels, "out_dim": self._channels}
        if case.kind == "i2v":
            options.update(model_type="i2v", in_dim=36)
        elif case.kind == "vace":
            options.update(vace_layers=[0, 1][: case.vace_blocks], vace_in_dim=96)
        elif case.kind == "s2v":
            options.update(
                model_type="s2v", cond_dim=16, enable_adain=True, zero_timestep=True, audio_inject_layers=[0]
            )
        elif case.kind == "animate":
            options.update(model_type="i2v", in_dim=36, is_wananimate=True)
        transformer = self._model.WanModel(
            **{"model_type": "t2v", "text_dim": 4096, "num_layers": 2, **options},
            dim=width, in_features=width, out_features=width, ffn_dim=self._ffn, ffn2_dim=self._ffn,
            num_heads=self._heads, attention_mode=case.attention, rope_func=case.rope, dtype=self._dtype,
            main_device=CUDA, offload_device=torch.device("cpu"), is_longcat=case.size == "LongCat",
        ).eval()  # fmt: skip
        if case.kind == "multitalk":
            self._add_audio(transformer)
        for block in [*transformer.blocks, *getattr(transformer, "vace_blocks", ())]:
            block.rope_func = case.rope
        transformer.rope_embedder.k, transformer.rope_embedder.num_frames = 0, self._case.frames
        self._load(transformer)
        return transformer

    def _add_audio(self, transformer: Any) -> None:
        """The branch of MultiTalk and InfiniteTalk, as WanVideoModelLoader patches it in."""
        talk = self._module("multitalk.multitalk")
        for block in transformer.blocks:
            block.norm_x = self._model.WanLayerNorm(self._width, transformer.eps, elementwise_affine=True)
            block.audio_cross_attn = talk.SingleStreamMultiAttention(
                dim=self._width, encoder_hidden_states_dim=768, num_heads=self._heads, qkv_bias=True,
                class_range=24, class_interval=4, attention_mode=self._case.attention,
            )  # fmt: skip
        transformer.multitalk_audio_proj = talk.AudioProjModel()
        transformer.multitalk_model_type = "InfiniteTalk"

    def _load(self, transformer: Any) -> None:
        """Device and dtype of each weight as load_weights gives them."""
        weights = self._case.weights
        if weights in {"lora", "fp8_scaled", "gguf"}:
            self._patch_linear(transformer)
        for name, parameter in list(transformer.named_parameters()):
            dtype = self._dtype
            if "patch_embedding" in name or "motion_encoder" in name:
                dtype = torch.float32
            elif "modulation" in name or "norm" in name:
                dtype = torch.float32 if self._case.float_modulation else self._dtype
            elif weights in {"fp8", "fp8_scaled"} and not any(part in name for part in KEPT):
                dtype = FP8
            owner, _, last = name.rpartition(".")
            shape = self._shape(name, parameter)
            loaded: Any = nn.Parameter(torch.empty(shape, dtype=dtype, device=CUDA), False)
            if (
                weights == "gguf"
                and dtype is self._dtype
                and "blocks." in name
                and last == "weight"
                and len(shape) == 2
            ):
                import gguf

                packed = torch.empty((shape[0], shape[1] // 32 * 34), dtype=torch.uint8, device=CUDA)
                loaded = nn.Parameter(packed, False)
                loaded.quant_type = gguf.GGMLQuantizationType.Q8_0
            setattr(transformer.get_submodule(owner), last, loaded)
        for module in transformer.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and name != "block_id":
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)

    def _shape(self, name: str, parameter: torch.Tensor) -> torch.Size:
        """The wrapper's block gives cross-attention qk_norm as kv_dim: keys and values are made for one channel, and
        loading replaces them.
        """
        is_for_one = ".cross_attn." in name and parameter.shape[-1:] == (1,)
        return torch.Size((parameter.shape[0], self._width)) if is_for_one else parameter.shape

    def _patch_linear(self, transformer: Any) -> None:
        custom = self._module("custom_linear")
        shapes = {name: self._shape(name, value) for name, value in transformer.named_parameters()}
        state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        weights = self._case.weights
        scales = {f"{name[:-6]}scale_weight": torch.empty((), dtype=self._dtype, device=CUDA) for name in state}
        custom._replace_linear(transformer, self._dtype, state, "", None, scales if weights == "fp8_scaled" else None)
        for name, module in transformer.named_modules():
            if isinstance(module, custom.CustomLinear) and "blocks." in name:
                module.is_gguf = weights == "gguf"
                if weights == "lora" or self._case.lora:
                    rows, columns = module.out_features, module.in_features
                    up, down = (torch.empty(shape, dtype=self._dtype) for shape in ((rows, 64), (64, columns)))
                    module.set_lora_diffs([(up, down, 64.0)], device=CUDA)
                    module._step = torch.empty((), dtype=torch.long, device=CUDA)
                    module._lora_strength_0 = torch.empty((1,), dtype=self._dtype, device=CUDA)
                    module._lora_strength_is_scheduled = [False]
        transformer.patched_linear = True

    def _inputs(self, transformer: Any) -> dict[str, Any]:
        case, dtype = self._case, self._dtype
        batch = 2 if case.batched else 1

        def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=of, device=CUDA)

        frames, tokens = case.frames, case.tokens
        inputs: dict[str, Any] = {
            "x": [empty(self._channels, frames, SIDE, SIDE) for _ in range(batch)],
            "t": empty(1, frames, of=torch.float32) if case.per_token else empty(1, of=torch.float32),
            "context": [empty(512, 4096) for _ in range(batch)],
            "seq_len": tokens,
            "device": CUDA,
            "freqs": None,
        }
        if case.rope == "default":
            inputs["freqs"] = empty(1024, self._width // self._heads // 2, of=torch.complex128)
        if case.kind in {"i2v", "animate"}:
            inputs["y"] = [empty(36 - self._channels, frames, SIDE, SIDE) for _ in range(batch)]
            inputs["clip_fea"] = empty(batch, 257, 1280)
        if case.kind == "vace":
            context = [empty(96, frames, SIDE, SIDE)]
            entry = {"context": context, "start": 0.0, "end": 1.0, "seq_len": tokens, "scale": [1.0]}
            inputs["vace_data"] = [entry] * case.vace_inputs
        if case.kind == "multitalk":
            inputs["multitalk_audio"] = empty(1, 1 + 4 * (frames - 1), 5, 12, 768)
            if case.humans > 1:
                inputs["multitalk_audio"] = empty(case.humans, 1 + 4 * (frames - 1), 5, 12, 768)
                inputs["ref_target_masks"] = empty(case.humans + 1, SIDE, SIDE, of=torch.float32)
        if case.kind == "s2v":
            inputs["s2v_audio_input"] = empty(1, 25, 1024, 4 * frames)
            inputs["s2v_ref_latent"] = empty(1, 16, 1, SIDE, SIDE)
            inputs["s2v_pose"] = empty(1, 16, frames, SIDE, SIDE)
            inputs["s2v_ref_motion"] = empty(1, 16, 19, SIDE, SIDE)
            inputs["s2v_motion_frames"] = [73, 19]
        if case.kind == "animate":
            inputs["wananim_pose_latents"] = [empty(16, frames - 1, SIDE, SIDE)]
            inputs["wananim_face_pixel_values"] = empty(1, 3, 1 + 4 * (frames - 2), 512, 512, of=torch.float32)
        return inputs

    def _unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """The body of dequantize_gguf_tensor, whose parameter type has no fakes, for Q8_0: blocks of a scale of 2 bytes
        and 32 values.
        """
        if packed.dtype != torch.uint8:
            return packed
        utils = self._module("gguf.gguf_utils")
        blocks = packed.reshape(-1, 34)
        return utils.dequantize_blocks_Q8_0(blocks, 32, 34).reshape(packed.shape[0], -1)

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        """As the sampler has it for fp8 weights in layers that are torch's own. torch.autocast refuses without CUDA."""
        if self._case.weights != "fp8":
            yield
            return
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", self._dtype)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)

    @contextlib.contextmanager
    def _kernels(self) -> Iterator[None]:
        """Stubs that allocate what kernels do, and the bodies of operators whose fakes hide their temporaries."""
        import comfy.quant_ops
        from comfy_kitchen.backends.eager import rope

        attention, custom = self._module("wanvideo.modules.attention"), self._module("custom_linear")
        linear = custom.CustomLinear
        with contextlib.ExitStack() as stack:
            put = lambda *entry: stack.enter_context(_replaced(*entry))  # noqa: E731
            put(torch.nn.functional, "scaled_dot_product_attention", flash_sdpa)
            put(attention, "sageattn_func", _sage)
            put(attention, "flash_attention", _flash)
            put(comfy.quant_ops.ck, "apply_rope1", _fused_rope if self._case.fused_rope else rope.apply_rope1)
            direct = staticmethod(lambda *given: custom.apply_lora._init_fn(*given))
            put(linear, "_apply_lora_custom_op", direct)
            put(linear, "_linear_forward_custom_op", staticmethod(torch.nn.functional.linear))
            put(torch, "tensor", _tensor)
            put(custom, "dequantize_gguf_tensor", self._unpack)
            put(nn.Module, "to", lambda module, *given, **named: module)  # encoders that come for a moment
            yield


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _sage(q: Any, k: Any, v: Any, tensor_layout: str = "NHD", **others: Any) -> Any:
    """What SageAttention 2 allocates on Ada and Blackwell (sageattn_qk_int8_pv_fp8_cuda in thu-ml/SageAttention's
    sageattention/core.py, per_channel_fp8 in quant.py): queries and keys in int8, then the output, then the values
    transposed and in fp8. Scales are a thousandth of that.
    """
    q, k, v = (one if one.dtype in {torch.float16, torch.bfloat16} else one.to(torch.float16) for one in (q, k, v))
    kept = [torch.empty(one.shape, dtype=torch.int8, device=one.device) for one in (q, k)]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    transposed = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    kept.append(torch.empty(v.shape, dtype=FP8, device=v.device))
    del transposed
    return out


def _flash(q: Any, k: Any, v: Any, k_lens: Any = None, **others: Any) -> Any:
    """FlashAttention 2 behind the wrapper's flash_attention: with lengths given, keys and values of the batch are
    joined, which copies them (attention_flash.py), then the output and its logsumexp.
    """
    if k_lens is not None:
        k, v = torch.cat(list(k)), torch.cat(list(v))
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    del lse
    return out


_make = torch.tensor


def _tensor(data: Any, **options: Any) -> torch.Tensor:
    """torch.tensor, which reads tensors inside `data` where no mode sees it."""
    return _make(tree_map(lambda leaf: leaf.item() if isinstance(leaf, torch.Tensor) else leaf, data), **options)


def _fused_rope(x: Any, freqs: Any) -> Any:
    """comfy-kitchen's CUDA kernel (backends/cuda: _apply_rope1_cuda), which torch for CUDA 13 gets."""
    return torch.empty_like(x)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def main(comfyui: Path, names: list[str], *, verbose: bool) -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    let_fakes_be_on_cuda()
    torch.__future__.set_swap_module_params_on_conversion(False)
    package = load_wrapper(comfyui)
    chosen = [case for case in CASES if not names or any(name in case.name for name in names)]
    peaks = {}
    for case in chosen:
        peaks[case.name] = Forward(package, case).measure(verbose=verbose)
    version = (comfyui / "custom_nodes" / WRAPPER / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.+)"', version, re.MULTILINE)
    about = {
        "wrapper": found[1] if found else "unknown",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "command": "python tests/activations/wrapper_forward.py COMFYUI_DIR",
    }
    json.dump({**about, "peaks": peaks}, answers, indent=1)
    answers.write("\n")
    answers.flush()


if __name__ == "__main__":
    given = [argument for argument in sys.argv[1:] if argument != "-v"]
    main(Path(given[0]).resolve(), given[1:], verbose="-v" in sys.argv)
