"""Files as ComfyUI writes them, with quantised weights: what `plan` reads of one is what a run of it has and copies."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from checkpoint_files import wan_shapes
from on_disk import skip_unless_on_disk
from quantised import as_bytes, inner, plain, tensors
from safetensors.torch import load_file, save_file
from torch import nn
from toys import Simulation, fixed_plan
from wanvideo_enhanced_blockswap.blockswap import PinBudget, backend_for
from wanvideo_enhanced_blockswap.blockswap.checkpoint.wan_file import read_checkpoint
from wanvideo_enhanced_blockswap.blockswap.engine.session import SwapSession
from wanvideo_enhanced_blockswap.blockswap.model.layout import BlockProfile, Placement
from wanvideo_enhanced_blockswap.blockswap.model.profile import profile_model
from wanvideo_enhanced_blockswap.blockswap.model.recognise import profile_tensors
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier
from wanvideo_enhanced_blockswap.blockswap.wrapper.loader import replace_in, stored_tensors

if TYPE_CHECKING:
    from pretend_accelerator import PretendHpu

kitchen = pytest.importorskip("comfy_kitchen.tensor", reason="it makes the weights")
WIDTH, FFN, BLOCKS = 128, 256, 3
DEVICE = "hpu:0"

FORMATS: dict[str, tuple[str, dict[str, tuple[str, torch.dtype | None]]]] = {
    "nvfp4": (
        "TensorCoreNVFP4Layout",
        {"scale": ("_scale_2", None), "block_scale": ("_scale", torch.float8_e4m3fn)},
    ),
    "mxfp8": ("TensorCoreMXFP8Layout", {"scale": ("_scale", torch.float8_e8m0fnu)}),
    "float8_e4m3fn": ("TensorCoreFP8Layout", {"scale": ("_scale", None)}),
    "int8_tensorwise": ("TensorWiseINT8Layout", {"scale": ("_scale", None)}),
}
"""For each format of ComfyUI's files: the layout, and for each tensor beside the data the end of its name in the file
and the type that the loader takes its bytes for."""

every_format = pytest.mark.parametrize("kind", FORMATS)


SHAPES = wan_shapes(WIDTH, FFN, BLOCKS)
MATRICES = frozenset(name for name, shape in SHAPES.items() if "blocks." in name and len(shape) == 2)
"""The weights that are quantised."""


def write(path: Path, kind: str) -> Path:
    """A Wan model whose matrices are in a format, with the metadata of ComfyUI; scales of blocks are bytes there."""
    torch.manual_seed(0)
    stored: dict[str, torch.Tensor] = {}
    for name, shape in SHAPES.items():
        tensor = torch.randn(shape, dtype=torch.bfloat16) / WIDTH**0.5
        if name not in MATRICES:
            stored[name] = tensor
            continue
        for own, part in kitchen.QuantizedTensor.from_float(tensor, FORMATS[kind][0]).state_dict(name).items():
            is_of_blocks = own.endswith("_scale") and part.dim() == 2
            stored[own] = part.view(torch.uint8) if is_of_blocks else part
        says = json.dumps({"format": kind}).encode()
        stored[f"{name.removesuffix('weight')}comfy_quant"] = torch.tensor(list(says), dtype=torch.uint8)
    save_file(stored, path)
    return path


def weight_of(state: dict[str, torch.Tensor], name: str, kind: str) -> Any:
    """A weight around tensors of the file, as ComfyUI's loader makes it."""
    layout, beside = FORMATS[kind]
    params = {
        own: state[name + end] if dtype is None else state[name + end].view(dtype)
        for own, (end, dtype) in beside.items()
    }
    shape = SHAPES[name]
    made = kitchen.get_layout_class(layout).Params(**params, orig_dtype=torch.bfloat16, orig_shape=shape)
    return kitchen.QuantizedTensor(state[name], layout, made)


