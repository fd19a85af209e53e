"""A model file's header → its blocks, tensors and bytes, without loading a weight."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .architecture import WanArchitecture, block_flops, tokens_for
from .errors import CheckpointError
from .layout import BlockProfile, ModelProfile, Placement, TensorProfile, small_cutoff

__all__ = ["CheckpointProfile", "WanArchitecture", "block_flops", "read_checkpoint", "tokens_for"]

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
"""What files put before the transformer's own names: all-in-one checkpoints, ComfyUI's exports, plain transformers."""

BLOCK_KEY = re.compile(r"(vace_blocks|blocks)\.(\d+)\.(.+)")

HEAD_WIDTH = 128
"""Channels of one attention head in every published Wan model (1.3B: 12 heads, 5B: 24, 14B: 40). No weight shows it."""

PATCH_DIMENSIONS = 5
"""Of the convolution that makes tokens: (width, channels, frames, rows, columns)."""

MATRIX_DIMENSIONS = 2

LONGEST_SAFETENSORS_HEADER = 100_000_000
"""Bytes; the safetensors format refuses longer ones, so a larger number is some other file's first bytes."""


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


def read_checkpoint(path: Path) -> CheckpointProfile:
    """The profile of a Wan transformer from the header of its .safetensors or .gguf file.

    Args:
        path: The file, in Wan's own layout or diffusers'; one file with all blocks, not a shard.

    Raises:
        CheckpointError: The file is missing, truncated, of another kind, not a Wan model or without some blocks; or
            the library that reads it is not installed.
    """
    readers = {".safetensors": _read_safetensors, ".gguf": _read_gguf}
    reader = readers.get(path.suffix.lower())
    if path.is_dir():
        raise CheckpointError(f"expects a model file but {path} is a folder: name the file inside it")
    if not path.is_file():
        raise CheckpointError(f"there is no model file {path}: check the name and the folder")
    if reader is None:
        kinds = " or ".join(readers)
        raise CheckpointError(f"expects a {kinds} file but got {path.name}: convert it, or name another file")
    try:
        stored = reader(path)
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read ({exc}): check its permissions and its disk") from exc
    tensors = _transformer_tensors(path, stored)
    blocks = _group_blocks(path, tensors)
    architecture = _architecture(path, tensors, blocks)
    profiles = tuple(_block_profile(f"{kind}.{number}", block) for (kind, number), block in blocks.items())
    nbytes: dict[str, int] = {}
    for tensor in tensors.values():
        nbytes[tensor.dtype] = nbytes.get(tensor.dtype, 0) + tensor.nbytes
    other = sum(nbytes.values()) - sum(profile.nbytes for profile in profiles)
    dtypes = tuple(sorted(nbytes.items(), key=lambda item: -item[1]))
    return CheckpointProfile(ModelProfile(profiles, other), architecture, dtypes)


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as exc:
        raise CheckpointError(f"reading {path.name} needs the safetensors package: pip install safetensors") from exc
    tensors = {}
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118  # a file, not a mapping
                entry = file.get_slice(name)
                tensors[name] = _safetensors_entry(tuple(entry.get_shape()), entry.get_dtype())
    except SafetensorError as exc:
        raise CheckpointError(f"{path} is no whole safetensors file ({exc}): {_what_is_missing(path)}") from exc
    return tensors


def _safetensors_entry(shape: tuple[int, ...], dtype: str) -> StoredTensor:
    bits = re.search(r"\d+", dtype)  # BF16, F8_E4M3, U8, F4: the first number; BOOL alone has none
    count = 1
    for size in shape:
        count *= size
    return StoredTensor(shape, dtype, count * (int(bits.group()) if bits else 8) // 8)


def _what_is_missing(path: Path) -> str:
    """Which bytes a safetensors file that its library refuses lacks, and what to do."""
    size, again = path.stat().st_size, "download it again"
    with path.open("rb") as file:
        start = file.read(8)
        header_bytes = int.from_bytes(start, "little")
        if size < len(start) + 1 or header_bytes > LONGEST_SAFETENSORS_HEADER:
            return f"expects the length of a header but its {size:,} bytes begin with {start!r}; {again}"
        if size < 8 + header_bytes:
            return f"expects a header of {header_bytes:,} bytes but the whole file has {size:,}; {again}"
        try:
            entries = json.loads(file.read(header_bytes))
            end = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
        except (ValueError, TypeError, KeyError, AttributeError):
            return f"its header cannot be parsed; {again}"
    return f"expects {8 + header_bytes + end:,} bytes by its header but has {size:,}; {again}"


def _read_gguf(path: Path) -> dict[str, StoredTensor]:
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
    except ImportError as exc:
        raise CheckpointError(f"reading {path.name} needs the gguf package: pip install gguf") from exc

    class SizeCheckingReader(GGUFReader):  # type: ignore[misc]  # gguf has no types
        """Tells a file that is cut short by its tensor table, before the reader maps tensors that are not there."""

        def _build_tensors(self, start_offs: int, fields: Sequence[Any]) -> None:
            end = 0
            for *_, shape, dtype, offset in (field.parts for field in fields):
                block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(dtype[0])]
                end = max(end, start_offs + int(offset[0]) + int(shape.prod()) // block * block_bytes)
            if end > self.data.nbytes:
                raise CheckpointError(
                    f"{path} is cut short: expects {end:,} bytes by its header but has {self.data.nbytes:,}; "
                    "download it again"
                )
            super()._build_tensors(start_offs, fields)

    try:
        reader = SizeCheckingReader(path)
    except (ValueError, IndexError, KeyError) as exc:  # what it raises for a header that is cut, or another file's
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} is no whole GGUF file: expects a header and a tensor table but its {size:,} bytes end or differ "
            f"before that ({exc}); download it again"
        ) from exc
    tensors = {}
    for tensor in reader.tensors:
        # ComfyUI's converters flatten tensors that GGML's quantisation cannot hold and note their shape here.
        noted = reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
        shape = noted.contents() if noted else reversed(tensor.shape.tolist())
        tensors[tensor.name] = StoredTensor(tuple(shape), tensor.tensor_type.name, int(tensor.n_bytes))
    return tensors


