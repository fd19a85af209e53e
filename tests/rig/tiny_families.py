"""Small random models of the families that only the wrapper runs, in its files; run by comfy_process.py only.

Names and shapes are those of the wrapper's own modules at a small width, built without memory, so that a file has what
the loader looks for. Where the loader renames weights, the file has the names that they have before.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from comfy_loading import DEVICE, wrapper_module
from tiny_wan import BLOCKS, CHANNELS, FFN_WIDTH, PATCH, WIDTH, Weights
from torch import nn

HEADS = 12

ONE_TO_ALL_BLOCKS, REFERENCE_BLOCKS = 10, 9
"""Of the control net beside the main blocks, and of what extracts the reference."""

REFERENCE_CHANNELS = 32
"""Of a reference latent with its mask's."""

AUDIO_CHANNELS = 20
"""Of Ovi's audio latents."""

PORTRAIT_WIDTH = 128
"""Of FantasyPortrait's tokens."""

LONGVIE2 = {"dim": WIDTH, "ffn_dim": FFN_WIDTH, "eps": 1e-06, "num_heads": HEADS, "control_layers": 12}
"""What the wrapper builds for the width of the 14B models only."""

LONGCAT_WIDTH, LONGCAT_BLOCKS = 4096, 3
"""The wrapper knows LongCat by its width, in each block, too; the real one has 48 blocks of 0.7 GB."""


def without_memory(make: Callable[[], nn.Module]) -> nn.Module:
    """A module whose weights have names and shapes only."""
    with torch.device("meta"):
        return make()


def drawn(module: nn.Module, seed: int, prefix: str = "") -> Weights:
    """Random weights for each parameter of a module."""
    pool = torch.randn(1 << 22, generator=torch.Generator().manual_seed(seed))
    begin, weights = 0, {}
    for name, parameter in module.named_parameters():
        around, scale = _distribution(name, parameter)
        places = (begin + torch.arange(parameter.numel())) % pool.numel()
        weights[prefix + name] = around + pool[places].view(parameter.shape) * scale
        begin += parameter.numel() + 1  # 1: no two tensors of one shape are alike
    return weights


def _distribution(name: str, parameter: torch.Tensor) -> tuple[float, float]:
    """Middle and width of a weight's numbers, such that activations neither vanish nor grow."""
    if name.endswith("modulation"):
        return 0.0, 0.2
    if "motion_encoder" in name and parameter.dim() > 1:
        return 0.0, 1.0  # its layers scale by themselves
    if parameter.dim() < 2:
        return (1.0, 0.02) if name.endswith(("weight", "gamma")) else (0.0, 0.02)
    return 0.0, (parameter.numel() / parameter.shape[0]) ** -0.5


def wan_model(**config: object) -> nn.Module:
    """The wrapper's model as the loader builds it for these settings, without memory."""
    wanted = {
        "dim": WIDTH,
        "in_features": WIDTH,
        "out_features": WIDTH,
        "ffn_dim": FFN_WIDTH,
        "ffn2_dim": FFN_WIDTH,
        "num_heads": HEADS,
        "num_layers": BLOCKS,
        "main_device": DEVICE,
        "dtype": torch.bfloat16,
    }
    model = without_memory(lambda: wrapper_module("wanvideo.modules.model").WanModel(**wanted | config))
    for block in model.blocks:
        # The wrapper builds them with one input, since it gives a flag in the place of the width, and then puts in what
        # the file has.
        for name in ("k", "v") if hasattr(block, "cross_attn") else ():
            width = block.dim
            setattr(block.cross_attn, name, without_memory(lambda width=width: nn.Linear(width, width)))
    return model


def _in_bf16(weights: Weights) -> Weights:
    return {name: tensor.bfloat16() for name, tensor in weights.items()}


def _s2v() -> Weights:
    return drawn(wan_model(model_type="s2v", cond_dim=CHANNELS, enable_adain=True, zero_timestep=True), 11)


