"""What the sampler gets of each family that only the wrapper runs, by its own nodes; run by comfy_process.py only.

Audio and images are random; what a VAE or another encoder makes of them is a stand-in's, or random, too.
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

ALWAYS = {"start_percent": 0.0, "end_percent": 1.0}
FULLY = {"strength": 1.0, **ALWAYS}
"""Inputs that many nodes have."""


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

    def encode(self, videos: list[torch.Tensor], device: torch.device, **options: object) -> torch.Tensor:
        """The latents of videos (channels, frames, height, width)."""
        pooled = [nn.functional.avg_pool2d(video[:, ::4].float().cpu(), 8) for video in videos]
        latents = [torch.einsum("dc,cthw->dthw", self._channels, one) for one in pooled]
        return torch.stack(latents).to(device, self.dtype)

    def decode(self, latents: torch.Tensor, device: torch.device, **options: object) -> torch.Tensor:
        """The videos of latents (batch, channels, frames, height, width)."""
        frames, height, width = latents.shape[2:]
        size = 4 * frames - 3, 8 * height, 8 * width
        return nn.functional.interpolate(latents[:, :3].float().cpu(), size=size).to(device)


def normal(*shape: int, seed: int) -> torch.Tensor:
    """Random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


VAE = StandInVae()


def images(frames: int, width: int, height: int, seed: int) -> torch.Tensor:
    """Random images as ComfyUI has them: (frames, height, width, 3), from 0 to 1."""
    return torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(seed))


def _size(inputs: Inputs) -> dict[str, int]:
    _, _, height, width = inputs["image_embeds"]["target_shape"]
    return {"width": 8 * width, "height": 8 * height, "num_frames": inputs["image_embeds"]["num_frames"]}


def _video(inputs: Inputs, seed: int, frames: int | None = None) -> torch.Tensor:
    """Random images of the video's size."""
    size = _size(inputs)
    return images(frames or size["num_frames"], size["width"], size["height"], seed)


def _latents(inputs: Inputs, seed: int, frames: int | None = None) -> dict[str, torch.Tensor]:
    """Random latents (1, channels, frames, height, width) of the video's size."""
    channels, whole, height, width = inputs["image_embeds"]["target_shape"]
    return {"samples": normal(1, channels, frames or whole, height, width, seed=seed)}


def _clip(seed: int) -> Inputs:
    """What CLIP sees in an image."""
    return {"clip_embeds": normal(1, 257, 1280, seed=seed).to(DEVICE)}


def _image_to_video(inputs: Inputs, seed: int) -> Inputs:
    """Embeds of a first image."""
    return outputs(
        "WanVideoImageToVideoEncode",
        noise_aug_strength=0.0,
        start_latent_strength=1.0,
        end_latent_strength=1.0,
        force_offload=True,
        vae=VAE,
        clip_embeds=_clip(seed),
        start_image=_video(inputs, seed, frames=1),
        **_size(inputs),
    )


def _fill(module: nn.Module, seed: int) -> None:
    """Random weights in bf16, as a loader leaves them."""
    module.load_state_dict(tiny_families.drawn(module, seed), strict=False)
    module.eval().requires_grad_(False).to(torch.bfloat16)


def s2v(inputs: Inputs) -> Inputs:
    """Audio, a reference and a pose."""
    frames = _size(inputs)["num_frames"]
    layers = [normal(1, 4 * frames, 1024, seed=seed) for seed in range(25)]
    embeds = outputs(
        "WanVideoAddS2VEmbeds",
        embeds=inputs["image_embeds"],
        frame_window_size=frames,
        audio_encoder_output={"encoded_audio_all_layers": layers},
        ref_latent=_latents(inputs, 101, frames=1),
        pose_latent=_latents(inputs, 102),
    )
    return {"image_embeds": embeds}


def s2v_framepack(inputs: Inputs) -> Inputs:
    """The same in two windows of 16 frames, the second of which sees how the first one moves."""
    embeds = s2v(inputs)["image_embeds"]
    packed = {"enable_framepack": True, "frame_window_size": 16, "num_repeat": 2, "vae": VAE}
    return {"image_embeds": embeds | {"audio_embeds": embeds["audio_embeds"] | packed}}


