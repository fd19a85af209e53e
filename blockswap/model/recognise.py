"""What the names and shapes of a model's tensors tell: its blocks, sizes and family; pure."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import SHOWN_LETTERS, CheckpointError, printable
from .activations import ELEMENT_BYTES, FLOAT, MODULATION, ForwardOptions, weight_copies
from .groups import in_order, split
from .layout import BlockProfile, ModelProfile, Placement, TensorProfile, small_cutoff
from .names import (
    GATES,
    IMAGE_KEYS,
    IMAGE_POSITIONS,
    MATRICES,
    PATCH_EMBEDDING,
    family,
    other_file,
    own_prefix,
    packed_tensor,
    parts,
    place,
)
from .wan import WAN22_VAE_CHANNELS, WanArchitecture

BLOCK_KEY = re.compile(r"(vace_blocks|blocks)\.(0|[1-9][0-9]{0,3})\.(.+)")

LOADED_AS_FLOAT = ("motion_encoder", "patch_embedding")
"""Tensors with one of these in their names the loader makes float32, however they are stored."""

AUDIO_PROJECTION = re.compile(r"^audio_proj\.((?:proj|norm).*)")
"""Names that the loader changes in the files of MultiTalk and SkyReels V3; those of HuMo's projection are others."""

MOST_BLOCKS = 128
"""VACE blocks included; the largest published Wan has 48. Planning time grows by blocks times tensors."""

HEAD_WIDTH = 128
"""Channels of one attention head in every published Wan model (1.3B: 12 heads, 5B: 24, 14B: 40). No weight shows it."""

T2V_CHANNELS = 16
"""Input channels of a model that takes no image."""

IMAGE_TOKENS = 257
"""Tokens that CLIP makes of one image."""

LORA_KEY = re.compile(r"(.+?)[._](?:lora_(A|B|down|up)|lora\.(down|up)|(diff))(?:\.default)?(?:\.weight)?")
LORA_OUTPUTS = ("B", "up", "diff")
"""Parts of a LoRA whose first dimension is that of the layer's outputs."""

LORA_PREFIX = re.compile(r"^(?:(?:lora_unet|lycoris|base_model_model|diffusion_model|transformer|pipe_dit)_+)+")

LORA_ELEMENT_BYTES = 2
"""Bytes of an element of an unmerged LoRA: the wrapper keeps it in the type that it computes in."""

LORA_DTYPE = "LORA"

LOADERS_OWN = ".comfy_quant"
"""End of the names of the formats that ComfyUI writes beside quantised weights, which its loader reads and drops."""

SCALES = (".scale_weight", ".weight_scale", ".weight_scale_2")
"""Ends of the names of the scales beside a matrix."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of a file's tensor table; the shape is in torch's order, also if the file reverses it.

    Attributes:
        in_file: The loaded tensor's bytes are those of the file, unchanged.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    in_file: bool = False


Stored = Mapping[str, TensorInfo]
"""A file's tensors by name."""

Key = tuple[str, int]
"""`blocks` or `vace_blocks`, and a number."""


@dataclass(frozen=True, slots=True)
class CheckpointProfile:
    """The Wan transformer in a model file, with what other files add to it.

    Attributes:
        model: Its blocks and their tensors, as stored.
        architecture: Its sizes.
        dtypes: Its bytes by stored type (`BF16`, `F8_E4M3`, `Q4_K`, ...), the largest first.
        family: Its name, such as "Wan 2.1 I2V 14B + VACE".
    """

    model: ModelProfile
    architecture: WanArchitecture
    dtypes: tuple[tuple[str, int], ...]
    family: str = ""

    @property
    def forward_options(self) -> ForwardOptions:
        """How the wrapper runs this file, by its nodes' defaults.

        It runs plain fp8 under autocast, which has norms in float32, and dequantises scaled fp8, GGUF and whatever has
        a LoRA itself (custom_linear.py); norms and modulation that are stored in float32 stay so (load_weights in
        nodes_model_loading.py). Wan 2.2 5B has a timestep for each token when it starts from an image, and diffusion
        forcing always has.
        """
        stored = {tensor.name: tensor.nbytes for tensor in self.model.blocks[-1].tensors}
        kinds = {dtype for dtype, _ in self.dtypes}
        is_fp8 = any(kind.startswith("F8") for kind in kinds)
        # Any block, since mixed files leave some blocks as they are.
        names = (tensor.name for block in self.model.blocks for tensor in block.tensors)
        is_scaled = is_fp8 and any(name.endswith(SCALES) for name in names)
        has_lora = LORA_DTYPE in kinds
        is_packed = any(kind.startswith(("Q", "IQ")) for kind in kinds)
        is_float = stored.get("modulation", 0) == MODULATION * self.architecture.width * FLOAT * ELEMENT_BYTES
        return ForwardOptions(
            per_token=self.architecture.latent_channels == WAN22_VAE_CHANNELS or "DF" in self.family.split(),
            wide=is_float or (is_fp8 and not is_scaled and not has_lora),
            weight_copies=weight_copies(dequantised=is_scaled or is_packed, fp8=is_fp8, lora=has_lora),
        )