def _one_to_all() -> Weights:
    """As apply in the loader, with the channels that the file's own convolutions have."""
    encoders, extractor = wrapper_module("onetoall.controlnet"), wrapper_module("onetoall.refextractor_2d")
    widths = {"ffn_dim": FFN_WIDTH, "ffn2_dim": FFN_WIDTH, "num_heads": HEADS}
    features = {"in_features": WIDTH, "out_features": WIDTH}

    def build() -> nn.Module:
        model = wan_model()
        small = {"norm_num_groups": 4, "layers_per_block": 1}
        model.image_to_cond = encoders.MiniEncoder2D(
            in_channels=REFERENCE_CHANNELS,
            out_channels=CHANNELS,
            down_block_types=("DownEncoderBlockInflated",) * 3,
            block_out_channels=(16, 16, 16),
            spatial_compression_ratio=1,
            **small,
        )
        model.input_hint_block = encoders.MiniHunyuanEncoder(
            in_channels=3,
            out_channels=WIDTH,
            block_out_channels=(16, 16, 16, 16),
            spatial_compression_ratio=16,
            **small,
        )
        model.controlnet = nn.Module()
        model.controlnet.blocks = nn.ModuleList(
            extractor.WanAttentionBlock(**features, **widths) for _ in range(ONE_TO_ALL_BLOCKS)
        )
        model.controlnet_zero = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(ONE_TO_ALL_BLOCKS))
        model.refextractor = extractor.WanRefextractor(
            in_dim=REFERENCE_CHANNELS, dim=WIDTH, num_layers=REFERENCE_BLOCKS, **features, **widths
        )
        norm = wrapper_module("wanvideo.modules.model").WanRMSNorm
        for block in model.blocks:
            block.ref_attn_k_img, block.ref_attn_v_img = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            block.ref_attn_norm_k_img = norm(WIDTH)
        return model

    return drawn(without_memory(build), 12)


def _animate() -> Weights:
    weights = drawn(wan_model(model_type="i2v", in_dim=2 * CHANNELS + 4, is_wananimate=True), 13)
    return {re.sub(r"^blocks\.(\d+)\.fuser_block", _face_adapter, name): tensor for name, tensor in weights.items()}


def _face_adapter(found: re.Match[str]) -> str:
    return f"face_adapter.fuser_blocks.{int(found[1]) // 5}"


def _with(**named: Callable[[], nn.Module]) -> nn.Module:
    """A module of modules by their names; a double underscore stands for a dot."""
    whole = nn.Module()
    for name, make in named.items():
        *path, last = name.split("__")
        inside = whole
        for step in path:
            if not hasattr(inside, step):
                inside.add_module(step, nn.Module())
            inside = getattr(inside, step)
        inside.add_module(last, make())
    return whole


def _in_blocks(seed: int, **named: Callable[[], nn.Module]) -> Weights:
    """Weights of modules that each block gets; a double underscore stands for a dot."""
    return drawn(without_memory(lambda: nn.ModuleList(_with(**named) for _ in range(BLOCKS))), seed, "blocks.")


def _ovi() -> Weights:
    """Two models whose blocks look at each other's tokens."""
    model = wrapper_module("wanvideo.modules.model")
    video, audio = wan_model(), wan_model(patch_size=[1], in_dim=AUDIO_CHANNELS, out_dim=AUDIO_CHANNELS)
    for block in [*video.blocks, *audio.blocks]:
        fusion = without_memory(
            lambda: _with(
                k_fusion=lambda: nn.Linear(WIDTH, WIDTH),
                v_fusion=lambda: nn.Linear(WIDTH, WIDTH),
                pre_attn_norm_fusion=lambda: model.WanLayerNorm(WIDTH, elementwise_affine=True),
                norm_k_fusion=lambda: model.WanRMSNorm(WIDTH),
            )
        )
        for name, module in fusion.named_children():
            setattr(block.cross_attn, name, module)
    weights = drawn(video, 15, "video_model.") | drawn(audio, 16, "audio_model.")
    return {name.replace(".modulation", ".modulation.modulation"): tensor for name, tensor in weights.items()}


def _multitalk() -> Weights:
    talk, model = wrapper_module("multitalk.multitalk"), wrapper_module("wanvideo.modules.model")
    inside = _in_blocks(
        17,
        norm_x=lambda: model.WanLayerNorm(WIDTH, elementwise_affine=True),
        audio_cross_attn=lambda: talk.SingleStreamMultiAttention(dim=WIDTH, num_heads=HEADS),
    )
    return drawn(without_memory(talk.AudioProjModel), 18, "audio_proj.") | inside