class FileBlock(nn.Module):
    """Uses every parameter in it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name, weight in self.named_parameters():
            full = plain(weight) if hasattr(weight, "dequantize") and type(weight) is not nn.Parameter else weight
            x = x + full.float().mean() * (1 + len(name))
        return x


def load(state: dict[str, torch.Tensor], kind: str, *, copies: bool = False) -> nn.Module:
    """A model with all weights of a state dict. A parameter copies the scales of the weight that it is made of, unless
    they are put in again.
    """
    model = nn.Module()
    model.blocks = nn.ModuleList(FileBlock() for _ in range(BLOCKS))
    for name in SHAPES:
        tensor = weight_of(state, name, kind) if name in MATRICES else state[name]
        *path, own = name.split(".")
        module = model
        for step in path:
            if step not in module._modules:
                module.add_module(step, nn.Module())
            module = module._modules[step]
        parameter = nn.Parameter(tensor, requires_grad=False)
        if name in MATRICES and not copies:
            parameter._params = tensor._params
        module.register_parameter(own, parameter)
    return model


def named(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]


def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for block in model.blocks:
        x = block(x)
    return x


def places(block: BlockProfile) -> Counter:
    """How many tensors of which size are where; names differ."""
    return Counter((tensor.nbytes, tensor.placement) for tensor in block.tensors)


@every_format
def test_a_file_and_the_model_that_is_loaded_from_it_have_the_same_bytes_in_each_block(
    tmp_path: Path, kind: str
) -> None:
    path = write(tmp_path / "wan.safetensors", kind)
    from_file, loaded = read_checkpoint(path), load(load_file(path), kind)
    live = profile_model(named(loaded), root=loaded).profile
    assert live.fixed == {}
    for ours, theirs in zip(from_file.model.blocks, live.blocks, strict=True):
        assert places(ours) == places(theirs)
        assert (ours.nbytes, ours.streamed_bytes) == (theirs.nbytes, theirs.streamed_bytes)
        assert ours.streamed_bytes > 0.85 * ours.nbytes
    assert from_file.model.other_bytes == live.other_bytes
    assert (from_file.architecture.width, from_file.architecture.ffn_width) == (WIDTH, FFN)


@every_format
@torch.no_grad()
def test_a_run_copies_what_the_plan_of_the_file_says(tmp_path: Path, kind: str, pretend_stats: PretendHpu) -> None:
    path = write(tmp_path / "wan.safetensors", kind)
    from_file, model = read_checkpoint(path).model, load(load_file(path), kind)
    x = torch.zeros(3, device=DEVICE)
    want = forward(load(load_file(path), kind).to(DEVICE), x).cpu()
    backend = backend_for(torch.device(DEVICE), pin_budget=PinBudget(1 << 40))
    with SwapSession(named(model), fixed_plan([True] * BLOCKS), backend) as session:
        plan = fixed_plan([True] * BLOCKS)(from_file)
        for _ in range(3):
            with session.forward():
                assert torch.equal(forward(model, x).cpu(), want)
        assert session.plan.device_bytes == plan.device_bytes
        assert session.plan.streamed_bytes == plan.streamed_bytes == sum(b.slab_bytes for b in from_file.blocks)
        counters = session.counters
        assert counters.onloaded_bytes * BLOCKS == counters.onloads * plan.streamed_bytes
        assert counters.onloads >= 3 * BLOCKS


# ----------------------------------------------------------------------------------------------- the wrapper's loader


class Held(dict):
    """A model of the wrapper, with the loader's state dict in it."""


def in_weights(state: dict[str, torch.Tensor], kind: str) -> dict[str, Any]:
    """A state dict whose quantised weights are in ComfyUI's class."""
    quantised = {name for name in MATRICES if name in state}
    gone = {f"{name}{end}" for name in quantised for end in ("_scale", "_scale_2")}
    return {
        name: weight_of(state, name, kind) if name in quantised else tensor
        for name, tensor in state.items()
        if name not in gone
    }


def read(path: Path, *, mapped: bool) -> dict[str, torch.Tensor]:
    skip_unless_on_disk(path)
    return {name: tensor if mapped else tensor.clone() for name, tensor in load_file(path).items()}


every_memory = pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "in memory"])


@every_format
@every_memory
def test_weights_that_the_loader_holds_quantised_count_with_what_they_are_made_of(
    tmp_path: Path, kind: str, mapped: bool
) -> None:
    state = read(write(tmp_path / "wan.safetensors", kind), mapped=mapped)
    live = profile_model(named(load(state, kind))).profile
    held = Held(sd=in_weights(state, kind), weight_dtype=torch.bfloat16)
    found = profile_tensors("a model", stored_tensors(held, {})).model
    for ours, theirs in zip(found.blocks, live.blocks, strict=True):
        assert places(ours) == places(theirs)
        assert ours.is_in_file == mapped


@every_format
@every_memory
@pytest.mark.parametrize("quantised", [True, False], ids=["quantised", "plain"])
@pytest.mark.parametrize("copies", [True, False], ids=["scales copied", "scales shared"])
@torch.no_grad()
def test_the_host_holds_a_quantised_weight_once(
    tmp_path: Path, kind: str, mapped: bool, quantised: bool, copies: bool
) -> None:
    """What the loader's state dict holds in memory is replaced by the masters; what is a file's mapping stays."""
    path = write(tmp_path / "wan.safetensors", kind)
    state, truth = read(path, mapped=mapped), load_file(path)
    model = load(state, kind, copies=copies)
    stored = in_weights(state, kind) if quantised else state
    kinds = {name: (type(entry), entry.dtype, entry.shape) for name, entry in stored.items()}
    before = [tensor.data_ptr() for entry in stored.values() for tensor in inner(entry)]
    sources = {tensor.data_ptr() for tensor in streamed_of(model)}
    tier = HostTier.FILE if mapped else HostTier.PINNED
    want = forward(model, torch.zeros(3))
    held = Held(sd=stored)
    with SwapSession(named(model), fixed_plan([True] * BLOCKS, tiers=tier), Simulation().backend) as session:
        session.listeners.on_master = replace_in(held)
        with session.forward():
            assert torch.equal(forward(model, torch.zeros(3)), want)
        masters = {tensor.data_ptr() for tensor in streamed_of(model)}
        now = [tensor.data_ptr() for entry in stored.values() for tensor in inner(entry)]
        if mapped:
            assert now == before
        else:
            assert masters & sources == set()
            assert [at in masters for at in now] == [at in sources for at in before]
            assert sum(at in masters for at in now) >= len(MATRICES)
            assert all(at == was for at, was in zip(now, before, strict=True) if at not in masters)
        assert {name: (type(entry), entry.dtype, entry.shape) for name, entry in stored.items()} == kinds
        for name, tensor in truth.items():
            if name in stored:
                assert torch.equal(as_bytes(inner(stored[name])[0]), as_bytes(tensor))
    assert torch.equal(forward(model, torch.zeros(3)), want)


def streamed_of(model: nn.Module) -> list[torch.Tensor]:
    profile = profile_model(named(model)).profile
    return [
        tensor
        for block, of_block in zip(model.blocks, profile.blocks, strict=True)
        for tensor, its in zip(tensors(block), of_block.tensors, strict=True)
        if its.placement is Placement.STREAMED
    ]
