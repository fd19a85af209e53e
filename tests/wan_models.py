"""Headers of the model files that ComfyUI-WanVideoWrapper loads.

They are rebuilt from the layers of each architecture: in the blocks every tensor, outside them the large ones and those
by which the family is known. Files have the names that the wrapper's workflows give them; where these name none, the
name says what the file is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from checkpoint_files import Header, Shapes, block_shapes, embedding_shapes

WIDTHS = {"1.3B": (1536, 8960, 30), "5B": (3072, 14336, 30), "14B": (5120, 13824, 40)}
FUSED_BLOCKS = range(0, 40, 5)


def linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def conv(name: str, outputs: int, inputs: int, *kernel: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, *(kernel or (1, 2, 2))), f"{name}.bias": (outputs,)}


def joined(parts: Iterable[Shapes]) -> Shapes:
    return {name: shape for part in parts for name, shape in part.items()}


def under(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}{name}": shape for name, shape in shapes.items()}


def in_blocks(shapes: Shapes, blocks: Iterable[int], prefix: str = "blocks") -> Shapes:
    return joined(under(f"{prefix}.{number}.", shapes) for number in blocks)


def attention(name: str, width: int, context: int | None = None) -> Shapes:
    sides = {"q": width, "k": context or width, "v": context or width, "o": width}
    layers = joined(linear(f"{name}.{side}", width, inputs) for side, inputs in sides.items())
    return layers | {f"{name}.norm_q.weight": (width,), f"{name}.norm_k.weight": (width,)}


def image_attention(width: int) -> Shapes:
    sides = joined(linear(f"cross_attn.{side}_img", width, width) for side in "kv")
    return sides | {"cross_attn.norm_k_img.weight": (width,)}


def image_embedding(width: int) -> Shapes:
    return joined(
        [
            norm("img_emb.proj.0", 1280),
            linear("img_emb.proj.1", 1280, 1280),
            linear("img_emb.proj.3", width, 1280),
            norm("img_emb.proj.4", width),
        ]
    )


def wan(size: str, channels: int = 16, *, image: bool = False) -> Shapes:
    """Wan 2.1 and 2.2: `channels` go in; with `image`, the image embedding of 2.1's I2V."""
    width, ffn, blocks = WIDTHS[size]
    latents = 48 if size == "5B" else 16
    block = block_shapes(width, ffn) | (image_attention(width) if image else {})
    head = linear("head.head", 4 * latents, width) | {"head.modulation": (1, 2, width)}
    start = conv("patch_embedding", width, channels) | embedding_shapes(width)
    return start | in_blocks(block, range(blocks)) | head | (image_embedding(width) if image else {})


def vace_module(size: str) -> Shapes:
    width, ffn, _ = WIDTHS[size]
    block = block_shapes(width, ffn) | linear("after_proj", width, width)
    blocks = in_blocks(block, range(8 if size == "14B" else 15), "vace_blocks")
    return conv("vace_patch_embedding", width, 96) | blocks | linear("vace_blocks.0.before_proj", width, width)


def talk_module() -> Shapes:
    """MultiTalk and InfiniteTalk."""
    width = 5120
    block = joined(
        [
            linear("audio_cross_attn.q_linear", width, width),
            linear("audio_cross_attn.proj", width, width),
            linear("audio_cross_attn.kv_linear", 2 * width, 768),
            norm("norm_x", width),
        ]
    )
    return in_blocks(block, range(40)) | audio_projection("audio_proj", 46080)