def _fantasytalking() -> Weights:
    width = 2048  # what the loader asks for
    condition = wrapper_module("fantasytalking.model").FantasyTalkingAudioConditionModel
    inside = _in_blocks(
        19,
        cross_attn__k_proj=lambda: nn.Linear(width, WIDTH, bias=False),
        cross_attn__v_proj=lambda: nn.Linear(width, WIDTH, bias=False),
    )
    return drawn(without_memory(lambda: condition(audio_in_dim=768, audio_proj_dim=width)), 20) | inside


def _fantasyportrait() -> Weights:
    adapter = wrapper_module("fantasyportrait.model").PortraitAdapter
    inside = _in_blocks(
        21,
        cross_attn__ip_adapter_single_stream_k_proj=lambda: nn.Linear(PORTRAIT_WIDTH, WIDTH, bias=False),
        cross_attn__ip_adapter_single_stream_v_proj=lambda: nn.Linear(PORTRAIT_WIDTH, WIDTH, bias=False),
    )
    widths = {"adapter_in_dim": PORTRAIT_WIDTH, "adapter_proj_dim": PORTRAIT_WIDTH}
    return drawn(without_memory(lambda: adapter(**widths, dtype=torch.bfloat16)), 22) | {
        f"ip_adapter.{name}": tensor for name, tensor in inside.items()
    }


def _lynx() -> Weights:
    lynx = wrapper_module("lynx.modules")
    return _in_blocks(
        23,
        self_attn__ref_adapter=lambda: lynx.WanLynxRefAttention(dim=WIDTH),
        cross_attn__ip_adapter=lambda: lynx.WanLynxIPCrossAttention(cross_attention_dim=WIDTH, dim=WIDTH),
    )


def _recammaster() -> Weights:
    inside = _in_blocks(25, cam_encoder=lambda: nn.Linear(12, WIDTH), projector=lambda: nn.Linear(WIDTH, WIDTH))
    return drawn(wan_model(), 24) | inside


def _humo() -> Weights:
    return drawn(wan_model(in_dim=2 * CHANNELS + 4, humo_audio=True), 26)


def _scail() -> Weights:
    pose = _with(patch_embedding_pose=lambda: nn.Conv3d(CHANNELS + 4, WIDTH, PATCH, PATCH))
    return drawn(wan_model(model_type="i2v", in_dim=CHANNELS + 4), 27) | drawn(pose, 28)


def _longvie2() -> Weights:
    control = without_memory(lambda: wrapper_module("LongVie2.modules").WanModelDualControl(**LONGVIE2))
    weights = drawn(wan_model(model_type="i2v", in_dim=2 * CHANNELS + 4), 29)
    for name, tensor in drawn(control, 30).items():
        kind, _, rest = name.partition(".")
        if kind in ("control_blocks_dense", "control_blocks_sparse", "control_combine_linears"):
            index, _, rest = rest.partition(".")
            weights[f"blocks.{index}.{kind}.{rest}"] = tensor
        else:
            weights[f"dual_controller.{name}"] = tensor
    return weights


def _skyreels_v3() -> Weights:
    return drawn(wan_model(), 32) | _multitalk()


def _steadydancer() -> Weights:
    archs, dynamic = wrapper_module("steadydancer.small_archs"), wrapper_module("steadydancer.mobilenetv2_dcd")

    def temporal() -> nn.Module:
        def once() -> nn.Module:
            return archs.FactorConv3d(in_channels=CHANNELS, out_channels=CHANNELS, kernel_size=(3, 3, 3))

        return nn.Sequential(once(), nn.SiLU(), once(), nn.SiLU(), once(), nn.SiLU())

    latents = 2 * CHANNELS + 4
    condition = without_memory(
        lambda: _with(
            patch_embedding_fuse=lambda: nn.Conv3d(latents + 2 * CHANNELS, WIDTH, PATCH, PATCH),
            patch_embedding_ref_c=lambda: nn.Conv3d(CHANNELS, WIDTH, PATCH, PATCH),
            condition_embedding_spatial=lambda: dynamic.DYModule(inp=CHANNELS, oup=CHANNELS),
            condition_embedding_temporal=temporal,
            condition_embedding_align=lambda: archs.PoseRefNetNoBNV3(CHANNELS, CHANNELS, hidden_dim=128),
        )
    )
    return drawn(wan_model(model_type="i2v", in_dim=latents), 33) | drawn(condition, 34)


