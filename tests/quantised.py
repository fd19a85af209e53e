"""Parameters that are made of other tensors: classes of ours, ComfyUI's QuantizedTensor in each layout, torchao's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import pytest
import torch
from odd_tensors import Doubled, Scaled, scaled
from torch import nn

WIDTH = 64
ROTATED = 64
"""Columns that the layouts with a rotation rotate together."""


def from_float(layout: str, **options: object) -> nn.Parameter:
    """A parameter of ComfyUI's own class, in one of its formats."""
    tensor = pytest.importorskip("comfy_kitchen.tensor", reason="the class is in comfy-kitchen")
    weight = torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16) / WIDTH**0.5
    return nn.Parameter(tensor.QuantizedTensor.from_float(weight, layout, **options), requires_grad=False)


def packed(layout: str, **shapes: tuple[int, ...]) -> nn.Parameter:
    """The same in a format that is made elsewhere: four bits per element, and other tensors of these shapes."""
    tensor = pytest.importorskip("comfy_kitchen.tensor", reason="the class is in comfy-kitchen")
    data = torch.randint(-128, 128, (WIDTH, WIDTH // 2), dtype=torch.int8)
    others = {name: torch.rand(shape, dtype=torch.bfloat16) / 8 + 0.1 for name, shape in shapes.items()}
    params = tensor.get_layout_class(layout).Params(orig_dtype=torch.bfloat16, orig_shape=(WIDTH, WIDTH), **others)
    return nn.Parameter(tensor.QuantizedTensor(data, layout, params), requires_grad=False)


def by_torchao(config: str) -> nn.Parameter:
    """The weight of a layer that torchao has quantised."""
    with warnings.catch_warnings(action="ignore"):
        quantization = pytest.importorskip("torchao.quantization", reason="the class is torchao's")
        layer = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16)).requires_grad_(False)
        quantization.quantize_(layer, getattr(quantization, config)())
    weight: nn.Parameter = layer[0].weight
    return weight


def eager_alone() -> None:
    """comfy-kitchen computes by torch's operators: a pretend CUDA runs no kernels of others."""
    import comfy_kitchen

    for backend in ("cuda", "triton"):
        comfy_kitchen.disable_backend(backend)
    os.environ["COMFY_KITCHEN_SVDQUANT_DIRECT_CUDA"] = "0"


GROUPS = (1, WIDTH)
"""Shape of scales of 64 columns each."""

LAYOUTS: dict[str, Callable[[], nn.Parameter]] = {
    "fp8": lambda: from_float("TensorCoreFP8Layout"),
    "fp8 e5m2": lambda: from_float("TensorCoreFP8Layout", dtype=torch.float8_e5m2),
    "nvfp4": lambda: from_float("TensorCoreNVFP4Layout"),
    "mxfp8": lambda: from_float("TensorCoreMXFP8Layout"),
    "int8": lambda: from_float("TensorWiseINT8Layout"),
    "int8 by row": lambda: from_float(
        "TensorWiseINT8Layout", per_channel=True, convrot=True, convrot_groupsize=ROTATED
    ),
    "convrot w4a4": lambda: from_float("TensorCoreConvRotW4A4Layout", convrot_groupsize=ROTATED),
    "w4a8": lambda: from_float("AsymW4A8Int8Layout", convrot_groupsize=ROTATED),
    "w6a8": lambda: from_float("AsymW4A8Int8Layout", convrot_groupsize=ROTATED, bits=6),
    "awq": lambda: packed("TensorCoreAWQW4A16Layout", scale=GROUPS, zeros=GROUPS),
    "svdquant": lambda: packed(
        "TensorCoreSVDQuantW4A4Layout",
        scale=GROUPS,
        proj_down=(WIDTH, 16),
        proj_up=(WIDTH, 16),
        smooth_factor=(WIDTH,),
    ),
}
"""Every layout of ComfyUI's class."""

TORCHAO = ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig")

KINDS: dict[str, Callable[[], nn.Parameter]] = {
    "ours": lambda: scaled(WIDTH, WIDTH),
    "nested": lambda: nn.Parameter(Doubled(scaled(WIDTH, WIDTH).data), requires_grad=False),
    **LAYOUTS,
    **{config: lambda config=config: by_torchao(config) for config in TORCHAO},
}


def plain(weight: nn.Parameter) -> torch.Tensor:
    """The weight as its class computes it from what it is made of."""
    return weight.plain() if isinstance(weight, (Scaled, Doubled)) else weight.dequantize()


def inner(weight: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a parameter is made of."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    return [tensor for name in weight.__tensor_flatten__()[0] for tensor in inner(getattr(weight, name))]


class ShellBlock(nn.Module):
    """A block with two such matrices and a plain bias."""

    def __init__(self, make: Callable[[], nn.Parameter]) -> None:
        super().__init__()
        self.one, self.other = make(), make()
        self.bias = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
        self.seen: list[tuple[torch.device, ...]] = []
        self.addresses: list[list[int]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = [plain(weight) for weight in (self.one, self.other)]
        self.seen.append((self.one.device, self.other.device, *(weight.device for weight in weights)))
        self.addresses.append([tensor.data_ptr() for tensor in tensors(self)])
        return x + torch.tanh(x @ weights[0].float() + self.bias) @ weights[1].float()


class LinearBlock(nn.Module):
    """A linear layer whose class computes it, in kernels of its own where it has some."""

    def __init__(self, make: Callable[[], nn.Parameter]) -> None:
        super().__init__()
        self.weight = make()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(nn.functional.linear(x, self.weight))


def tensors(model: nn.Module) -> list[torch.Tensor]:
    """All that a model's parameters are made of."""
    return [tensor for parameter in model.parameters() for tensor in inner(parameter)]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def assert_same_bytes(one: nn.Module, other: nn.Module) -> None:
    """On the host, in every tensor."""
    for a, b in zip(tensors(one), tensors(other), strict=True):
        assert a.device.type == "cpu"
        assert torch.equal(as_bytes(a), as_bytes(b))
