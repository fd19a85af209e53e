"""Kinds of weights that are not plain tensors, as quantised models bring them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map


class ShownAsFloat(torch.Tensor):
    """A wrapper subclass: data and a scale in other tensors, shown as float32."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32, device=data.device)


class Scaled(ShownAsFloat):
    """It has int8 data and one scale (torchao's kind)."""

    def __init__(self, data: torch.Tensor, scale: torch.Tensor) -> None:
        self.inner, self.scale = data, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], meta: None, size: object, stride: object) -> Scaled:
        return Scaled(inner["inner"], inner["scale"])

    def plain(self) -> torch.Tensor:
        return self.inner.to(torch.float32) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Scaled(args[0].inner, args[0].scale)
        if func is torch.ops.aten._to_copy.default:
            device = kwargs.get("device", args[0].device)
            return Scaled(args[0].inner.to(device), args[0].scale.to(device))
        return func(*tree_map(cls._plain, args), **tree_map(cls._plain, kwargs))

    @staticmethod
    def _plain(value: object) -> object:
        return value.plain() if isinstance(value, Scaled) else value


def scaled(*shape: int, kind: type[Scaled] = Scaled) -> nn.Parameter:
    """A parameter of a wrapper subclass."""
    data = torch.randint(-100, 100, shape, dtype=torch.int8)
    return nn.Parameter(kind(data, torch.tensor([0.01])), requires_grad=False)


class Opaque(Scaled):
    """The same, but it cannot be taken apart: the tensor that it shows is not the one that it uses."""

    @property
    def inner(self) -> torch.Tensor:
        return self.hidden.view(self.hidden.shape)

    @inner.setter
    def inner(self, data: torch.Tensor) -> None:
        self.hidden = data

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        return Opaque(result.inner, result.scale) if isinstance(result, Scaled) else result


class Doubled(torch.Tensor):
    """A wrapper subclass around another: twice a `Scaled`."""

    @staticmethod
    def __new__(cls, half: Scaled) -> Doubled:
        return torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype, device=half.device)

    def __init__(self, half: Scaled) -> None:
        self.half = half

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["half"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], meta: None, size: object, stride: object) -> Doubled:
        return Doubled(inner["half"])

    def plain(self) -> torch.Tensor:
        return 2 * self.half.plain()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten._to_copy.default):
            return Doubled(func(args[0].half, *args[1:], **(kwargs or {})))
        return func(*tree_map(cls._plain, args), **tree_map(cls._plain, kwargs or {}))

    @staticmethod
    def _plain(value: object) -> object:
        return value.plain() if isinstance(value, Doubled) else value


class PackedParameter(nn.Parameter):
    """Packed bytes with attributes that every operation must keep: the GGUF loaders' kind."""

    quant_type: str

    def __new__(cls, data: torch.Tensor, quant_type: str = "Q8") -> PackedParameter:
        parameter = torch.Tensor._make_subclass(cls, data, False)
        parameter.quant_type = quant_type
        return parameter

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        found = [a for a in args if isinstance(a, PackedParameter)]
        if type(result) is torch.Tensor and found:
            return cls(result, found[0].quant_type)
        return result


class PackedBlock(nn.Module):
    """A block whose matrix is unpacked from bytes at every forward."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        packed = torch.randint(0, 256, (width, width), dtype=torch.uint8)
        self.weight = PackedParameter(packed, quant_type="Q8")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.weight.quant_type == "Q8"
        weight = self.weight.as_subclass(torch.Tensor).to(torch.float32) / 128 - 1
        return x + torch.tanh(x @ weight.T)
