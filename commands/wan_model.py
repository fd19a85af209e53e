"""A real Wan transformer with random weights, its inputs, and the loop that denoises with it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..blockswap.errors import HostMemoryError
from ..blockswap.model.wan import WanArchitecture
from ..hardware import format_bytes

# Scale of classifier-free guidance: Wan's own default for text to video.
GUIDANCE = 5.0
# Random numbers that are drawn once and repeated over the weights: 14 billion draws would take minutes.
POOL_ELEMENTS = 1 << 22
# The pool starts this much later for each part that it fills: a prime, so that the same offset comes back late.
POOL_STEP = 1_048_583
# Host memory that a model needs, over its bytes: the host holds a block twice while it fills the slab, and the rest of
# the model, Python and torch need memory too.
HOST_SHARE = 1.1
# The same for a simulated device, whose memory is in the host too.
SIMULATED_SHARE = 2.1


@dataclass(frozen=True, slots=True)
class Preset:
    """Dimensions of a Wan transformer, widths in channels, and of the video that it denoises.

    Attributes:
        layers: Number of blocks.
        shape: Width and height of the video in pixels, and its frames.
    """

    layers: int
    heads: int
    head_width: int
    ffn_width: int
    text_width: int
    shape: tuple[int, int, int]

    @property
    def architecture(self) -> WanArchitecture:
        """The same dimensions, in the form that a checkpoint's header gives."""
        return WanArchitecture(
            width=self.heads * self.head_width,
            ffn_width=self.ffn_width,
            heads=self.heads,
            blocks=self.layers,
            vace_blocks=0,
            patch=(1, 2, 2),
            in_channels=16,
            latent_channels=16,
        )


PRESETS = {
    # 2.1 MB a block in bf16: small enough for a CPU, large enough to stream.
    "small": Preset(12, 4, 64, 1024, 128, (128, 128, 9)),
    # Wan 2.1 T2V 1.3B and 14B (transformer/config.json of Wan-AI's diffusers repositories).
    "1.3b": Preset(30, 12, 128, 8960, 4096, (256, 256, 9)),
    "14b": Preset(40, 40, 128, 13824, 4096, (480, 480, 17)),
}


def expected_bytes(preset: Preset) -> int:
    """Bytes of the preset's blocks in bf16, computed from its dimensions."""
    width = preset.heads * preset.head_width
    return 2 * preset.layers * (8 * width * width + 2 * width * preset.ffn_width)


def refuse_if_too_large(name: str, preset: Preset, *, available_bytes: int, is_simulated: bool) -> None:
    """Raises HostMemoryError if the host cannot hold the model."""
    need = int(expected_bytes(preset) * (SIMULATED_SHARE if is_simulated else HOST_SHARE))
    if need > available_bytes:
        figures = f"{format_bytes(need)} needed, {format_bytes(available_bytes)} available"
        message = f"not enough RAM for --preset {name}, {preset.layers} blocks in bf16: {figures}"
        raise HostMemoryError(f"{message}; take a smaller preset or a machine with more RAM")


def build(preset: Preset, *, seed: int, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Diffusers' WanTransformer3DModel on the host, with weights from `seed`."""
    model = skeleton(preset, dtype=dtype).to_empty(device="cpu")
    _fill(model, seed)
    return complete(model, preset)


def skeleton(preset: Preset, *, dtype: torch.dtype) -> nn.Module:
    """The same model without data, on the meta device."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=preset.heads,
            attention_head_dim=preset.head_width,
            in_channels=16,
            out_channels=16,
            text_dim=preset.text_width,
            freq_dim=256,
            ffn_dim=preset.ffn_width,
            num_layers=preset.layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
        )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def complete(model: Any, preset: Preset) -> nn.Module:
    """Makes a model with loaded weights ready to run: its rotary table is not a weight and has no data yet."""
    model.rope = type(model.rope)(preset.head_width, (1, 2, 2), model.rope.max_seq_len)
    return model.train(mode=False).requires_grad_(requires_grad=False)


def _fill(model: nn.Module, seed: int) -> None:
    pool = torch.randn(POOL_ELEMENTS, generator=torch.Generator().manual_seed(seed))
    # One pool for each of the few distributions, so that filling a weight is only a copy.
    pools: dict[tuple[float, float], torch.Tensor] = {}
    start = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.02
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            if (scale, centre) not in pools:
                pools[scale, centre] = (pool * scale + centre).to(parameter.dtype)
            source = pools[scale, centre]
            for part in parameter.view(-1).split(POOL_ELEMENTS):
                ahead = min(len(part), POOL_ELEMENTS - start)
                part[:ahead].copy_(source[start : start + ahead])
                part[ahead:].copy_(source[: len(part) - ahead])
                start = (start + POOL_STEP) % POOL_ELEMENTS


@dataclass(frozen=True, slots=True)
class Inputs:
    """The start of a run, on the device: latents `(1, 16, frames, rows, columns)`, text `(1, 512, text_width)`."""

    latents: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor


def make_inputs(preset: Preset, shape: tuple[int, int, int], device: torch.device, *, seed: int) -> Inputs:
    """Noise and text embeddings from `seed`."""
    generator = torch.Generator().manual_seed(seed + 1)
    width, height, frames = shape
    latents = torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8, generator=generator)
    texts = [torch.randn(1, 512, preset.text_width, generator=generator) for _ in range(2)]
    latents, positive, negative = (t.to(torch.bfloat16).to(device) for t in (latents, *texts))
    return Inputs(latents, positive, negative)


def denoise(
    model: nn.Module,
    inputs: Inputs,
    *,
    steps: int,
    forward: Callable[[], contextlib.AbstractContextManager[object]],
    after_step: Callable[[], object],
) -> torch.Tensor:
    """Latents after `steps` Euler steps of flow matching with classifier-free guidance: two forwards per step, each in
    a context that `forward` makes.
    """
    latents = inputs.latents
    sigmas = [1.0 - i / steps for i in range(steps + 1)]
    with torch.inference_mode():
        for sigma, following in itertools.pairwise(sigmas):
            time = torch.full((1,), 1000.0 * sigma, device=latents.device)
            flows = []
            for text in (inputs.positive, inputs.negative):
                with forward():
                    flows.append(model(latents, time, text, return_dict=False)[0])
            flow = flows[1] + GUIDANCE * (flows[0] - flows[1])
            latents = latents + (following - sigma) * flow
            after_step()
    return latents
