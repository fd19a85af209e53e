"""The real ComfyUI inside this process, on the pretend device that is installed; run by comfy_process.py only."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import os
import shlex
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

IS_CUDA = "comfy_cuda" in sys.modules

MEMORY: Any = sys.modules["comfy_cuda"] if IS_CUDA else torch.hpu
"""What knows the device's memory: how much there is, was used and was copied."""

DEVICE = torch.device("cuda" if IS_CUDA else "hpu", 0)

WRAPPER = "ComfyUI-WanVideoWrapper"


def load_comfyui(comfyui: Path, scratch: Path) -> None:
    """Makes ComfyUI importable, with its folders in `scratch` and DEVICE as the device that models run on.

    RIG_FLAGS are further flags of its command line.
    """
    for name in ("models/diffusion_models", "models/loras", "custom_nodes", "input", "output", "temp", "user"):
        (scratch / name).mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(comfyui))
    flags = shlex.split(os.environ.get("RIG_FLAGS", ""))
    sys.argv = ["main.py", "--disable-api-nodes", "--base-directory", str(scratch), *flags]
    import comfy.options

    if IS_CUDA:
        MEMORY.leave_out_kernels_of_others()
        comfy.options.enable_args_parsing()
    else:
        sys.argv.append("--cpu")
        comfy.options.enable_args_parsing()
        _run_on_the_accelerator()
    if "--enable-dynamic-vram" in flags:
        _map_files_as_dynamic_vram_does()
    import utils.extra_config  # noqa: F401 - before `comfy` hides it, as main.py does

    # isort: split
    import server

    server.PromptServer(asyncio.new_event_loop())  # the wrapper's previews look for it


def _run_on_the_accelerator() -> None:
    """ComfyUI is started for the CPU, since it has no way to ask this device for its memory: `torch.hpu` answers it."""
    _make_attention_traceable()
    import comfy.model_management as management

    def free(device: Any = None, torch_free_too: bool = False) -> Any:
        if not _is_ours(device):
            return on_cpu[0](device, torch_free_too)
        nbytes = torch.hpu.mem_get_info()[0]
        return (nbytes, nbytes) if torch_free_too else nbytes

    def total(device: Any = None, torch_total_too: bool = False) -> Any:
        if not _is_ours(device):
            return on_cpu[1](device, torch_total_too)
        nbytes = torch.hpu.mem_get_info()[1]
        return (nbytes, nbytes) if torch_total_too else nbytes

    _round_on_the_host()
    on_cpu = management.get_free_memory, management.get_total_memory
    management.get_torch_device = lambda: DEVICE
    management.get_free_memory, management.get_total_memory = free, total


def _map_files_as_dynamic_vram_does() -> None:
    """comfy-aimdo maps models' files, read-only. Without a driver, it does not look after the device's memory."""
    import comfy.memory_management
    import comfy_aimdo.control

    if not comfy_aimdo.control.init():
        raise RuntimeError("comfy-aimdo cannot be loaded")
    comfy.memory_management.aimdo_enabled = True


def _round_on_the_host() -> None:
    """LoRAs that are merged into fp8 are rounded at random, and the accelerator draws no random numbers."""
    import comfy.float

    rounded = comfy.float.stochastic_rounding
    comfy.float.stochastic_rounding = lambda value, *options, **named: rounded(value.cpu(), *options, **named).to(
        value.device
    )


def _make_attention_traceable() -> None:
    """Attention on the accelerator is made of plain operators, as torch.compile can follow it: asked for its choice of
    a kernel while it traces, the accelerator would look at values that are not there.
    """
    _CHOICES.impl("_fused_sdp_choice", lambda *arguments, **keywords: _PLAIN_ATTENTION, "HPU", allow_override=True)


_CHOICES = torch.library.Library("aten", "IMPL")
_PLAIN_ATTENTION = 0  # at::SDPBackend::math


def _is_ours(device: Any) -> bool:
    return device is None or getattr(device, "type", None) == DEVICE.type


def load_custom_node(folder: Path) -> None:
    """Loads a custom node as ComfyUI does."""
    import nodes

    if not asyncio.run(nodes.load_custom_node(str(folder))):
        raise RuntimeError(f"ComfyUI could not load {folder}; its log says why")


