"""Tensor names of the files that ComfyUI-WanVideoWrapper loads: where each tensor goes, and what a file is; pure data.

The tables follow the wrapper's loader (nodes_model_loading.py, upstream of 2026-05-24) and the published files.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

PATCH_EMBEDDING = "patch_embedding.weight"

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "video_model.", "model.", "")
"""Prefixes of the transformer's names: in all-in-one checkpoints, ComfyUI's exports, Ovi, Self-Forcing, and none."""

PLACES = (
    (re.compile(r"face_adapter\.fuser_blocks\.(\d{1,3})\."), lambda m: f"blocks.{5 * int(m[1])}.fuser_block."),
    (re.compile(r"audio_model\.blocks\.(\d{1,3})\."), r"blocks.\1.audio_block."),
    (re.compile(r"ip_adapter\.(?=blocks\.)"), ""),
    (
        re.compile(r"(?=controlnet_(patch_embedding|mask_embedding|blocks)\.|proj_in\.|proj_out\.\d)"),
        "uni3c_controlnet.",
    ),
)
"""Beginnings of names, and the places where the wrapper puts these tensors: Animate's face fusers go into every fifth
block, the blocks of Ovi's audio twin and FantasyPortrait's projections into the blocks of the same number, and Uni3C's
model into an attribute."""

MATRICES = {
    "query": ("self_attn.q.weight", "attn1.to_q.weight", "self_attn.q.weight_int8"),
    "ffn": ("ffn.0.weight", "ffn.net.0.proj.weight", "ffn.w1.weight", "ffn.0.weight_int8", "ffn.w1.weight_int8"),
    "head": ("head.head.weight", "proj_out.weight", "head.head.weight_int8"),
}
"""Matrices that show a model's sizes, in Wan's names, diffusers', and LongCat's."""

GATES = ("blocks.0.ffn.w3.weight", "blocks.0.ffn.w3.weight_int8")
"""The third matrix of a gated feed-forward layer."""

IMAGE_KEYS = ("blocks.0.cross_attn.k_img.weight", "blocks.0.attn2.add_k_proj.weight")
IMAGE_POSITIONS = "img_emb.emb_pos"

FAMILIES = {
    "audio_injector.injector.0.k.weight": "S2V",
    "audio_proj.audio_proj_glob_1.layer.weight": "HuMo",
    "pose_patch_embedding.weight": "Animate",
    "blocks.0.control_blocks_dense.cross_attn.k.weight": "LongVie2",
    "image_to_cond.conv_in.bias": "One-to-All",
    "condition_embedding_align.cross_attn.in_proj_bias": "SteadyDancer",
    "patch_embedding_mask.weight": "SCAIL-2",
    "patch_embedding_pose.weight": "SCAIL",
    "text_projection.0.weight": "BindWeave",
    "blocks.0.cam_encoder.weight": "ReCamMaster",
    "blocks.0.cross_attn.emo_k_proj.weight": "FlashPortrait",
    "audio_proj.proj1.weight": "SkyReels V3",
    "fps_embedding.weight": "SkyReels V2 DF",
    "control_adapter.conv.weight": "Fun Camera",
    "ref_conv.weight": "Fun Control",
    "add_conv_in.weight": "RealisDance",
    "blocks.0.cross_attn.k_fusion.weight": "Ovi",
}
"""Families by a tensor that only they have; the first that is there decides."""

TALKING = "MultiTalk/InfiniteTalk"

PARTS = {
    "vace_blocks.0.after_proj.weight": "VACE",
    "blocks.0.audio_cross_attn.q_linear.weight": TALKING,
    "blocks.0.cross_attn.k_proj.weight": "FantasyTalking",
    "blocks.0.cross_attn.ip_adapter_single_stream_k_proj.weight": "FantasyPortrait",
    "blocks.0.cross_attn.ip_adapter.to_v_ip.weight": "Lynx",
    "blocks.0.self_attn.ref_adapter.to_k_ref.weight": "Lynx",
    "blocks.0.motion_attn.k.weight": "MTV Crafter",
    "blocks.0.audio_block.self_attn.q.weight": "Ovi audio",
    "uni3c_controlnet.controlnet_patch_embedding.weight": "Uni3C",
    "dwpose_embedding.0.weight": "UniAnimate",
    "LQ_proj_in.norm1.gamma": "FlashVSR",
}
"""Parts that files of their own add to a model, by one of their tensors."""

EXTRA_MODELS = ("VACE", "Lynx", "MTV Crafter", "Ovi audio", "FlashVSR")
"""Parts that the loader takes in the format of the model alone: GGUF with GGUF, safetensors with safetensors."""

SIZES = {1536: "1.3B", 3072: "5B", 5120: "14B"}
"""Wan's sizes by width."""

LONGCAT_WIDTH, WAN22_5B_WIDTH = 4096, 3072

CHANNELS = {16: "Wan 2.1/2.2 T2V", 36: "Wan 2.2 I2V", 48: "Fun Control", 52: "Fun Control"}
IMAGE_CHANNELS = CHANNELS | {36: "Wan 2.1 I2V"}
"""What plain models are by their input channels; models with layers for an image embedding are of Wan 2.1."""

OWN_AUDIO = {"LongCat": "LongCat Avatar", "SkyReels V3 14B": "SkyReels V3 14B"}
"""Names of models that are published with the layers of MultiTalk in them."""