def audio_projection(name: str, inputs: int) -> Shapes:
    return joined(
        [
            linear(f"{name}.proj1", 512, inputs),
            linear(f"{name}.proj1_vf", 512, inputs * 8 // 5),
            linear(f"{name}.proj2", 512, 512),
            linear(f"{name}.proj3", 24576, 512),
            norm(f"{name}.norm", 768),
        ]
    )


def animate(*, fused: bool) -> Shapes:
    """Wan 2.2 Animate; its face fusers in the blocks (`fused`), or in a list of their own as Comfy-Org stores them."""
    width = 5120
    fuser = joined(
        [
            linear("linear1_kv", 2 * width, width),
            linear("linear1_q", width, width),
            linear("linear2", width, width),
            {"q_norm.weight": (128,), "k_norm.weight": (128,)},
        ]
    )
    places = [f"blocks.{n}.fuser_block." if fused else f"face_adapter.fuser_blocks.{n // 5}." for n in FUSED_BLOCKS]
    faces = joined(under(place, fuser) for place in places)
    return wan("14B", 36, image=True) | conv("pose_patch_embedding", width, 16) | faces | face_encoder()


def face_encoder() -> Shapes:
    return joined(
        [
            conv("face_encoder.conv1_local.conv", 4096, 512, 3),
            conv("face_encoder.conv2.conv", 1024, 1024, 3),
            linear("face_encoder.out_proj", 5120, 1024),
            {"motion_encoder.dec.direction.weight": (512, 20), "face_encoder.padding_tokens": (1, 1, 1, 5120)},
        ]
    )


def longcat(*, avatar: bool = False) -> Shapes:
    width, ffn = 4096, 11008
    block = block_shapes(width, ffn)
    del block["modulation"]
    block = {name: shape for name, shape in block.items() if not name.startswith("ffn.")}
    block |= dict.fromkeys((f"{a}_attn.norm_{s}.weight" for a in ("self", "cross") for s in "qk"), (128,))
    block |= {"ffn.w1.weight": (ffn, width), "ffn.w2.weight": (width, ffn), "ffn.w3.weight": (ffn, width)}
    block |= linear("modulation.1", 6 * width, 512)
    if avatar:
        block |= joined(
            [
                linear("audio_modulation.1", 3 * width, 512),
                norm("norm_x", width),
                linear("audio_cross_attn.q_linear", width, width),
                linear("audio_cross_attn.proj", width, width),
                linear("audio_cross_attn.kv_linear", 2 * width, 768),
                {"audio_cross_attn.q_norm.weight": (128,), "audio_cross_attn.k_norm.weight": (128,)},
            ]
        )
    return joined(
        [
            conv("patch_embedding", width, 16),
            linear("text_embedding.0", width, 4096),
            linear("text_embedding.2", width, width),
            linear("time_embedding.mlp.0", 512, 256),
            linear("time_embedding.mlp.2", 512, 512),
            in_blocks(block, range(48)),
            linear("head.head", 64, width),
            linear("head.modulation.1", 2 * width, 512),
            audio_projection("multitalk_audio_proj", 46080) if avatar else {},
        ]
    )


def s2v() -> Shapes:
    width = 5120
    audio = joined(
        [
            attention("injector", width),
            linear("adain", 2 * width, width),
        ]
    )
    layers = joined(
        {
            name.replace("injector", f"audio_injector.injector.{number}").replace(
                "adain", f"audio_injector.injector_adain_layers.{number}.linear"
            ): shape
            for name, shape in audio.items()
        }
        for number in range(12)
    )
    return joined(
        [
            wan("14B"),
            conv("cond_encoder", width, 16),
            layers,
            conv("casual_audio_encoder.encoder.conv1_local.conv", width, 1024, 3),
            linear("casual_audio_encoder.encoder.final_linear", width, width),
            conv("frame_packer.proj_2x", width, 16, 2, 4, 4),
            {"trainable_cond_mask.weight": (3, width)},
        ]
    )


def humo(size: str) -> Shapes:
    width, _, blocks = WIDTHS[size]
    audio = attention("audio_cross_attn_wrapper.audio_cross_attn", width, 1536)
    audio |= norm("audio_cross_attn_wrapper.norm1_audio", width)
    glob = joined(
        linear(f"audio_proj.audio_proj_glob_{number}.layer", outputs, inputs)
        for number, outputs, inputs in ((1, 512, 51200), (2, 512, 512), (3, 24576, 512))
    )
    return wan(size, 36) | in_blocks(audio, range(blocks)) | glob


def ovi(half: str) -> Shapes:
    """One half of Ovi, with its layers for the other half's tokens."""
    width, ffn, blocks = WIDTHS["5B"]
    fusion = linear("cross_attn.k_fusion", width, width) | linear("cross_attn.v_fusion", width, width)
    fusion |= norm("cross_attn.pre_attn_norm_fusion", width) | {"cross_attn.norm_k_fusion.weight": (width,)}
    if half == "video":
        return wan("5B", 48) | in_blocks(fusion, range(blocks))
    start = conv("patch_embedding.0", width, 20, 7) | {"patch_embedding.2.w1.weight": (8192, width, 7)}
    ends = linear("head.head", 20, width) | {"head.modulation": (1, 2, width)}
    return start | embedding_shapes(width) | in_blocks(block_shapes(width, ffn) | fusion, range(blocks)) | ends


def lynx(part: str) -> Shapes:
    width = 5120
    if part == "ref":
        sides = joined(linear(f"self_attn.ref_adapter.to_{side}_ref", width, width) for side in "kv")
        return in_blocks(sides, range(40))
    if part == "full":
        sides = joined(linear(f"cross_attn.ip_adapter.to_{side}_ip", width, width) for side in "kv")
        return in_blocks(sides | {"cross_attn.ip_adapter.registers": (1, 16, width)}, range(40))
    lite = {f"cross_attn.ip_adapter.to_{side}_ip.weight": (width, 2048) for side in "kv"}
    return in_blocks(lite, range(0, 40, 2))


def mtv() -> Shapes:
    return in_blocks(attention("motion_attn", 5120) | norm("norm4", 5120), range(0, 40, 4))


def longvie() -> Shapes:
    half = block_shapes(2560, 6912)
    control = joined(under(f"control_blocks_{kind}.", half) for kind in ("dense", "sparse"))
    control |= linear("control_combine_linears", 5120, 2560)
    ends = linear("dual_controller.control_text_linear", 2560, 5120)
    return wan("14B", 36, image=True) | in_blocks(control, range(12)) | ends


def one_to_all() -> Shapes:
    width, ffn, blocks = WIDTHS["14B"]
    own = linear("ref_attn_k_img", width, width) | linear("ref_attn_v_img", width, width)
    own |= {"ref_attn_norm_k_img.weight": (width,)}
    side = in_blocks(block_shapes(width, ffn), range(7), "controlnet.blocks")
    side |= in_blocks(block_shapes(width, ffn), range(7), "refextractor.blocks")
    side |= joined(linear(f"controlnet_zero.{number}", width, width) for number in range(7))
    side |= conv("refextractor.patch_embedding", width, 16) | {"image_to_cond.conv_in.bias": (16,)}
    return wan("14B") | in_blocks(own, range(blocks)) | side


def fun_camera(channels: int, size: str = "14B", *, image: bool = False) -> Shapes:
    width = WIDTHS[size][0]
    adapter = conv("control_adapter.conv", width, 1536, 2, 2)
    adapter |= conv("control_adapter.residual_blocks.0.conv1", width, width, 3, 3)
    return wan(size, channels, image=image) | adapter


def fun_control(channels: int, size: str, *, image: bool = False) -> Shapes:
    return wan(size, channels, image=image) | conv("ref_conv", WIDTHS[size][0], 16, 2, 2)


def minimax() -> Shapes:
    """Without text: no cross-attention."""
    gone = ("text_embedding.", ".cross_attn.", ".norm3.")
    return {name: shape for name, shape in wan("1.3B", 48).items() if not any(part in name for part in gone)}


def recammaster() -> Shapes:
    return wan("1.3B") | in_blocks(linear("cam_encoder", 1536, 12) | linear("projector", 1536, 1536), range(30))


def sky_reels_v3() -> Shapes:
    return wan("14B", 36, image=True) | talk_module()


def flash_portrait() -> Shapes:
    emotion = {f"cross_attn.emo_{side}_proj.weight": (5120, 2048) for side in "kv"}
    return wan("14B", 36, image=True) | in_blocks(emotion, range(40))


def fantasy_talking() -> Shapes:
    audio = {f"cross_attn.{side}_proj.weight": (5120, 2048) for side in "kv"}
    return linear("proj_model.proj", 2048, 768) | in_blocks(audio, range(40))


def fantasy_portrait() -> Shapes:
    face = {f"cross_attn.ip_adapter_single_stream_{side}_proj.weight": (5120, 2048) for side in "kv"}
    return under("ip_adapter.", in_blocks(face, range(40))) | norm("proj_model.norm", 2048)


def uni3c() -> Shapes:
    layers = in_blocks(linear("ffn.0", 8192, 1024) | linear("ffn.2", 1024, 8192), range(20), "controlnet_blocks")
    return conv("controlnet_patch_embedding", 5120, 20) | layers


def sky_reels_df(size: str) -> Shapes:
    width = WIDTHS[size][0]
    return joined([wan(size), {"fps_embedding.weight": (2, width)}, linear("fps_projection.0", width, width)])


def extended(size: str, channels: int, *more: Shapes, image: bool = False) -> Shapes:
    return wan(size, channels, image=image) | joined(more)


def stored(shapes: Shapes, kind: str) -> Header:
    """The tensors as a file of this kind stores them: matrices of the blocks in the kind's type, with their scales."""
    found: Header = {}
    for name, shape in shapes.items():
        if "blocks." in name and len(shape) == 2 and name.endswith(".weight"):
            found |= KINDS[kind](name, *shape)
        else:
            found[name] = "F32" if kind == "F32" else "F16" if kind == "F16" else "BF16", shape
    if kind == "fp8_scaled":
        found["scaled_fp8"] = "F8_E4M3", (2,)
    return found


def _plain(dtype: str) -> Callable[[str, int, int], Header]:
    return lambda name, rows, columns: {name: (dtype, (rows, columns))}


def _comfy(dtype: str, scale: Callable[[int, int], Header], columns_per_byte: int = 1) -> Callable[..., Header]:
    """ComfyUI's own formats, with a marker beside each matrix."""

    def layer(name: str, rows: int, columns: int) -> Header:
        stem = name.removesuffix("weight")
        scales = {f"{stem}{end}": entry for end, entry in scale(rows, columns).items()}
        return {name: (dtype, (rows, columns // columns_per_byte)), f"{stem}comfy_quant": ("U8", (40,))} | scales

    return layer


def _scaled(end: str) -> Callable[[str, int, int], Header]:
    return lambda name, rows, columns: {
        name: ("F8_E4M3", (rows, columns)),
        name.removesuffix("weight") + end: ("F32", ()),
    }


KINDS: dict[str, Callable[[str, int, int], Header]] = {
    "BF16": _plain("BF16"),
    "F16": _plain("F16"),
    "F32": _plain("F32"),
    "fp8": _plain("F8_E4M3"),
    "fp8_e5m2": _plain("F8_E5M2"),
    "fp8_scaled": _scaled("scale_weight"),
    "fp8_weight_scale": _scaled("weight_scale"),
    "fp8_comfy": _comfy("F8_E4M3", lambda *_: {"weight_scale": ("F32", ())}),
    "mxfp8": _comfy("F8_E4M3", lambda rows, columns: {"weight_scale": ("U8", (rows, columns // 32))}),
    "nvfp4": _comfy(
        "U8",
        lambda rows, columns: {"weight_scale": ("F8_E4M3", (rows, columns // 16)), "weight_scale_2": ("F32", ())},
        2,
    ),
    "int8": _comfy("I8", lambda rows, _: {"weight_scale": ("F32", (rows, 1))}),
}
"""How kinds of files store a matrix of a block."""


@dataclass(frozen=True, slots=True)
class Published:
    """A model file.

    Attributes:
        name: Of the file, without its ending.
        family: What `plan` must call it.
        shapes: Makes its tensors.
        kind: A key of KINDS.
        prefix: Of its names.
    """

    name: str
    family: str
    shapes: Callable[[], Shapes]
    kind: str = "BF16"
    prefix: str = ""

    def header(self) -> Header:
        return {self.prefix + name: entry for name, entry in stored(self.shapes(), self.kind).items()}


T2V, I2V = "Wan 2.1/2.2 T2V", "Wan 2.1 I2V"
POSE = conv("patch_embedding_pose", 5120, 16)
MASK = conv("patch_embedding_mask", 5120, 28)
DANCER = {"condition_embedding_align.cross_attn.in_proj_bias": (384,)} | conv("patch_embedding_fuse", 5120, 68)
BINDWEAVE = linear("text_projection.0", 5120, 3584) | linear("text_projection.2", 5120, 5120)
REALIS = conv("add_conv_in", 5120, 32) | linear("add_proj", 5120, 5120) | conv("attn_conv_in", 5120, 20)

MODELS = (
    Published("wan2.1_t2v_1.3B_fp16", f"{T2V} 1.3B", lambda: wan("1.3B"), "F16"),
    Published("diffusion_pytorch_model", f"{T2V} 1.3B", lambda: wan("1.3B"), "F32"),
    Published("self_forcing_dmd", f"{T2V} 1.3B", lambda: wan("1.3B"), prefix="model."),
    Published("wan2.1_t2v_14B_bf16", f"{T2V} 14B", lambda: wan("14B")),
    Published("Wan2_1-T2V-14B_fp8_e4m3fn", f"{T2V} 14B", lambda: wan("14B"), "fp8"),
    Published("Wan2_1-T2V-14B_fp8_e4m3fn_scaled_KJ", f"{T2V} 14B", lambda: wan("14B"), "fp8_scaled"),
    Published("Wan2_1-T2V-14B_fp8_e5m2_scaled_KJ", f"{T2V} 14B", lambda: wan("14B"), "fp8_e5m2"),
    Published("wan2.2_t2v_high_noise_14B_fp8_scaled", f"{T2V} 14B", lambda: wan("14B"), "fp8_weight_scale"),
    Published("wan2.2_t2v_low_noise_14B_fp8_comfy", f"{T2V} 14B", lambda: wan("14B"), "fp8_comfy"),
    Published("wan2.2_t2v_low_noise_14B_mxfp8", f"{T2V} 14B", lambda: wan("14B"), "mxfp8"),
    Published("wan2.2_t2v_low_noise_14B_nvfp4", f"{T2V} 14B", lambda: wan("14B"), "nvfp4"),
    Published("wan2.2_t2v_low_noise_14B_int8", f"{T2V} 14B", lambda: wan("14B"), "int8"),
    Published("all_in_one", f"{T2V} 14B", lambda: wan("14B"), "fp8", prefix="model.diffusion_model."),
    Published("exported", f"{T2V} 14B", lambda: wan("14B"), "fp8", prefix="diffusion_model."),
    Published("Phantom-Wan-14B_fp16", f"{T2V} 14B", lambda: wan("14B"), "F16"),
    Published("Wan2_1-T2V-1-3B-EchoShot_fp16", f"{T2V} 1.3B", lambda: wan("1.3B"), "F16"),
    Published("Wan2_1_mocha-14B-preview_fp8_e4m3fn_scaled_KJ", f"{T2V} 14B", lambda: wan("14B"), "fp8_scaled"),
    Published("Wan2_1-I2V-14B-480P_fp8_e4m3fn", f"{I2V} 14B", lambda: wan("14B", 36, image=True), "fp8"),
    Published("Wan2_1-I2V-14B-MAGREF_fp8_e4m3fn_scaled_KJ", f"{I2V} 14B", lambda: wan("14B", 36, image=True), "fp8"),
    Published("Wan2_1-Wan-I2V-ATI-14B_fp8_e4m3fn", f"{I2V} 14B", lambda: wan("14B", 36, image=True), "fp8"),
    Published("Wan21-WanMove_fp8_scaled_e4m3fn_KJ", f"{I2V} 14B", lambda: wan("14B", 36, image=True), "fp8_scaled"),
    Published("wan2.1_fun_inp_1.3B_bf16", f"{I2V} 1.3B", lambda: wan("1.3B", 36, image=True)),
    Published("Wan2_2-I2V-A14B-LOW_fp8_e4m3fn_scaled_KJ", "Wan 2.2 I2V 14B", lambda: wan("14B", 36), "fp8_scaled"),
    Published("wan2.2_ti2v_5B_fp16", "Wan 2.2 TI2V 5B", lambda: wan("5B", 48), "F16"),
    Published("Wan2_2-TI2V-5B-FastWanFullAttn_bf16", "Wan 2.2 TI2V 5B", lambda: wan("5B", 48)),
    Published("wan2.2_fun_control_5B_bf16", "Fun Control 5B", lambda: fun_control(100, "5B")),
    Published(
        "Wan2_1-FLF2V-14B-720P_fp16",
        "Wan 2.1 FLF2V 14B",
        lambda: extended("14B", 36, {"img_emb.emb_pos": (1, 514, 1280)}, image=True),
        "F16",
    ),
    Published(
        "wan2.1_fun_control_1.3B_bf16",
        "Fun Control 1.3B",
        lambda: wan("1.3B", 48, image=True),
    ),
    Published(
        "Wan2.1-Fun-Control-14B_fp8_e4m3fn", "Fun Control 14B", lambda: fun_control(48, "14B", image=True), "fp8"
    ),
    Published(
        "Wan2_2-Fun-Control-A14B-LOW_fp8_e4m3fn_scaled_KJ_fixed",
        "Fun Control 14B",
        lambda: fun_control(52, "14B"),
        "fp8_scaled",
    ),
    Published("wan2.1_fun_camera_v1.1_1.3B_bf16", "Fun Camera 1.3B", lambda: fun_camera(32, "1.3B", image=True)),
    Published("Wan2_2-Fun-Control-Camera-A14B-HIGH", "Fun Camera 14B", lambda: fun_camera(36), "fp8_scaled"),
    Published("wan2.1_vace_14B_fp16", f"{T2V} 14B + VACE", lambda: wan("14B") | vace_module("14B"), "F16"),
    Published("Wan2_1_VACE_1_3B_preview_bf16", f"{T2V} 1.3B + VACE", lambda: wan("1.3B") | vace_module("1.3B")),
    Published("Wan2_1-SkyReels-V2-DF-1_3B-540P_fp32", "SkyReels V2 DF 1.3B", lambda: sky_reels_df("1.3B"), "F32"),
    Published("Wan2_1-SkyReels-V2-DF-14B-540P_fp16", "SkyReels V2 DF 14B", lambda: sky_reels_df("14B"), "F16"),
    Published("Wan21-SkyReelsV3-A2V_fp8_scaled_mixed", "SkyReels V3 14B", sky_reels_v3, "fp8_comfy"),
    Published("Wan2_2-S2V-14B_fp8_e4m3fn_scaled_KJ", "S2V 14B", s2v, "fp8_scaled"),
    Published("wan2.2_animate_14B_bf16", "Animate 14B", lambda: animate(fused=False)),
    Published("Wan2_2-Animate-14B_fp8_e4m3fn_scaled_KJ", "Animate 14B", lambda: animate(fused=True), "fp8_scaled"),
    Published("Wan2_1-HuMo-14B_fp8_e4m3fn_scaled_KJ", "HuMo 14B", lambda: humo("14B"), "fp8_scaled"),
    Published("Wan2_1-HuMo-1_7B_fp16", "HuMo 1.3B", lambda: humo("1.3B"), "F16"),
    Published("LongCat_TI2V_comfy_bf16", "LongCat", longcat),
    Published("LongCat-Avatar_comfy_bf16", "LongCat Avatar", lambda: longcat(avatar=True)),
    Published("Wan_2_1_Ovi_video_model_bf16", "Ovi 5B", lambda: ovi("video")),
    Published(
        "model_960x960_10s",
        "Ovi 5B + Ovi audio",
        lambda: under("video_model.", ovi("video")) | under("audio_model.", ovi("audio")),
    ),
    Published("Wan21-14B-SCAIL-preview_comfy_bf16", "SCAIL 14B", lambda: extended("14B", 20, POSE, image=True)),
    Published(
        "wan2.1_14B_SCAIL_2_fp8_scaled",
        "SCAIL-2 14B",
        lambda: extended("14B", 20, POSE, MASK, image=True),
        "fp8_scaled",
    ),
    Published(
        "Wan2.1-SteadyDancer_fp8_scaled_KJ",
        "SteadyDancer 14B",
        lambda: extended("14B", 36, DANCER, image=True),
        "fp8_scaled",
    ),
    Published("Wan2_1-I2V-14B-Bindweave_fp16", "BindWeave 14B", lambda: extended("14B", 36, BINDWEAVE), "F16"),
    Published("RealisDance-DiT_bf16", "RealisDance 14B", lambda: extended("14B", 36, REALIS, image=True)),
    Published("LongVie2_fp8", "LongVie2 14B", longvie, "fp8"),
    Published("Wan21-OneToAllAnimation_fp8_e4m3fn_scaled_KJ", "One-to-All 14B", one_to_all, "fp8_scaled"),
    Published("Wan21_FlashPortrait_bf16", "FlashPortrait 14B", flash_portrait),
    Published("Wan2_1_kwai_recammaster_1_3B_step20000_bf16", "ReCamMaster 1.3B", recammaster),
    Published("Wan2_1-MiniMaxRemover_1_3B_fp16", "MiniMax Remover 1.3B", minimax, "F16"),
    Published("Wan2_1-T2V-1_3B_FlashVSR_fp32", f"{T2V} 1.3B", lambda: wan("1.3B"), "F32"),
)
"""Whole models."""

MODULES = (
    Published("Wan2_1-VACE_module_14B_bf16", "VACE", lambda: vace_module("14B")),
    Published("Wan2_1-VACE_module_14B_fp8_e4m3fn", "VACE", lambda: vace_module("14B"), "fp8"),
    Published("Wan2_1-InfiniTetalk-Single_fp16", "MultiTalk/InfiniteTalk", talk_module, "F16"),
    Published("fantasytalking_fp16", "FantasyTalking", fantasy_talking, "F16"),
    Published("Wan2_1_FantasyPortrait_fp16", "FantasyPortrait", fantasy_portrait, "F16"),
    Published("Wan2_1-T2V-Lynx_full_ip_layers_fp16", "Lynx", lambda: lynx("full"), "F16"),
    Published("Wan2_1-T2V-Lynx_lite_ip_layers_fp16", "Lynx", lambda: lynx("lite"), "F16"),
    Published("Wan2_1-T2V-Lynx_full_ref_layers_fp16", "Lynx", lambda: lynx("ref"), "F16"),
    Published("Wan2_1_MTV-Crafter_motion_adapter_bf16", "MTV Crafter", mtv),
    Published("Wan2_1_Uni3C_controlnet_fp16", "Uni3C", uni3c, "F16"),
)
"""Files that are loaded into a 14B model."""
