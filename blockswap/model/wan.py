"""A Wan transformer from its tensors' names and shapes: blocks, sizes, tokens, and what a forward costs; pure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import SHOWN_LETTERS, CheckpointError, SettingsError, printable
from .layout import BlockProfile, ModelProfile, Placement, TensorProfile, small_cutoff

TEXT_TOKENS = 512
"""Length to which Wan pads its text embedding (text_len in Wan's configuration)."""

WAN22_VAE_CHANNELS = 48
"""Latent channels of Wan 2.2 5B's VAE; Wan 2.1's, which the 14B models of Wan 2.2 use too, has 16."""

ELEMENT_BYTES = 2
"""Of an activation: bf16 and fp16; fp8 and GGUF models compute in these too."""

TEMPORARIES = 1.25
"""Peak over the widest place's own tensors: diffusers' Wan transformer took 1.37 times them at width 256, 1.19 at width
1536 (768 to 3072 tokens, by the books of the tests' pretend accelerator, torch 2.13, 2026-11-25)."""


@dataclass(frozen=True, slots=True)
class WanArchitecture:
    """The sizes of a Wan transformer that decide what a forward costs.

    Attributes:
        width: Channels of a token (5120 for 14B).
        ffn_width: Channels inside the feed-forward layers (13824 for 14B).
        heads: Attention heads.
        blocks: Blocks, without VACE's.
        vace_blocks: VACE blocks, 0 without VACE.
        patch: Latent frames, rows and columns that make one token.
        in_channels: Latent channels that enter, image and control conditions included.
        latent_channels: Latent channels that leave, which are the VAE's: 16, or 48 for Wan 2.2 5B. None if
            not known; `in_channels` decides then.
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
        # Fun Control 1.3B takes 48 channels in too, with the VAE of 16 channels: what leaves is the surer sign.
        return 16 if (self.latent_channels or self.in_channels) == WAN22_VAE_CHANNELS else 8


def block_flops(architecture: WanArchitecture, tokens: int) -> tuple[float, float]:
    """Floating-point operations of one block for one sequence of `tokens`: in linear layers, and in attention.

    A multiplication and an addition count as two. The linear layers are 6 width x width matrices and the feed-forward
    pair over the tokens, and 2 width x width matrices over the text; attention is the self- and the cross-attention.
    """
    width, ffn = architecture.width, architecture.ffn_width
    linear = 2 * tokens * (6 * width**2 + 2 * width * ffn) + 2 * TEXT_TOKENS * 2 * width**2
    attention = 4 * tokens**2 * width + 4 * tokens * TEXT_TOKENS * width
    return float(linear), float(attention)


def activation_bytes(architecture: WanArchitecture, tokens: int, *, vace_hints: bool = True) -> int:
    """Device memory that a forward is expected to take above the weights, until one has been measured.

    The feed-forward pair is the widest place of a block: the residual and the normed input (`width` channels each),
    the hidden channels before and after the activation (`ffn_width` each), two bytes an element; what runs beside them
    adds `TEMPORARIES`. Attention holds five times `width`, which is less. VACE blocks leave a hint of `width` channels
    each for the main blocks.

    Args:
        architecture: The model's sizes.
        tokens: Length of one sequence.
        vace_hints: The hints of the VACE blocks stay on the device until the main blocks have used them.
    """
    width, ffn = architecture.width, architecture.ffn_width
    channels = max(2 * width + 2 * ffn, 5 * width)
    hints = architecture.vace_blocks * width if vace_hints else 0
    return tokens * (int(TEMPORARIES * channels) + hints) * ELEMENT_BYTES


def tokens_for(architecture: WanArchitecture, width: int, height: int, frames: int) -> int:
    """Tokens of a video of `width` x `height` pixels and `frames` frames.

    Raises:
        SettingsError: A side is no multiple of the pixels behind one token, or the frames are not 4n + 1.
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
"""What files put before the transformer's own names: all-in-one checkpoints, ComfyUI's exports, plain transformers."""

BLOCK_KEY = re.compile(r"(vace_blocks|blocks)\.(0|[1-9][0-9]{0,3})\.(.+)")

MOST_BLOCKS = 128
"""VACE's included; the largest published Wan has 40 and 8 of VACE. A plan takes time by blocks times tensors."""

HEAD_WIDTH = 128
"""Channels of one attention head in every published Wan model (1.3B: 12 heads, 5B: 24, 14B: 40). No weight shows it."""

PATCH_DIMENSIONS = 5
"""Of the convolution that makes tokens: (width, channels, frames, rows, columns)."""

MATRIX_DIMENSIONS = 2


@dataclass(frozen=True, slots=True)
class CheckpointProfile:
    """What a model file holds.

    Attributes:
        model: Its blocks and their tensors, as stored; in an all-in-one checkpoint the transformer's alone.
        architecture: Its sizes.
        dtypes: Bytes of the model by stored type (`BF16`, `F8_E4M3`, `Q4_K`, ...), the largest first.
    """

    model: ModelProfile
    architecture: WanArchitecture
    dtypes: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of a file's tensor table; the shape is torch's, also where the file stores it reversed."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


def profile_tensors(source: str, stored: Mapping[str, TensorInfo]) -> CheckpointProfile:
    """The profile of a Wan transformer.

    Args:
        source: Where the table comes from, for messages.
        stored: Its tensors by name, in Wan's own layout or diffusers'.

    Raises:
        CheckpointError: It is not a Wan model, or lacks some blocks.
    """
    tensors = _transformer_tensors(source, stored)
    blocks = _group_blocks(source, tensors)
    architecture = _architecture(source, tensors, blocks)
    profiles = tuple(_block_profile(f"{kind}.{number}", block) for (kind, number), block in blocks.items())
    nbytes: dict[str, int] = {}
    for tensor in tensors.values():
        nbytes[tensor.dtype] = nbytes.get(tensor.dtype, 0) + tensor.nbytes
    other = sum(nbytes.values()) - sum(profile.nbytes for profile in profiles)
    dtypes = tuple(sorted(nbytes.items(), key=lambda item: -item[1]))
    return CheckpointProfile(ModelProfile(profiles, other), architecture, dtypes)


def _transformer_tensors(source: str, stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The transformer's tensors under its own names."""
    for prefix in PREFIXES:
        own = {name[len(prefix) :]: tensor for name, tensor in stored.items() if name.startswith(prefix)}
        if "patch_embedding.weight" in own:
            return own
    few = _few(sorted(stored)[:3]) or "no tensors"
    raise CheckpointError(
        f"{source} is not a Wan model: expects patch_embedding.weight and blocks.0.self_attn.q.weight among its "
        f"{len(stored)} tensors but has {few}; name a whole Wan transformer in one file, "
        "not a LoRA, a VACE module or one part of a split model"
    )


def _group_blocks(source: str, tensors: Mapping[str, TensorInfo]) -> dict[tuple[str, int], dict[str, TensorInfo]]:
    """The blocks' tensors by block, VACE blocks first, each kind in the order of its numbers."""
    found: dict[tuple[str, int], dict[str, TensorInfo]] = {}
    for name, tensor in tensors.items():
        match = BLOCK_KEY.fullmatch(name)
        if match:
            found.setdefault((match[1], int(match[2])), {})[match[3]] = tensor
    for kind in ("vace_blocks", "blocks"):
        numbers = {number for block_kind, number in found if block_kind == kind}
        last = max(numbers, default=-1)
        if len(numbers) <= last:
            few = itertools.islice((f"{kind}.{number}" for number in range(last) if number not in numbers), 5)
            raise CheckpointError(
                f"{source} expects {kind} 0 to {last} but lacks {last + 1 - len(numbers)} of them: {', '.join(few)}; "
                "join the parts of a split model, or download it again"
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
    head = _first(tensors, "head.head.weight", "proj_out.weight")
    if head is None or not _is_filled(head):
        raise CheckpointError(
            f"{source} has no output layer head.head.weight (diffusers: proj_out.weight); join the "
            "parts of a split model"
        )
    patch = tensors["patch_embedding.weight"].shape
    if len(patch) != PATCH_DIMENSIONS or 0 in patch:
        raise CheckpointError(
            f"{source}: expected patch_embedding.weight with {PATCH_DIMENSIONS} dimensions, got shape {patch}; "
            "convert the model again"
        )
    matrices = [_matrices(source, f"{kind}.{number}", block) for (kind, number), block in blocks.items()]
    query, ffn = matrices[-1]
    vace = sum(kind == "vace_blocks" for kind, _ in blocks)
    return WanArchitecture(
        width=query.shape[0],
        ffn_width=ffn.shape[0],
        heads=max(1, query.shape[0] // HEAD_WIDTH),
        blocks=len(blocks) - vace,
        vace_blocks=vace,
        patch=(patch[2], patch[3], patch[4]),
        in_channels=patch[1],
        latent_channels=head.shape[0] // (patch[2] * patch[3] * patch[4]),
    )


def _matrices(source: str, name: str, block: Mapping[str, TensorInfo]) -> tuple[TensorInfo, TensorInfo]:
    """The query matrix of a block's self-attention and its first feed-forward matrix: (out, in)."""
    query = _first(block, "self_attn.q.weight", "attn1.to_q.weight")
    ffn = _first(block, "ffn.0.weight", "ffn.net.0.proj.weight")
    if query is None or ffn is None or not (_is_filled(query) and _is_filled(ffn)):
        few = _few(list(block)[:3])
        raise CheckpointError(
            f"{source} expects the matrices self_attn.q.weight and ffn.0.weight (diffusers: attn1.to_q.weight and "
            f"ffn.net.0.proj.weight) in {name} but it has {few} ({len(block)} tensors); name a whole Wan model"
        )
    return query, ffn


def _is_filled(tensor: TensorInfo) -> bool:
    """Whether this is a matrix with elements: what the model's sizes are read from must have some."""
    return len(tensor.shape) >= MATRIX_DIMENSIONS and 0 not in tensor.shape


def _few(names: Iterable[str]) -> str:
    return ", ".join(printable(name, longest=SHOWN_LETTERS) for name in names)


def _first(tensors: Mapping[str, TensorInfo], *names: str) -> TensorInfo | None:
    return next((tensors[name] for name in names if name in tensors), None)


def _block_profile(name: str, tensors: Mapping[str, TensorInfo]) -> BlockProfile:
    cutoff = max(1, small_cutoff(sum(tensor.nbytes for tensor in tensors.values())))
    return BlockProfile(name, tuple(_tensor_profile(key, tensor, cutoff) for key, tensor in tensors.items()))


def _tensor_profile(name: str, tensor: TensorInfo, cutoff: int) -> TensorProfile:
    if tensor.nbytes < cutoff:
        return TensorProfile(name, tensor.nbytes, Placement.SMALL, "under the cut-off")
    return TensorProfile(name, tensor.nbytes, Placement.STREAMED)