def profile_tensors(
    source: str,
    stored: Stored,
    *,
    modules: Sequence[tuple[str, Stored]] = (),
    loras: Sequence[tuple[str, Stored]] = (),
) -> CheckpointProfile:
    """The profile of a Wan transformer.

    Args:
        source: Name of the file or model, for messages.
        stored: The tensors by name, in Wan's own layout or diffusers'; others than the transformer's are left out.
        modules: Names and tensors of files that the loader merges into the model, such as VACE's or InfiniteTalk's.
        loras: Names and tensors of LoRAs that stay beside the weights that they change.

    Raises:
        CheckpointError: The tensors are not a Wan model's, some blocks are missing, or a module or LoRA is another
            model's.
    """
    tensors = _transformer_tensors(source, stored)
    packed = packed_tensor(tensors)
    if packed is not None:
        raise _not_read(source, *packed)
    blocks = _group_blocks(source, tensors)
    for name, more in modules:
        tensors |= _module_tensors(name, more, source, blocks)
    for number, (name, more) in enumerate(loras):
        tensors |= _lora_tensors(name, more, number, source, tensors)
    if modules or loras:
        blocks = _group_blocks(source, tensors)
    architecture = _architecture(source, tensors, blocks)
    if modules and architecture.vace_blocks and architecture.in_channels != T2V_CHANNELS:
        channels = f"{source} has {architecture.in_channels} input channels, a T2V model {T2V_CHANNELS}"
        raise CheckpointError(f"VACE needs a T2V model, and {channels}; name the T2V model of this size")
    profiles = tuple(_block_profile(name, module) for name, module in _swapped_modules(tensors).items())
    nbytes: Counter[str] = Counter()
    for tensor in tensors.values():
        nbytes[tensor.dtype] += tensor.nbytes
    other = sum(tensor.nbytes for name, tensor in tensors.items() if split(_loaded_name(name)) is None)
    name = family(tensors, architecture.width, architecture.in_channels)
    return CheckpointProfile(ModelProfile(profiles, other), architecture, tuple(nbytes.most_common()), name)


def _transformer_tensors(source: str, stored: Stored) -> dict[str, TensorInfo]:
    """The transformer's tensors under the names that it has when it is loaded."""
    prefix = own_prefix([name for name in stored if name.endswith(PATCH_EMBEDDING)], PATCH_EMBEDDING)
    if prefix is not None:
        starts = (prefix, "audio_model.")  # Ovi's halves lie side by side
        own = {name: t for name, t in stored.items() if name.startswith(starts) and not name.endswith(LOADERS_OWN)}
        return {place(name.removeprefix(prefix)): tensor for name, tensor in own.items()}
    packed = packed_tensor(stored)
    if packed is not None:
        raise _not_read(source, *packed)
    raise _not_a_model(source, stored)


def _not_a_model(source: str, stored: Stored) -> CheckpointError:
    few = _few(sorted(stored)[:3]) or "none"
    found = f"{source} is not a Wan model: its {len(stored)} tensors (first: {few})"
    if own_prefix(stored, "blocks.0.self_attn.q.weight") is not None:
        if source.lower().endswith(".gguf"):
            return CheckpointError(
                f"{found} lack patch_embedding.weight, which has 5 dimensions and is left out by tools that quantise "
                "to GGUF; add it with fix_5d_tensors.py of ComfyUI-GGUF, or download a complete file"
            )
        return CheckpointError(
            f"{found} lack patch_embedding.weight; join the parts of a split model, or name its index"
        )
    other = other_file(stored)
    if other is not None:
        return CheckpointError(f"{found} are those of {other.kind}; {other.cure}")
    return CheckpointError(
        f"{found} do not include patch_embedding.weight; name a whole Wan transformer in one file, not a LoRA, a VACE "
        "module or one part of a split model"
    )


def _not_read(source: str, name: str, packing: str) -> CheckpointError:
    shown = printable(name, longest=SHOWN_LETTERS)
    return CheckpointError(
        f"{source}: tensor {shown} is stored as {packing}, which is not read; "
        "use the fp8, bf16 or GGUF file of the model"
    )