def _transformer_tensors(path: Path, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The transformer's tensors under its own names."""
    for prefix in PREFIXES:
        own = {name[len(prefix) :]: tensor for name, tensor in stored.items() if name.startswith(prefix)}
        if "patch_embedding.weight" in own:
            return own
    few = ", ".join(sorted(stored)[:3]) or "no tensors"
    raise CheckpointError(
        f"{path} is not a Wan model: expects patch_embedding.weight and blocks.0.self_attn.q.weight among its "
        f"{len(stored)} tensors but has {few}; name a whole Wan transformer in one file, "
        "not a LoRA, a VACE module or one part of a split model"
    )


def _group_blocks(path: Path, tensors: Mapping[str, StoredTensor]) -> dict[tuple[str, int], dict[str, StoredTensor]]:
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
                f"{path} expects {kind} 0 to {last} but lacks {last + 1 - len(numbers)} of them: {', '.join(few)}; "
                "join the parts of a split model, or download it again"
            )
    if not any(kind == "blocks" for kind, _ in found):
        raise CheckpointError(f"{path} expects transformer blocks but has none named blocks.0; name a whole Wan model")
    return {key: found[key] for key in sorted(found, key=lambda key: (key[0] == "blocks", key[1]))}


def _architecture(
    path: Path, tensors: Mapping[str, StoredTensor], blocks: Mapping[tuple[str, int], Mapping[str, StoredTensor]]
) -> WanArchitecture:
    head = _first(tensors, "head.head.weight", "proj_out.weight")
    if head is None:
        raise CheckpointError(
            f"{path} expects an output layer head.head.weight (diffusers: proj_out.weight) but has none; join the "
            "parts of a split model"
        )
    patch = tensors["patch_embedding.weight"].shape
    if len(patch) != PATCH_DIMENSIONS:
        raise CheckpointError(
            f"{path} expects patch_embedding.weight with {PATCH_DIMENSIONS} dimensions but its shape is {patch}; "
            "convert the model again"
        )
    matrices = [_matrices(path, f"{kind}.{number}", block) for (kind, number), block in blocks.items()]
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


def _matrices(path: Path, name: str, block: Mapping[str, StoredTensor]) -> tuple[StoredTensor, StoredTensor]:
    """The query matrix of a block's self-attention and its first feed-forward matrix: (out, in)."""
    query = _first(block, "self_attn.q.weight", "attn1.to_q.weight")
    ffn = _first(block, "ffn.0.weight", "ffn.net.0.proj.weight")
    if query is None or ffn is None or min(len(query.shape), len(ffn.shape)) < MATRIX_DIMENSIONS:
        few = ", ".join(list(block)[:3])
        raise CheckpointError(
            f"{path} expects the matrices self_attn.q.weight and ffn.0.weight (diffusers: attn1.to_q.weight and "
            f"ffn.net.0.proj.weight) in {name} but it has {few} ({len(block)} tensors); name a whole Wan model"
        )
    return query, ffn


def _first(tensors: Mapping[str, StoredTensor], *names: str) -> StoredTensor | None:
    return next((tensors[name] for name in names if name in tensors), None)


def _block_profile(name: str, tensors: Mapping[str, StoredTensor]) -> BlockProfile:
    cutoff = max(1, small_cutoff(sum(tensor.nbytes for tensor in tensors.values())))
    return BlockProfile(name, tuple(_tensor_profile(key, tensor, cutoff) for key, tensor in tensors.items()))


def _tensor_profile(name: str, tensor: StoredTensor, cutoff: int) -> TensorProfile:
    if tensor.nbytes < cutoff:
        return TensorProfile(name, tensor.nbytes, Placement.SMALL, "under the cut-off")
    return TensorProfile(name, tensor.nbytes, Placement.STREAMED)
