"""The object that nodes hand to one another as WANVIDEOMODEL."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class WanVideoModel(nn.Module):
    """The transformer, and what the loader knows about it under string keys."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = transformer
        self.pipeline: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        return self.pipeline[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.pipeline[key] = value


class LoRAAdapter:
    """Two factors of a weight's delta, and alpha (None: the rank)."""

    def __init__(self, up: torch.Tensor, down: torch.Tensor, alpha: float | None = None) -> None:
        self.weights = (up, down, alpha)


class ModelPatcher:
    """A model with its own options and patches; clones share the model."""

    def __init__(self, model: WanVideoModel) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.patches: dict[str, list[tuple[Any, LoRAAdapter]]] = {}

    def clone(self) -> ModelPatcher:
        """Containers of any class are copied as plain ones."""
        clone = ModelPatcher(self.model)
        clone.model_options = _copied(self.model_options)
        clone.patches = {key: list(patches) for key, patches in self.patches.items()}
        return clone

    def add_lora(self, lora: dict[str, Any]) -> None:
        """Adds `lora["weights"]` (module path → LoRAAdapter) with `lora["strength"]`, a number or one a step."""
        for path, adapter in lora["weights"].items():
            self.patches.setdefault(f"diffusion_model.{path}.weight", []).append((lora["strength"], adapter))


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_copied(inner) for inner in value]
    return value