def _module_tensors(
    name: str, stored: Stored, source: str, blocks: Mapping[Key, Mapping[str, TensorInfo]]
) -> dict[str, TensorInfo]:
    """What a module adds, under the names that it has in the loaded model."""
    prefix = own_prefix(stored, "blocks.", "vace_blocks.") or ""
    named = {place(key.removeprefix(prefix)): tensor for key, tensor in stored.items()}
    if PATCH_EMBEDDING in named:
        raise CheckpointError(f"{name} is a whole model, not a module; name it as the model, or give it with --experts")
    packed = packed_tensor(named)
    if packed is not None:
        raise _not_read(name, *packed)
    if not parts(named):
        other = other_file(stored)
        kind, cure = (other.kind, other.cure) if other else ("another model", "give a module of a Wan model")
        raise CheckpointError(f"{name} is not a module of a Wan model: its tensors are those of {kind}; {cure}")
    most = max(number for kind, number in blocks if kind == "blocks")
    found = [match for match in map(BLOCK_KEY.fullmatch, named) if match and match[1] == "blocks"]
    beyond = max((int(match[2]) for match in found), default=0)
    if beyond > most:
        raise CheckpointError(
            f"{name} has blocks.{beyond}, but the blocks of {source} end at blocks.{most}; "
            "give the module for a model of this size"
        )
    query, own = _matrix(blocks["blocks", most], "query"), _matrix(_of_block(named, "vace_blocks.0."), "query")
    if query is not None and own is not None and own.shape[0] != query.shape[0]:
        raise CheckpointError(
            f"{name} has blocks of width {own.shape[0]}, those of {source} have {query.shape[0]}; give the module for "
            "a model of this size"
        )
    # The loader renames them, too: audio_proj is another layer in other models.
    return {_loaded_name(key): tensor for key, tensor in named.items()}


def _of_block(tensors: Stored, prefix: str) -> dict[str, TensorInfo]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _lora_tensors(name: str, stored: Stored, number: int, source: str, tensors: Stored) -> dict[str, TensorInfo]:
    """An unmerged LoRA's tensors, which the wrapper keeps as buffers of the layers that they change."""
    layers = {key.removesuffix(".weight").replace(".", "_"): key for key, t in tensors.items() if len(t.shape) > 1}
    found: dict[str, TensorInfo] = {}
    for key, tensor in stored.items():
        match = LORA_KEY.fullmatch(key)
        own = key.removeprefix("diffusion_model.")
        if match:
            layer = layers.get(LORA_PREFIX.sub("", match[1].replace(".", "_")))
            if layer is not None:
                part = next(filter(None, match.groups()[1:]))
                outputs = tensors[layer].shape[0]
                if part in LORA_OUTPUTS and tensor.shape[:1] != (outputs,):
                    raise CheckpointError(
                        f"{name} is not for {source}: its {_few([key])} has shape {tensor.shape}, the layer {outputs} "
                        "outputs; give a LoRA for a model of this size"
                    )
                nbytes = math.prod(tensor.shape) * LORA_ELEMENT_BYTES
                found[f"{layer.removesuffix('.weight')}.lora_diff_{number}_{part}"] = TensorInfo(
                    tensor.shape, LORA_DTYPE, nbytes
                )
        elif "_loras." in own or own.startswith(("dwpose_embedding.", "randomref_embedding_pose.")):
            found[own] = tensor  # layers of Stand-In and UniAnimate, which are added to the model
    if found:
        return found
    other = other_file(stored)
    if other is None or other.kind == "a LoRA":
        raise CheckpointError(f"{name} changes no layer of {source}; give a LoRA for this model")
    raise CheckpointError(f"{name} is not a LoRA: its tensors are those of {other.kind}; give a LoRA for this model")


def _group_blocks(source: str, tensors: Stored) -> dict[Key, dict[str, TensorInfo]]:
    """The tensors of each block, VACE blocks first, in the order of their numbers."""
    found: dict[Key, dict[str, TensorInfo]] = {}
    for name, tensor in tensors.items():
        match = BLOCK_KEY.fullmatch(name)
        if match:
            found.setdefault((match[1], int(match[2])), {})[match[3]] = tensor
    for kind in ("vace_blocks", "blocks"):
        numbers = {number for block_kind, number in found if block_kind == kind}
        missing = [f"{kind}.{number}" for number in range(max(numbers, default=0)) if number not in numbers]
        if missing:
            raise CheckpointError(
                f"{source} has {kind}.{max(numbers)} but lacks {len(missing)} of the blocks before it: "
                f"{', '.join(missing[:5])}; join the parts of a split model, or download it again"
            )
    if not any(kind == "blocks" for kind, _ in found):
        raise CheckpointError(f"{source} has no transformer block named blocks.0; name a whole Wan model")
    if len(found) > MOST_BLOCKS:
        raise CheckpointError(
            f"{source} has {len(found)} blocks, more than the {MOST_BLOCKS} of any Wan model; name a Wan model"
        )
    return {key: found[key] for key in sorted(found, key=lambda key: (key[0] == "blocks", key[1]))}


