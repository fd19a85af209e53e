"""What the names and shapes of a Wan transformer's tensors tell: blocks, sizes, tokens, cost of a forward; pure."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import SHOWN_LETTERS, CheckpointError, SettingsError, printable
from .activations import ELEMENT_BYTES, FLOAT, MODULATION, TEXT_TOKENS, ForwardOptions
from .layout import BlockProfile, ModelProfile, Placement, TensorProfile, small_cutoff

WAN22_VAE_CHANNELS = 48
"""Latent channels of Wan 2.2 5B's VAE; Wan 2.1's, which the 14B models of Wan 2.2 use too, has 16."""


@dataclass(frozen=True, slots=True)
class WanArchitecture:
    """The sizes of a Wan transformer that determine the cost of a forward.

    Attributes:
        width: Channels of a token (5120 for 14B).
        ffn_width: Channels inside the feed-forward layers (13824 for 14B).
        heads: Attention heads.
        blocks: Number of blocks, without VACE's.
        vace_blocks: Number of VACE blocks.
        patch: Latent frames, rows and columns that make one token.
        in_channels: Input channels, image and control conditions included.
        latent_channels: Output channels, which are the VAE's: 16, or 48 for Wan 2.2 5B. None if unknown; then
            `in_channels` decides.
    """

    width: int
    ffn_width: int
    heads: int
    blocks: int
    vace_blocks: int
    patch: tuple[int, int, int]
    in_channels: int
    latent_channels: int | None = None

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along each side of one latent: 16 with Wan 2.2 5B's VAE, 8 with Wan 2.1's."""
        # Fun Control 1.3B has 48 input channels too, with the VAE of 16 channels: output channels are more reliable.
        return 16 if (self.latent_channels or self.in_channels) == WAN22_VAE_CHANNELS else 8


def block_flops(architecture: WanArchitecture, tokens: int) -> tuple[float, float]:
    """Floating-point operations of one block for one sequence of `tokens`: in linear layers, and in attention.

    A multiply-add counts as two. The linear layers are 6 width x width matrices and the feed-forward pair over the
    tokens, and 2 width x width matrices over the text; attention is self-attention and cross-attention.
    """
    width, ffn = architecture.width, architecture.ffn_width
    linear = 2 * tokens * (6 * width**2 + 2 * width * ffn) + 2 * TEXT_TOKENS * 2 * width**2
    attention = 4 * tokens**2 * width + 4 * tokens * TEXT_TOKENS * width
    return float(linear), float(attention)