def one_to_all(inputs: Inputs) -> Inputs:
    """A reference and poses."""
    embeds, reference, poses = inputs["image_embeds"], _video(inputs, 111, frames=1), _video(inputs, 112)
    embeds = outputs("WanVideoAddOneToAllReferenceEmbeds", embeds=embeds, vae=VAE, ref_image=reference, **FULLY)
    return {"image_embeds": outputs("WanVideoAddOneToAllPoseEmbeds", embeds=embeds, pose_images=poses, **FULLY)}


def animate(inputs: Inputs) -> Inputs:
    """A reference, poses, a face, and what CLIP sees."""
    size = _size(inputs)
    embeds = outputs(
        "WanVideoAnimateEmbeds",
        vae=VAE,
        force_offload=True,
        frame_window_size=77,
        colormatch="disabled",
        pose_strength=1.0,
        face_strength=1.0,
        ref_images=_video(inputs, 121, frames=1),
        pose_images=_video(inputs, 122, frames=size["num_frames"] - 1),
        face_images=images(1, 512, 512, seed=123),
        clip_embeds=_clip(124),
        **size,
    )
    return {"image_embeds": embeds}


def uni3c(inputs: Inputs, *, offload: bool) -> Inputs:
    """Control by a net of the wrapper's class; its loader takes one width only, that of the 14B models."""
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
    control = wrapper_module("uni3c.controlnet").WanControlNet(config)
    control.proj_out = nn.ModuleList(nn.Linear(WIDTH // 2, WIDTH) for _ in range(20))
    _fill(control, 14)
    control.controlnet_patch_embedding.float()
    # A net that is to stay must have been loaded to the device: the wrapper takes one that is elsewhere there in part,
    # as soon as blocks are swapped, and then its forward fails.
    control.to(HOST if offload else DEVICE)
    render = _latents(inputs, 131)
    return {
        "uni3c_embeds": outputs(
            "WanVideoUni3C_embeds", controlnet=control, render_latent=render, offload=offload, **FULLY
        )
    }


def controlnet(inputs: Inputs) -> Inputs:
    """Control by a net of the wrapper's class; its loader takes one width only, that of the real files."""
    control = wrapper_module("controlnet.wan_controlnet").WanControlnet(
        num_attention_heads=4,
        attention_head_dim=32,
        ffn_dim=FFN_WIDTH,
        num_layers=6,
        cross_attn_norm=None,
        out_proj_dim=WIDTH,
    )
    _fill(control, 31)
    model = outputs(
        "WanVideoControlnet",
        model=inputs["model"],
        controlnet=control,
        control_images=_video(inputs, 141),
        strength=1.0,
        control_stride=3,
        control_start_percent=0.0,
        control_end_percent=1.0,
    )
    return {"model": model}


def multitalk(inputs: Inputs) -> Inputs:
    """One speaker; the keys are those of MultiTalkWav2VecEmbeds."""
    features = normal(_size(inputs)["num_frames"], 12, 768, seed=151)
    audio = {"audio_features": [features], "audio_scale": 1.0, "audio_cfg_scale": 1.0, "ref_target_masks": None}
    return {"multitalk_embeds": audio}


def fantasytalking(inputs: Inputs) -> Inputs:
    """The keys are those of FantasyTalkingWav2VecEmbeds."""
    frames = inputs["image_embeds"]["target_shape"][1]
    audio = {"audio_proj": normal(1, frames, 9, 2048, seed=161).bfloat16(), "audio_scale": 1.0, "audio_cfg_scale": 1.0}
    return {"fantasytalking_embeds": audio}


def fantasyportrait(inputs: Inputs) -> Inputs:
    """An expression for each frame."""
    frames = inputs["image_embeds"]["target_shape"][1]
    expressions = normal(1, frames, 9, tiny_families.PORTRAIT_WIDTH, seed=171).to(DEVICE, torch.bfloat16)
    embeds = outputs(
        "WanVideoAddFantasyPortrait", embeds=inputs["image_embeds"], portrait_embeds=expressions, strength=1.0
    )
    return {"image_embeds": embeds}


def lynx(inputs: Inputs) -> Inputs:
    """A face and a reference, of which a forward before the first step makes features."""
    embeds = outputs(
        "WanVideoAddLynxEmbeds",
        embeds=inputs["image_embeds"],
        ip_scale=1.0,
        ref_scale=1.0,
        lynx_cfg_scale=1.0,
        vae=VAE,
        lynx_ip_embeds={"ip_x": normal(1, 16, WIDTH, seed=181), "ip_x_uncond": normal(1, 16, WIDTH, seed=182)},
        ref_image=_video(inputs, 183, frames=1),
        ref_text_embed=inputs["text_embeds"],
        **ALWAYS,
    )
    return {"image_embeds": embeds}


def recammaster(inputs: Inputs) -> Inputs:
    """A video and a camera's path."""
    poses = outputs("WanVideoReCamMasterGenerateOrbitCamera", degrees=90, num_frames=_size(inputs)["num_frames"])
    embeds = outputs("WanVideoReCamMasterCameraEmbed", camera_poses=poses, latents=_latents(inputs, 191))
    return {"image_embeds": embeds}


def humo(inputs: Inputs) -> Inputs:
    """Audio, without a reference; Whisper is left out."""
    embeds = outputs(
        "HuMoEmbeds",
        audio_scale=1.0,
        audio_cfg_scale=1.0,
        audio_start_percent=0.0,
        audio_end_percent=1.0,
        whisper_model={"model": None, "feature_extractor": None, "dtype": torch.bfloat16},
        vae=VAE,
        **_size(inputs),
    )
    return {"image_embeds": embeds | {"humo_audio_emb": normal(20, 5, 1280, seed=201)}}


def scail(inputs: Inputs) -> Inputs:
    """A reference, poses, and what CLIP sees."""
    embeds, reference, poses = inputs["image_embeds"], _video(inputs, 211, frames=1), _video(inputs, 213)
    seen = {"vae": VAE, "clip_embeds": _clip(212)}
    embeds = outputs("WanVideoAddSCAILReferenceEmbeds", embeds=embeds, ref_image=reference, **seen, **FULLY)
    return {"image_embeds": outputs("WanVideoAddSCAILPoseEmbeds", embeds=embeds, vae=VAE, pose_images=poses, **FULLY)}


def longvie2(inputs: Inputs) -> Inputs:
    """A first image and two videos that control."""
    embeds = outputs(
        "WanVideoAddDualControlEmbeds",
        embeds=_image_to_video(inputs, 221),
        vae=VAE,
        first_frame_noise_level=0.925926,
        dense=_video(inputs, 222),
        sparse=_video(inputs, 223),
        **FULLY,
    )
    return {"image_embeds": embeds}


def steadydancer(inputs: Inputs) -> Inputs:
    """A first image and poses."""
    torch.manual_seed(0)  # the wrapper leaves a dropout of its modules active
    embeds = outputs(
        "WanVideoAddSteadyDancerEmbeds",
        embeds=_image_to_video(inputs, 251),
        pose_latents_positive=_latents(inputs, 252),
        pose_strength_spatial=1.0,
        pose_strength_temporal=1.0,
        **ALWAYS,
    )
    return {"image_embeds": embeds}


def minimax_remover(inputs: Inputs) -> Inputs:
    """A video and a mask of what is to go."""
    video, mask = _latents(inputs, 291), _latents(inputs, 292)
    embeds = outputs("WanVideoMiniMaxRemoverEmbeds", latents=video, mask_latents=mask, **_size(inputs))
    return {"image_embeds": embeds}


def mtv(inputs: Inputs) -> Inputs:
    """Motion of 24 joints; the wrapper fills its tokens up to the width of the 14B models."""
    joints, frames = 24, inputs["image_embeds"]["target_shape"][1]
    inputs["model"].model.diffusion_model.pad_motion_tokens = torch.zeros(1, 1, WIDTH // 2)
    motion = {
        "mtv_motion_tokens": normal(1, frames * joints, WIDTH // 2, seed=301).to(DEVICE),
        "global_mean": normal(joints, 3, seed=302).numpy(),
        "global_std": normal(joints, 3, seed=303).numpy(),
    }
    embeds = outputs("WanVideoAddMTVMotion", embeds=inputs["image_embeds"], mtv_crafter_motion=motion, **FULLY)
    return {"image_embeds": embeds}


def phantom(inputs: Inputs) -> Inputs:
    """A reference behind the frames."""
    embeds = outputs(
        "WanVideoPhantomEmbeds",
        num_frames=_size(inputs)["num_frames"],
        phantom_cfg_scale=5.0,
        phantom_start_percent=0.0,
        phantom_end_percent=1.0,
        phantom_latent_1=_latents(inputs, 231, frames=1),
    )
    return {"image_embeds": embeds}


def mocha(inputs: Inputs) -> Inputs:
    """A video, a mask and a reference."""
    embeds = outputs(
        "MochaEmbeds",
        vae=VAE,
        force_offload=True,
        input_video=_video(inputs, 241),
        mask=_video(inputs, 242, frames=1)[..., 0],
        ref1=_video(inputs, 243, frames=1),
    )
    return {"image_embeds": embeds}


def flashvsr(inputs: Inputs) -> Inputs:
    """A video to be enhanced."""
    embeds, video = inputs["image_embeds"], _video(inputs, 261)
    return {"image_embeds": outputs("WanVideoAddFlashVSRInput", embeds=embeds, images=video, strength=1.0)}


def fun_control(inputs: Inputs) -> Inputs:
    """A video that controls, and a reference."""
    reference = _latents(inputs, 272, frames=1)
    embeds = outputs("WanVideoControlEmbeds", latents=_latents(inputs, 271), fun_ref_image=reference, **ALWAYS)
    return {"image_embeds": embeds}


def fun_camera(inputs: Inputs) -> Inputs:
    """A camera that moves to the side."""
    size = _size(inputs)
    frames = size.pop("num_frames")
    poses = [[0, 0.5, 0.9, 0.5, 0.5, 0, 0, 1, 0, 0, 0.1 * at, 0, 1, 0, 0, 0, 0, 1, 0] for at in range(frames)]
    return {"image_embeds": outputs("WanVideoFunCameraEmbeds", poses=poses, **size, **FULLY)}


def longcat_avatar(inputs: Inputs) -> Inputs:
    """Audio and a reference; the first frames are those of a video before."""
    features = normal(4 * _size(inputs)["num_frames"], 12, 768, seed=251)
    audio = {"audio_features": [features], "audio_scale": 1.0, "audio_cfg_scale": 1.0}
    given = nodes.NODE_CLASS_MAPPINGS["WanVideoLongCatAvatarExtendEmbeds"].execute(
        prev_latents=_latents(inputs, 252),
        audio_embeds=audio,
        num_frames=_size(inputs)["num_frames"],
        overlap=1,
        if_not_enough_audio="pad_with_start",
        frames_processed=0,
        ref_frame_index=10,
        ref_mask_frame_range=3,
        ref_latent=_latents(inputs, 253),
    )
    return {"image_embeds": given.args[0]}


def stand_in(inputs: Inputs) -> Inputs:
    """A face, whose keys and values the first forward keeps for the others."""
    face = _latents(inputs, 281, frames=1)
    embeds = outputs("WanVideoAddStandInLatent", embeds=inputs["image_embeds"], ip_image_latent=face, freq_offset=1)
    return {"image_embeds": embeds}


def control_lora(inputs: Inputs) -> Inputs:
    """A control video in all steps. Where it is for some only, the wrapper fails in the others."""
    video = {"latents": _latents(inputs, 291), "start_percent": 0.0, "end_percent": 1.0}
    return {"image_embeds": outputs("WanVideoControlEmbeds", **video)}


FAMILIES: dict[str, Callable[[Inputs], Inputs]] = {
    "s2v": s2v,
    "s2v_framepack": s2v_framepack,
    "one_to_all": one_to_all,
    "animate": animate,
    "uni3c_offload": lambda inputs: uni3c(inputs, offload=True),
    "uni3c_stay": lambda inputs: uni3c(inputs, offload=False),
    "controlnet": controlnet,
    "ovi": lambda inputs: {},
    "multitalk": multitalk,
    "fantasytalking": fantasytalking,
    "fantasyportrait": fantasyportrait,
    "lynx": lynx,
    "recammaster": recammaster,
    "humo": humo,
    "scail": scail,
    "longvie2": longvie2,
    "steadydancer": steadydancer,
    "minimax_remover": minimax_remover,
    "mtv": mtv,
    "phantom": phantom,
    "mocha": mocha,
    "flashvsr": flashvsr,
    "fun_control": fun_control,
    "fun_camera": fun_camera,
    "longcat_avatar": longcat_avatar,
    "stand_in": stand_in,
    "control_lora": control_lora,
}
"""By name."""
