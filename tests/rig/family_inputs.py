"""What the sampler gets of each family that only the wrapper runs, by its own nodes; run by comfy_process.py only.

Text, audio and images are random; what a VAE or another encoder makes of them is, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tiny_families
import torch
from comfy_loading import DEVICE, wrapper_module
from tiny_wan import CHANNELS, FFN_WIDTH, WIDTH
from torch import nn

import nodes

Inputs = Mapping[str, Any]
"""Of the sampler; what a family returns is added to them, or replaces some of them."""

HOST = torch.device("cpu")


def outputs(name: str, **inputs: Any) -> Any:
    """The first output of a node."""
    node = nodes.NODE_CLASS_MAPPINGS[name]()
    return getattr(node, node.FUNCTION)(**inputs)[0]


class StandInVae:
    """Encodes videos to latents of a VAE's shape, which follow from them."""

    upsampling_factor = 8
    dtype = torch.bfloat16

    def __init__(self) -> None:
        self.model = self
        self._channels = normal(CHANNELS, 3, seed=5)

    def to(self, device: torch.device) -> StandInVae:
        """Nothing: it has no weights."""
        return self

    def encode(self, videos: list[torch.Tensor], device: torch.device, *, tiled: bool = False) -> torch.Tensor:
        """The latents of videos (channels, frames, height, width)."""
        pooled = [torch.nn.functional.avg_pool2d(video[:, ::4].float().cpu(), 8) for video in videos]
        return torch.stack([torch.einsum("dc,cthw->dthw", self._channels, one) for one in pooled]).to(
            device, self.dtype
        )


def normal(*shape: int, seed: int) -> torch.Tensor:
    """Random numbers with the same spread in every place."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(frames: int, width: int, height: int, seed: int) -> torch.Tensor:
    """Random images as ComfyUI has them: (frames, height, width, 3), from 0 to 1."""
    return torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(seed))


def _latents(inputs: Inputs, seed: int, frames: int | None = None) -> torch.Tensor:
    """Random latents (1, channels, frames, height, width) of the video's size."""
    channels, whole, height, width = inputs["image_embeds"]["target_shape"]
    return normal(1, channels, frames or whole, height, width, seed=seed)


def _size(inputs: Inputs) -> dict[str, int]:
    _, _, height, width = inputs["image_embeds"]["target_shape"]
    return {"width": 8 * width, "height": 8 * height, "num_frames": inputs["image_embeds"]["num_frames"]}


def s2v(inputs: Inputs) -> Inputs:
    """Audio, a reference and a pose."""
    layers = [normal(1, 20, 1024, seed=seed) for seed in range(25)]
    embeds = outputs(
        "WanVideoAddS2VEmbeds",
        embeds=inputs["image_embeds"],
        frame_window_size=inputs["image_embeds"]["num_frames"],
        audio_encoder_output={"encoded_audio_all_layers": layers},
        ref_latent={"samples": _latents(inputs, 101, frames=1)},
        pose_latent={"samples": _latents(inputs, 102)},
    )
    return {"image_embeds": embeds}


def one_to_all(inputs: Inputs) -> Inputs:
    """A reference and poses."""
    size = _size(inputs)
    frames, edges = size["num_frames"], {"width": size["width"], "height": size["height"]}
    always = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    embeds = outputs(
        "WanVideoAddOneToAllReferenceEmbeds",
        embeds=inputs["image_embeds"],
        vae=StandInVae(),
        ref_image=image(1, seed=111, **edges),
        **always,
    )
    embeds = outputs(
        "WanVideoAddOneToAllPoseEmbeds", embeds=embeds, pose_images=image(frames, seed=112, **edges), **always
    )
    return {"image_embeds": embeds}


def animate(inputs: Inputs) -> Inputs:
    """A reference, poses, a face, and what CLIP sees."""
    size = _size(inputs)
    frames, edges = size["num_frames"], {"width": size["width"], "height": size["height"]}
    embeds = outputs(
        "WanVideoAnimateEmbeds",
        vae=StandInVae(),
        force_offload=True,
        frame_window_size=77,
        colormatch="disabled",
        pose_strength=1.0,
        face_strength=1.0,
        ref_images=image(1, seed=121, **edges),
        clip_embeds={"clip_embeds": normal(1, 257, 1280, seed=124).to(DEVICE)},
        pose_images=image(frames - 1, seed=122, **edges),
        face_images=image(1, 512, 512, seed=123),
        **size,
    )
    return {"image_embeds": embeds}


def uni3c(inputs: Inputs, *, offload: bool) -> Inputs:
    """Control by a net of the wrapper's class; its loader takes one width only, that of the 14B models."""
    net = wrapper_module("uni3c.controlnet")
    config = {
        "in_channels": 20 + CHANNELS,
        "conv_out_dim": WIDTH,
        "time_embed_dim": WIDTH,
        "dim": WIDTH // 2,
        "ffn_dim": FFN_WIDTH,
        "num_heads": 6,
        "num_layers": 20,
        "add_channels": 7,
        "mid_channels": 16,
        "attention_mode": "sdpa",
        "quantized": False,
        "base_dtype": torch.bfloat16,
    }
    control = net.WanControlNet(config)
    control.proj_out = nn.ModuleList(nn.Linear(WIDTH // 2, WIDTH) for _ in range(20))
    _fill(control, 14)
    control.controlnet_patch_embedding.float()
    # A net that is to stay must have been loaded to the device: the wrapper takes one that is elsewhere there in part,
    # as soon as blocks are swapped, and then its forward fails.
    control.to(HOST if offload else DEVICE)
    embeds = outputs(
        "WanVideoUni3C_embeds",
        controlnet=control,
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
        render_latent={"samples": _latents(inputs, 131)},
        offload=offload,
    )
    return {"uni3c_embeds": embeds}


def _fill(module: nn.Module, seed: int) -> None:
    """Random weights in bf16, as a loader leaves them."""
    module.load_state_dict(tiny_families.drawn(module, seed), strict=False)
    module.eval().requires_grad_(False).to(torch.bfloat16)


FAMILIES: dict[str, Callable[[Inputs], Inputs]] = {
    "s2v": s2v,
    "one_to_all": one_to_all,
    "animate": animate,
    "uni3c_offload": lambda inputs: uni3c(inputs, offload=True),
    "uni3c_stay": lambda inputs: uni3c(inputs, offload=False),
}
"""By name."""