def tokens_for(architecture: WanArchitecture, width: int, height: int, frames: int) -> int:
    """Tokens of a video of `width` x `height` pixels and `frames` frames.

    Raises:
        SettingsError: A side is not a multiple of a token's side in pixels, or the frames are not 4n + 1.
    """
    scale, (depth, rows, columns) = architecture.pixels_per_latent, architecture.patch
    _check_step("width", width, first=scale * columns, step=scale * columns)
    _check_step("height", height, first=scale * rows, step=scale * rows)
    _check_step("frames", frames, first=1, step=4)
    return ((frames - 1) // 4 + 1) // depth * (height // (scale * rows)) * (width // (scale * columns))


def _check_step(name: str, value: int, *, first: int, step: int) -> None:
    below = value - (value - first) % step
    if value >= first and value == below:
        return
    valid = " or ".join(str(number) for number in (below, below + step) if number >= first) or str(first)
    rule = f"a multiple of {step}" if first == step else f"a multiple of {step} plus {first}"
    raise SettingsError(f"{name}: expected {rule}, got {value}; use {valid}")


PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
"""Prefixes of the transformer's names in all-in-one checkpoints, ComfyUI's exports and plain transformers."""

BLOCK_KEY = re.compile(r"(vace_blocks|blocks)\.(0|[1-9][0-9]{0,3})\.(.+)")

MOST_BLOCKS = 128
"""VACE blocks included; the largest published Wan has 40 and 8 of VACE. Planning time grows by blocks times tensors."""

HEAD_WIDTH = 128
"""Channels of one attention head in every published Wan model (1.3B: 12 heads, 5B: 24, 14B: 40). No weight shows it."""


@dataclass(frozen=True, slots=True)
class CheckpointProfile:
    """The Wan transformer in a model file.

    Attributes:
        model: Its blocks and their tensors, as stored.
        architecture: Its sizes.
        dtypes: Its bytes by stored type (`BF16`, `F8_E4M3`, `Q4_K`, ...), the largest first.
    """

    model: ModelProfile
    architecture: WanArchitecture
    dtypes: tuple[tuple[str, int], ...]

    @property
    def forward_options(self) -> ForwardOptions:
        """How the wrapper runs this file, by its nodes' defaults.

        It runs plain fp8 under autocast, which has norms in float32, and dequantises scaled fp8 and GGUF itself; norms
        and modulation that are stored in float32 stay so (load_weights in nodes_model_loading.py).
        """
        stored = {tensor.name: tensor.nbytes for tensor in self.model.blocks[-1].tensors}
        kinds = {dtype for dtype, _ in self.dtypes}
        is_fp8 = any(kind.startswith("F8") for kind in kinds)
        is_scaled = is_fp8 and any("scale" in key and "scale_shift" not in key for key in stored)
        is_packed = any(kind.startswith(("Q", "IQ")) for kind in kinds)
        is_float = stored.get("modulation", 0) == MODULATION * self.architecture.width * FLOAT * ELEMENT_BYTES
        return ForwardOptions(
            wide=is_float or (is_fp8 and not is_scaled), weight_copies=2 if is_scaled or is_packed else int(is_fp8)
        )


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


def profile_tensors(source: str, stored: Mapping[str, TensorInfo]) -> CheckpointProfile:
    """The profile of a Wan transformer.

    Args:
        source: Name of the file or model, for messages.
        stored: The tensors by name, in Wan's own layout or diffusers'; others than the transformer's are left out.

    Raises:
        CheckpointError: The tensors are not a Wan model's, or some blocks are missing.
    """
    tensors = _transformer_tensors(source, stored)
    blocks = _group_blocks(source, tensors)
    architecture = _architecture(source, tensors, blocks)
    profiles = tuple(_block_profile(f"{kind}.{number}", block) for (kind, number), block in blocks.items())
    nbytes: Counter[str] = Counter()
    for tensor in tensors.values():
        nbytes[tensor.dtype] += tensor.nbytes
    other = nbytes.total() - sum(profile.nbytes for profile in profiles)
    return CheckpointProfile(ModelProfile(profiles, other), architecture, tuple(nbytes.most_common()))


def _transformer_tensors(source: str, stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The transformer's tensors under its own names."""
    for prefix in PREFIXES:
        own = {name[len(prefix) :]: tensor for name, tensor in stored.items() if name.startswith(prefix)}
        if "patch_embedding.weight" in own:
            return own
    few = _few(sorted(stored)[:3]) or "none"
    raise CheckpointError(
        f"{source} is not a Wan model: its {len(stored)} tensors (first: {few}) do not include patch_embedding.weight; "
        "name a whole Wan transformer in one file, not a LoRA, a VACE module or one part of a split model"
    )


def _group_blocks(source: str, tensors: Mapping[str, TensorInfo]) -> dict[tuple[str, int], dict[str, TensorInfo]]:
    """The tensors of each block, VACE blocks first, in the order of their numbers."""
    found: dict[tuple[str, int], dict[str, TensorInfo]] = {}
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


def _architecture(
    source: str, tensors: Mapping[str, TensorInfo], blocks: Mapping[tuple[str, int], Mapping[str, TensorInfo]]
) -> WanArchitecture:
    head = _matrix(tensors, "head.head.weight", "proj_out.weight")
    if head is None:
        raise CheckpointError(
            f"{source} has no output layer head.head.weight (diffusers: proj_out.weight); "
            "join the parts of a split model"
        )
    shape = tensors["patch_embedding.weight"].shape
    match shape:
        case (_, in_channels, frames, rows, columns) if 0 not in shape:
            patch = frames, rows, columns
        case _:
            message = "expected patch_embedding.weight with 5 dimensions (width, channels, frames, rows, columns)"
            raise CheckpointError(f"{source}: {message}, got shape {shape}; convert the model again")
    matrices = [_matrices(source, f"{kind}.{number}", block) for (kind, number), block in blocks.items()]
    query, ffn = matrices[-1]
    vace = sum(kind == "vace_blocks" for kind, _ in blocks)
    return WanArchitecture(
        width=query.shape[0],
        ffn_width=ffn.shape[0],
        heads=max(1, query.shape[0] // HEAD_WIDTH),
        blocks=len(blocks) - vace,
        vace_blocks=vace,
        patch=patch,
        in_channels=in_channels,
        latent_channels=head.shape[0] // math.prod(patch),
    )


def _matrices(source: str, name: str, block: Mapping[str, TensorInfo]) -> tuple[TensorInfo, TensorInfo]:
    """The query matrix of a block's self-attention and its first feed-forward matrix: (out, in)."""
    query = _matrix(block, "self_attn.q.weight", "attn1.to_q.weight")
    ffn = _matrix(block, "ffn.0.weight", "ffn.net.0.proj.weight")
    if query is None or ffn is None:
        raise CheckpointError(
            f"{source}: {name} has no matrices self_attn.q.weight and ffn.0.weight (diffusers: attn1.to_q.weight and "
            f"ffn.net.0.proj.weight) among its {len(block)} tensors (first: {_few(list(block)[:3])}); name a whole Wan "
            "model"
        )
    return query, ffn


def _matrix(tensors: Mapping[str, TensorInfo], *names: str) -> TensorInfo | None:
    """The tensor with the first of `names` that exists; None if no name does, or if it is no matrix with elements."""
    tensor = next((tensors[name] for name in names if name in tensors), None)
    return tensor if tensor is not None and len(tensor.shape) > 1 and 0 not in tensor.shape else None


def _few(names: Iterable[str]) -> str:
    return ", ".join(printable(name, longest=SHOWN_LETTERS) for name in names)


def _block_profile(name: str, tensors: Mapping[str, TensorInfo]) -> BlockProfile:
    cutoff = max(1, small_cutoff(sum(tensor.nbytes for tensor in tensors.values())))
    small, streamed = (Placement.SMALL, "under the cut-off"), (Placement.STREAMED, "")
    return BlockProfile(
        name,
        tuple(
            TensorProfile(key, t.nbytes, *(small if t.nbytes < cutoff else streamed), in_file=t.in_file)
            for key, t in tensors.items()
        ),
    )