@dataclass(frozen=True, slots=True)
class OtherFile:
    """A file that is no Wan transformer.

    Attributes:
        pattern: Found in one of its tensors' names.
        kind: What the file is, with its article.
        cure: What to do.
    """

    pattern: str
    kind: str
    cure: str


WHOLE_MODEL = "name the Wan transformer itself"

OTHER_FILES = (
    OtherFile(
        r"lora_(A|B|up|down|unet)\b|lora\.(up|down)\.|_loras\.|\.(diff|diff_b|diff_m|lokr_w1|lokr_w1_a|hada_w1_a)$",
        "a LoRA",
        "name the model that it changes, and give this file with --lora",
    ),
    OtherFile(
        r"(^|\.)(token_embedding|shared|token_embd|embed_tokens)\.weight$|^(text_model|encoder\.block|enc\.blk)\.",
        "a text encoder",
        f"{WHOLE_MODEL}, not its text encoder",
    ),
    OtherFile(
        r"^(wav2vec2|feature_extractor|feature_projection|encoder\.pos_conv_embed)\.|^(model\.)?encoder\.layers\.",
        "an audio encoder",
        f"{WHOLE_MODEL}, not its audio encoder",
    ),
    OtherFile(
        r"(^|\.)visual\.(transformer|conv1|patch_embedding)\.|^(vision_model|visual)\.",
        "a CLIP vision encoder",
        f"{WHOLE_MODEL}, not its image encoder",
    ),
    OtherFile(
        r"(^|\.)(encoder|decoder)\.(\d+|conv1|conv_in|middle|mid|mid_block|(down|up)(samples|_blocks|sample)?)\.",
        "a VAE",
        f"{WHOLE_MODEL}, not its VAE",
    ),
)
"""Files that lie beside Wan models, the first that fits decides."""

PACKINGS = (
    (r"\.quant_state\.bitsandbytes__(nf4|fp4)", "", r"packed 4-bit (bitsandbytes \1)"),
    (r"\.SCB", ".weight", "8-bit with row scales (bitsandbytes int8)"),
    (r"\._data", "", "Quanto's packed integers"),
    (r"\.wscales", ".qweight", "SVDQuant"),
    (r"\.(?:qzeros|g_idx)", ".qweight", "packed 4-bit (GPTQ or AWQ)"),
    (r"\.biases", ".weight", "MLX's packed integers"),
    (r"\.W_q", ".W_q", "HQQ's packed integers"),
    (r"[._:]qdata", "", "torchao's packed integers"),
)
"""Ends of names beside packed matrices, the end of the packed tensor's own name, and what the packing is called."""


def packed_tensor(names: Collection[str]) -> tuple[str, str] | None:
    """The first tensor that is stored in a packing that the wrapper does not read, and the packing's name."""
    for pattern, own, called in PACKINGS:
        for name in names:
            match = re.search(f"{pattern}$", name)
            if match:
                return name[: match.start()] + own, match.expand(called)
    return None


def own_prefix(names: Collection[str], *starts: str) -> str | None:
    """The first of PREFIXES with which a name that continues with one of `starts` begins; None if there is none."""
    return next((p for p in PREFIXES if any(name.startswith(tuple(p + s for s in starts)) for name in names)), None)


def place(name: str) -> str:
    """The name under which the wrapper's transformer holds a tensor."""
    for start, target in PLACES:
        match = start.match(name)
        if match:
            return start.sub(target, name, count=1)
    return name


def parts(names: Collection[str]) -> tuple[str, ...]:
    """The parts that are there besides the model itself."""
    return tuple(dict.fromkeys(label for mark, label in PARTS.items() if mark in names))


def other_file(names: Collection[str]) -> OtherFile | None:
    """What a file with these tensors is, if it is no Wan transformer but lies beside one."""
    added = parts([place(name) for name in names])
    if added:
        cure = "name the model that it is loaded into, and give this file with --module"
        return OtherFile("", f"a module ({' and '.join(added)})", cure)
    text = "\n".join(names)
    return next((kind for kind in OTHER_FILES if re.search(kind.pattern, text, re.MULTILINE)), None)


def family(names: Collection[str], width: int, in_channels: int) -> str:
    """The model's name: family and size, and the parts that modules have added."""
    added, size = parts(names), SIZES.get(width, f"of width {width}")
    known = next((label for mark, label in FAMILIES.items() if mark in names), None)
    base = "LongCat" if width == LONGCAT_WIDTH else f"{known or _plain_family(names, width, in_channels)} {size}"
    if base in OWN_AUDIO and TALKING in added:
        base, added = OWN_AUDIO[base], tuple(part for part in added if part != TALKING)
    return " + ".join([base, *added])


def _plain_family(names: Collection[str], width: int, in_channels: int) -> str:
    if width == WAN22_5B_WIDTH:
        return "Wan 2.2 TI2V"
    if not any(name.startswith(("blocks.0.cross_attn.", "blocks.0.attn2.")) for name in names):
        return "MiniMax Remover"
    if IMAGE_POSITIONS in names:
        return "Wan 2.1 FLF2V"
    known = IMAGE_CHANNELS if any(key in names for key in IMAGE_KEYS) else CHANNELS
    return known.get(in_channels, f"Wan with {in_channels} input channels,")
