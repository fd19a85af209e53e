"""A table of stored tensors -> the blocks, sizes and bytes of the Wan transformer they are; pure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .architecture import WanArchitecture
from .errors import CheckpointError
from .layout import BlockProfile, ModelProfile, Placement, TensorProfile, small_cutoff
from .untrusted import SHOWN_LETTERS, printable

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
class StoredTensor:
    """One entry of a file's tensor table; the shape is torch's, also where the file stores it reversed."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


def profile_tensors(source: str, stored: Mapping[str, StoredTensor]) -> CheckpointProfile:
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


def _transformer_tensors(source: str, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
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


def _group_blocks(source: str, tensors: Mapping[str, StoredTensor]) -> dict[tuple[str, int], dict[str, StoredTensor]]:
    """The blocks' tensors by block, VACE blocks first, each kind in the order of its numbers."""
    found: dict[tuple[str, int], dict[str, StoredTensor]] = {}
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
        raise CheckpointError(
            f"{source} expects transformer blocks but has none named blocks.0; name a whole Wan model"
        )
    if len(found) > MOST_BLOCKS:
        raise CheckpointError(f"{source} expects up to {MOST_BLOCKS} blocks but has {len(found)}; name a Wan model")
    return {key: found[key] for key in sorted(found, key=lambda key: (key[0] == "blocks", key[1]))}


def _architecture(
    source: str, tensors: Mapping[str, StoredTensor], blocks: Mapping[tuple[str, int], Mapping[str, StoredTensor]]
) -> WanArchitecture:
    head = _first(tensors, "head.head.weight", "proj_out.weight")
    if head is None or not _is_filled(head):
        raise CheckpointError(
            f"{source} expects an output layer head.head.weight (diffusers: proj_out.weight) but has none; join the "
            "parts of a split model"
        )
    patch = tensors["patch_embedding.weight"].shape
    if len(patch) != PATCH_DIMENSIONS or 0 in patch:
        raise CheckpointError(
            f"{source} expects patch_embedding.weight with {PATCH_DIMENSIONS} dimensions but its shape is {patch}; "
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


def _matrices(source: str, name: str, block: Mapping[str, StoredTensor]) -> tuple[StoredTensor, StoredTensor]:
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


def _is_filled(tensor: StoredTensor) -> bool:
    """Whether this is a matrix with elements: what the model's sizes are read from must have some."""
    return len(tensor.shape) >= MATRIX_DIMENSIONS and 0 not in tensor.shape


def _few(names: Iterable[str]) -> str:
    return ", ".join(printable(name, longest=SHOWN_LETTERS) for name in names)


def _first(tensors: Mapping[str, StoredTensor], *names: str) -> StoredTensor | None:
    return next((tensors[name] for name in names if name in tensors), None)


def _block_profile(name: str, tensors: Mapping[str, StoredTensor]) -> BlockProfile:
    cutoff = max(1, small_cutoff(sum(tensor.nbytes for tensor in tensors.values())))
    return BlockProfile(name, tuple(_tensor_profile(key, tensor, cutoff) for key, tensor in tensors.items()))


def _tensor_profile(name: str, tensor: StoredTensor, cutoff: int) -> TensorProfile:
    if tensor.nbytes < cutoff:
        return TensorProfile(name, tensor.nbytes, Placement.SMALL, "under the cut-off")
    return TensorProfile(name, tensor.nbytes, Placement.STREAMED)