def _swapped_modules(tensors: Stored) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of each module that is swapped, in the order in which a forward runs them."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in tensors.items():
        where = split(_loaded_name(name))
        if where is not None:
            module, own = where
            is_float = any(word in name for word in LOADED_AS_FLOAT)
            found.setdefault(module, {})[own] = _in_float(tensor) if is_float else tensor
    return {name: found[name] for name in in_order(found)}


def _loaded_name(name: str) -> str:
    return AUDIO_PROJECTION.sub(r"multitalk_audio_proj.\1", name)


def _in_float(tensor: TensorInfo) -> TensorInfo:
    is_float = tensor.dtype in ("F32", "float32")
    return tensor if is_float else replace(tensor, nbytes=math.prod(tensor.shape) * 4, in_file=False)


def _architecture(source: str, tensors: Stored, blocks: Mapping[Key, Stored]) -> WanArchitecture:
    head = _matrix(tensors, "head")
    if head is None:
        raise CheckpointError(
            f"{source} has no output layer head.head.weight (diffusers: proj_out.weight); "
            "join the parts of a split model"
        )
    shape = tensors[PATCH_EMBEDDING].shape
    match shape:
        case (_, in_channels, frames, rows, columns) if 0 not in shape:
            patch = frames, rows, columns
        case _:
            message = "expected patch_embedding.weight with 5 dimensions (width, channels, frames, rows, columns)"
            raise CheckpointError(f"{source}: {message}, got shape {shape}; convert the model again")
    matrices = [_matrices(source, f"{kind}.{number}", block) for (kind, number), block in blocks.items()]
    query, ffn = matrices[-1]
    for (kind, number), (own, _) in zip(blocks, matrices, strict=True):
        if own.shape[0] != query.shape[0]:
            raise CheckpointError(
                f"{source}: {kind}.{number} has width {own.shape[0]}, the other blocks {query.shape[0]}; "
                "give the module for a model of this size"
            )
    vace = sum(kind == "vace_blocks" for kind, _ in blocks)
    images = 2 if IMAGE_POSITIONS in tensors else 1 if any(key in tensors for key in IMAGE_KEYS) else 0
    return WanArchitecture(
        width=query.shape[0],
        ffn_width=ffn.shape[0],
        heads=max(1, query.shape[0] // HEAD_WIDTH),
        blocks=len(blocks) - vace,
        vace_blocks=vace,
        patch=patch,
        in_channels=in_channels,
        latent_channels=head.shape[0] // math.prod(patch),
        ffn_matrices=3 if any(key in tensors for key in GATES) else 2,
        image_tokens=images * IMAGE_TOKENS,
        parts=parts(tensors),
    )


def _matrices(source: str, name: str, block: Stored) -> tuple[TensorInfo, TensorInfo]:
    """The query matrix of a block's self-attention and its first feed-forward matrix: (out, in)."""
    query, ffn = _matrix(block, "query"), _matrix(block, "ffn")
    if query is None or ffn is None:
        raise CheckpointError(
            f"{source}: {name} has no matrices self_attn.q.weight and ffn.0.weight (diffusers: attn1.to_q.weight and "
            f"ffn.net.0.proj.weight) among its {len(block)} tensors (first: {_few(list(block)[:3])}); name a whole Wan "
            "model"
        )
    if 1 in (query.shape[-1], ffn.shape[-1]):
        raise _not_read(source, f"{name}.{MATRICES['query'][0]}", f"packed {query.dtype} of shape {query.shape}")
    return query, ffn


def _matrix(tensors: Stored, role: str) -> TensorInfo | None:
    """The tensor with the first name of a role that exists; None if no name does, or if it is no matrix."""
    tensor = next((tensors[name] for name in MATRICES[role] if name in tensors), None)
    return tensor if tensor is not None and len(tensor.shape) > 1 and 0 not in tensor.shape else None


def _few(names: Iterable[str]) -> str:
    return ", ".join(printable(name, longest=SHOWN_LETTERS) for name in names)


def _block_profile(name: str, tensors: Stored) -> BlockProfile:
    cutoff = max(1, small_cutoff(sum(tensor.nbytes for tensor in tensors.values())))
    small, streamed = (Placement.SMALL, "under the cut-off"), (Placement.STREAMED, "")
    return BlockProfile(
        name,
        tuple(
            TensorProfile(key, t.nbytes, *(small if t.nbytes < cutoff else streamed), in_file=t.in_file)
            for key, t in tensors.items()
        ),
    )