def _flashvsr() -> Weights:
    """With few of the channels of the convolutions, which take what the file has."""
    shapes = {
        "conv1.weight": (64, 3 * 16 * 16, 4, 3, 3),
        "conv1.bias": (64,),
        "norm1.gamma": (64, 1, 1, 1),
        "conv2.weight": (64, 64, 4, 3, 3),
        "conv2.bias": (64,),
        "norm2.gamma": (64, 1, 1, 1),
        "linear_layers.0.weight": (WIDTH, 64),
        "linear_layers.0.bias": (WIDTH,),
    }
    made = torch.Generator().manual_seed(35)
    projection = {
        f"LQ_proj_in.{name}": torch.randn(shape, generator=made) * shape[-1] ** -0.5 * 0.1
        for name, shape in shapes.items()
    }
    return drawn(wan_model(), 36) | projection


def _fun_control() -> Weights:
    return drawn(wan_model(in_dim=3 * CHANNELS, add_ref_conv=True, in_dim_ref_conv=CHANNELS), 37)


def _fun_camera() -> Weights:
    return drawn(wan_model(in_dim=2 * CHANNELS + 4, add_control_adapter=True), 38)


def _minimax_remover() -> Weights:
    weights = drawn(wan_model(model_type="no_cross_attn", in_dim=3 * CHANNELS), 40)
    return {name: tensor for name, tensor in weights.items() if not name.startswith("text_embedding.")}


def _mtv() -> Weights:
    return drawn(wan_model(use_motion_attn=True), 41)


def _longcat_avatar() -> Weights:
    width, heads = LONGCAT_WIDTH, LONGCAT_WIDTH // 128
    widths = {"dim": width, "in_features": width, "out_features": width, "ffn2_dim": width}
    model = wan_model(**widths, num_heads=heads, num_layers=LONGCAT_BLOCKS, is_longcat=True)
    layers, norm = wrapper_module("LongCat.layers"), wrapper_module("wanvideo.modules.model").WanLayerNorm
    flags = {"qkv_bias": True, "qk_norm": True, "class_range": 24, "class_interval": 4}
    for block in model.blocks:
        block.audio_modulation = without_memory(lambda: nn.Sequential(nn.SiLU(), nn.Linear(512, 3 * width)))
        block.norm_x = without_memory(lambda: norm(width, elementwise_affine=True))
        block.audio_cross_attn = without_memory(
            lambda: layers.SingleStreamAttention(dim=width, num_heads=heads, encoder_hidden_states_dim=768, **flags)
        )
    projection = without_memory(wrapper_module("multitalk.multitalk").AudioProjModel)
    return drawn(model, 42) | drawn(projection, 43, "multitalk_audio_proj.")


def _stand_in() -> Weights:
    lora = wrapper_module("wanvideo.modules.model").LoRALinearLayer
    inside = _in_blocks(39, **{f"self_attn__{one}_loras": lambda: lora(WIDTH, WIDTH, device="meta") for one in "qkv"})
    return {f"diffusion_model.{name}": tensor for name, tensor in inside.items()}


def _made(**makers: Callable[[], Weights]) -> dict[str, Callable[[], Weights]]:
    return {f"diffusion_models/{name}.safetensors": lambda make=make: _in_bf16(make()) for name, make in makers.items()}


FILES: dict[str, Callable[[], Weights]] = _made(
    s2v=_s2v,
    one_to_all=_one_to_all,
    animate=_animate,
    ovi=_ovi,
    multitalk=_multitalk,
    fantasytalking=_fantasytalking,
    fantasyportrait=_fantasyportrait,
    lynx=_lynx,
    recammaster=_recammaster,
    humo=_humo,
    scail=_scail,
    longvie2=_longvie2,
    skyreels_v3=_skyreels_v3,
    steadydancer=_steadydancer,
    flashvsr=_flashvsr,
    fun_control=_fun_control,
    fun_camera=_fun_camera,
    minimax_remover=_minimax_remover,
    mtv=_mtv,
    longcat_avatar=_longcat_avatar,
) | {"loras/stand_in.safetensors": lambda: _in_bf16(_stand_in())}