def load_package(folder: Path) -> None:
    """Loads the package under test."""
    load_custom_node(folder)
    if IS_CUDA:
        MEMORY.cut_small_slabs()


def load_wrapper(comfyui: Path) -> None:
    """Loads the wrapper, and has its model believe in CUDA: without, the loop over blocks swaps nothing by itself.

    RIG_WRAPPER is the folder of another version, and RIG_COPY that of a renamed copy, whose loader and sampler take the
    place of the wrapper's. In both, only models of Wan itself are run.
    """
    other, copy = os.environ.get("RIG_WRAPPER"), os.environ.get("RIG_COPY")
    load_custom_node(Path(other) if other else comfyui / "custom_nodes" / WRAPPER)
    if copy:
        load_custom_node(Path(copy))
        _take_place(Path(copy), "WanVideoModelLoader", "WanVideoSampler")
    if IS_CUDA:
        return
    model = wrapper_module("wanvideo.modules.model")
    model.torch = _Overlay("torch", torch, cuda=_Overlay("torch.cuda", torch.cuda, **_PRETENDED_CUDA))
    if not (other or copy):
        _run_on_our_device(wrapper_module("onetoall.refextractor_2d").WanRefextractor)
        _build_what_the_files_have()


def _take_place(copy: Path, *classes: str) -> None:
    """Registers nodes of a renamed copy under the wrapper's names, which the cases call."""
    import nodes

    for name in classes:
        named = {node for node in nodes.NODE_CLASS_MAPPINGS.values() if node.__name__ == name}
        (own,) = [node for node in named if Path(inspect.getfile(node)).is_relative_to(copy)]
        nodes.NODE_CLASS_MAPPINGS[name] = own


MTV_WIDTHS = {44: 8, 84: 24}
"""Of what the wrapper turns by time and by place: in a head of 128, and in one of 32."""


def _build_what_the_files_have() -> None:
    """Where the wrapper builds modules of one width only, whatever the file has."""
    import tiny_families

    control, projection = wrapper_module("LongVie2.modules"), wrapper_module("FlashVSR.LQ_proj_model")
    dual, buffer = control.WanModelDualControl, projection.Buffer_LQ4x_Proj
    control.WanModelDualControl = lambda **config: dual(**config | tiny_families.LONGVIE2)
    motion = wrapper_module("MTV.mtv")
    time, space = motion.get_1d_rotary_pos_embed, motion.get_3d_motion_spatial_embed
    motion.get_1d_rotary_pos_embed = lambda width, *rest, **options: time(MTV_WIDTHS[width], *rest, **options)
    motion.get_3d_motion_spatial_embed = lambda width, *rest: space(MTV_WIDTHS[width], *rest)
    model = wrapper_module("wanvideo.modules.model").WanModel
    made = model.__init__

    def with_few_longcat_blocks(self: Any, *arguments: Any, **config: Any) -> None:
        few = {"num_layers": tiny_families.LONGCAT_BLOCKS} if config.get("is_longcat") else {}
        made(self, *arguments, **config | few)

    model.__init__ = with_few_longcat_blocks
    projection.Buffer_LQ4x_Proj = lambda **config: tiny_families.without_memory(lambda: buffer(**config))


def _run_on_our_device(module: Any) -> None:
    """A module that the wrapper builds without a device to run on: its default is CUDA."""
    module.__init__.__defaults__ = tuple(
        DEVICE if isinstance(value, torch.device) and value.type == "cuda" else value
        for value in module.__init__.__defaults__
    )


def wrapper_module(name: str) -> Any:
    """A module of the wrapper, by its name inside the wrapper."""
    import nodes

    package = nodes.NODE_CLASS_MAPPINGS["WanVideoSampler"].__module__.rpartition(".")[0]
    return importlib.import_module(f"{package}.{name}")


class _Overlay(types.ModuleType):
    """A module with some names replaced, otherwise the same as `below`."""

    def __init__(self, name: str, below: types.ModuleType, **own: Any) -> None:
        super().__init__(name)
        vars(self).update(own, below=below)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["below"], name)


class _PastEvent:
    """An event where each copy is over when its call returns."""

    def record(self, stream: object = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


_PRETENDED_CUDA: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "Event": _PastEvent,
    "stream": lambda stream: contextlib.nullcontext(),
}
