"""Linear layers: the model's own, and the kind that takes scales, packed weights and unmerged LoRAs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from .gguf import GGUFParameter, unpack


class Linear(nn.Linear):
    """Computes in its input's type, independent of the type of its weight, as autocast does for fp8 weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class PatchedLinear(nn.Linear):
    """Applies scales and LoRAs to a weight. LoRA deltas, strengths and the step are buffers."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        compute_dtype: torch.dtype | None = None,
        scale_weight: torch.Tensor | None = None,
        is_gguf: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.compute_dtype = compute_dtype
        self.scale_weight = scale_weight  # no buffer: `.to` leaves it where it is
        self.is_gguf = is_gguf
        self.lora_count = 0
        self.register_buffer("_step", torch.zeros((), dtype=torch.long, device="cpu"))

    def set_lora(self, patches: Sequence[tuple[Any, Any]], device: torch.device) -> None:
        self.lora_count = len(patches)
        self._step = self._step.to(device)
        self._step.fill_(0)
        for i, (strength, adapter) in enumerate(patches):
            up, down, alpha = adapter.weights
            self.register_buffer(f"lora_diff_{i}_0", up.to(device, self.compute_dtype))
            self.register_buffer(f"lora_diff_{i}_1", down.to(device, self.compute_dtype))
            setattr(self, f"lora_diff_{i}_2", alpha)
            values = strength if isinstance(strength, list) else [strength]
            self.register_buffer(f"_lora_strength_{i}", torch.tensor(values, dtype=self.compute_dtype, device=device))

    def remove_lora(self) -> None:
        """The deltas go; strengths stay."""
        for i in range(self.lora_count):
            for part in range(3):
                name = f"lora_diff_{i}_{part}"
                if hasattr(self, name):
                    delattr(self, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = unpack(self.weight, self.compute_dtype) if self.is_gguf else self.weight.to(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.scale_weight is not None and not self.is_gguf:
            if weight.numel() < x.numel():
                weight = weight * self.scale_weight
            else:
                x = x * self.scale_weight
        if hasattr(self, "lora_diff_0_0"):
            for i in range(self.lora_count):
                weight = weight + self._delta(i)
        return F.linear(x, weight, bias)

    def _delta(self, i: int) -> torch.Tensor:
        up, down, alpha = (getattr(self, f"lora_diff_{i}_{part}") for part in range(3))
        strength = getattr(self, f"_lora_strength_{i}")
        now = strength[0] if strength.numel() == 1 else strength.index_select(0, self._step).squeeze(0)
        return torch.mm(up, down) * (now if alpha is None else now * (alpha / down.shape[0]))


def replace_linear(
    model: nn.Module,
    compute_dtype: torch.dtype,
    state_dict: Mapping[str, torch.Tensor],
    *,
    prefix: str = "",
    scale_weights: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Puts a PatchedLinear, its weights on meta, in the place of each linear layer that the state dict has."""
    for name, child in list(model.named_children()):
        path = f"{prefix}{name}.".replace("_orig_mod.", "")
        replace_linear(child, compute_dtype, state_dict, prefix=path, scale_weights=scale_weights)
        if not isinstance(child, nn.Linear) or f"{path}weight" not in state_dict:
            continue
        weight = state_dict[f"{path}weight"]
        with torch.device("meta"):
            model._modules[name] = PatchedLinear(
                weight.shape[1],
                weight.shape[0],
                child.bias is not None,
                compute_dtype=compute_dtype,
                scale_weight=(scale_weights or {}).get(f"{path}scale_weight"),
                is_gguf=isinstance(weight, GGUFParameter),
            ).requires_grad_(False)
    return model


def set_lora_params(transformer: nn.Module, patches: Mapping[str, Sequence[tuple[Any, Any]]]) -> None:
    """Adds LoRAs to the layers of their weights, on the device of each weight."""
    remove_lora_from_module(transformer)
    for name, module in list(transformer.named_modules()):
        found = patches.get(f"diffusion_model.{name.replace('_orig_mod.', '')}.weight", ())
        if isinstance(module, PatchedLinear) and found:
            module.set_lora(found, module.weight.device)


def remove_lora_from_module(transformer: nn.Module) -> None:
    for module in transformer.modules():
        if isinstance(module, PatchedLinear):
            module.remove_lora()


def update_lora_step(transformer: nn.Module, step: int) -> None:
    """For strengths that differ by step."""
    for module in transformer.modules():
        if isinstance(module, PatchedLinear):
            module._step.fill_(step)
