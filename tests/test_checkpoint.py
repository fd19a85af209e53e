"""A model file's header gives blocks, bytes and sizes; every file that is not a whole Wan model is refused."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from checkpoint_files import (
    block_shapes,
    fp8_scaled,
    wan_shapes,
    wan_tensors,
    write_gguf,
    write_safetensors,
    write_sparse_gguf,
    write_sparse_safetensors,
)
from hostile_headers import (
    LYING_GGUF,
    LYING_SAFETENSORS,
    LYING_SIZES,
    ODD_NAMES,
    entry,
    gguf_header,
    gguf_tensor,
    raw_safetensors,
)
from safetensors.torch import save_file
from wanvideo_enhanced_blockswap.blockswap.checkpoint.wan_file import read_checkpoint
from wanvideo_enhanced_blockswap.blockswap.errors import CheckpointError
from wanvideo_enhanced_blockswap.blockswap.model.layout import Placement
from wanvideo_enhanced_blockswap.blockswap.model.profile import profile_model
from wanvideo_enhanced_blockswap.blockswap.model.recognise import CheckpointProfile
from wanvideo_enhanced_blockswap.blockswap.model.wan import WanArchitecture
from watched import Watched

needs_sparse_files = pytest.mark.skipif(sys.platform == "win32", reason="NTFS would store 28 GB of zeros")

TINY = WanArchitecture(128, 256, 1, 2, 0, (1, 2, 2), 16, 16)


def total_bytes(profile: CheckpointProfile) -> int:
    return profile.model.block_bytes + profile.model.other_bytes


# ---- what is read


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_a_safetensors_file_gives_every_byte_under_any_prefix(tmp_path: Path, prefix: str) -> None:
    tensors = wan_tensors()
    profile = read_checkpoint(write_safetensors(tmp_path / "wan.safetensors", tensors, prefix))
    assert profile.architecture == TINY
    assert [block.name for block in profile.model.blocks] == ["blocks.0", "blocks.1"]
    assert profile.model.block_bytes == 2 * 2 * sum(math.prod(shape) for shape in block_shapes(128, 256).values())
    assert profile.dtypes == (("BF16", sum(tensor.nbytes for tensor in tensors.values())),)
    assert total_bytes(profile) == profile.dtypes[0][1]


def test_a_diffusers_model_reads_as_the_loaded_module_does(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, ffn_dim=256, num_layers=2, in_channels=36, text_dim=16
    )
    model.save_pretrained(tmp_path)
    from_file = read_checkpoint(tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = profile_model([(f"blocks.{number}", block) for number, block in enumerate(model.blocks)]).profile
    for ours, theirs in zip(from_file.model.blocks, loaded.blocks, strict=True):
        assert ours.name == theirs.name
        assert all(tensor.in_file for tensor in ours.tensors)
        assert {replace(tensor, in_file=False) for tensor in ours.tensors} == set(theirs.tensors)
    assert from_file.architecture == WanArchitecture(128, 256, 1, 2, 0, (1, 2, 2), 36, 16)
    assert total_bytes(from_file) == sum(parameter.nbytes for parameter in model.parameters())


def test_blocks_come_in_execution_order_vace_first_by_number(tmp_path: Path) -> None:
    file = write_safetensors(tmp_path / "vace.safetensors", wan_tensors(wan_shapes(blocks=12, vace=11)))
    profile = read_checkpoint(file)
    assert [block.name for block in profile.model.blocks] == [
        *(f"vace_blocks.{number}" for number in range(11)),
        *(f"blocks.{number}" for number in range(12)),
    ]
    assert (profile.architecture.blocks, profile.architecture.vace_blocks) == (12, 11)


def test_matrices_stream_and_everything_under_the_cut_off_stays(tmp_path: Path) -> None:
    profile = read_checkpoint(write_safetensors(tmp_path / "wan.safetensors", wan_tensors()))
    streamed = {t.name for t in profile.model.blocks[0].tensors if t.placement is Placement.STREAMED}
    assert streamed == {name for name, shape in block_shapes(128, 256).items() if len(shape) == 2}
    assert all(t.reason for t in profile.model.blocks[0].tensors if t.placement is Placement.SMALL)


def test_fp8_weights_count_one_byte_and_their_scales_stay_on_the_device(tmp_path: Path) -> None:
    tensors = fp8_scaled(wan_tensors())
    profile = read_checkpoint(write_safetensors(tmp_path / "fp8.safetensors", tensors))
    stored = {t.name: t for t in profile.model.blocks[1].tensors}
    assert stored["ffn.0.weight"].nbytes == 256 * 128
    assert (stored["ffn.0.scale_weight"].nbytes, stored["ffn.0.scale_weight"].placement) == (4, Placement.SMALL)
    assert dict(profile.dtypes)["F8_E4M3"] == 2 * (8 * 128 * 128 + 2 * 256 * 128) + 2
    assert total_bytes(profile) == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(("kind", "bytes_of_32"), [("Q8_0", 34), ("Q4_0", 18), ("F16", 64)])
@pytest.mark.parametrize("flatten", [False, True])
def test_a_gguf_file_gives_the_quantised_bytes_and_the_shapes_of_torch(
    tmp_path: Path, kind: str, bytes_of_32: int, flatten: bool
) -> None:
    profile = read_checkpoint(write_gguf(tmp_path / "wan.gguf", kind=kind, flatten=flatten))
    stored = {t.name: t.nbytes for t in profile.model.blocks[0].tensors}
    assert profile.architecture == TINY
    assert stored["ffn.2.weight"] == 128 * 256 // 32 * bytes_of_32
    assert stored["modulation"] == 6 * 128 * 4
    assert dict(profile.dtypes)[kind] == 2 * (8 * 128 * 128 + 2 * 256 * 128) // 32 * bytes_of_32


def test_other_models_in_an_all_in_one_file_are_not_counted(tmp_path: Path) -> None:
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in wan_tensors().items()}
    alone = read_checkpoint(write_safetensors(tmp_path / "alone.safetensors", tensors))
    tensors["vae.decoder.conv1.weight"] = torch.zeros(1000)
    assert read_checkpoint(write_safetensors(tmp_path / "all.safetensors", tensors)) == alone


@needs_sparse_files
def test_wan_14b_in_bf16_is_28_gb_of_blocks_and_its_weights_are_never_read(tmp_path: Path) -> None:
    shapes = wan_shapes(5120, 13824, 40)
    file = write_sparse_safetensors(tmp_path / "wan14b.safetensors", shapes)
    assert file.stat().st_size > 28e9
    process = psutil.Process()
    before = process.memory_info().rss
    profile = read_checkpoint(file)
    assert process.memory_info().rss - before < 64e6
    assert profile.model.block_bytes == 40 * 2 * 351_394_304
    assert profile.architecture == WanArchitecture(5120, 13824, 40, 40, 0, (1, 2, 2), 16, 16)


@needs_sparse_files
def test_wan_14b_in_q4_k_is_8_gb_of_blocks(tmp_path: Path) -> None:
    profile = read_checkpoint(write_sparse_gguf(tmp_path / "wan14b.gguf", wan_shapes(5120, 13824, 40), "Q4_K"))
    assert profile.architecture == WanArchitecture(5120, 13824, 40, 40, 0, (1, 2, 2), 16, 16)
    assert profile.model.block_bytes / 40 == pytest.approx(198.1e6, rel=1e-3)


# ---- what is refused


def test_a_missing_file_a_folder_and_another_kind_of_file_are_named(tmp_path: Path) -> None:
    other = tmp_path / "wan.ckpt"
    other.touch()
    with pytest.raises(CheckpointError, match=r"no model file .*wan\.safetensors; check the name"):
        read_checkpoint(tmp_path / "wan.safetensors")
    with pytest.raises(CheckpointError, match="is a folder; name the model file"):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"expected a \.safetensors or \.gguf file, got wan\.ckpt"):
        read_checkpoint(other)


def test_a_file_that_the_system_does_not_let_us_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    file = write_safetensors(tmp_path / "wan.safetensors", wan_tensors())
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"wan\.safetensors cannot be read .*Permission denied.*; check its"):
        read_checkpoint(file)


@pytest.mark.parametrize("write", [lambda path: write_safetensors(path, wan_tensors()), write_gguf])
def test_a_file_cut_anywhere_is_refused_with_its_size(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    suffix = ".gguf" if write is write_gguf else ".safetensors"
    content = write(tmp_path / f"whole{suffix}").read_bytes()
    file = tmp_path / f"cut{suffix}"
    padding = 32  # GGUF pads its last tensor, which a reader does not miss
    cuts = [*range(40), *range(40, 9000, 211), *range(9000, len(content), 9973), len(content) - padding]
    for cut in cuts:
        file.write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match=rf"cut{suffix} .{cut:,} bytes. is not a complete .*; download"):
            read_checkpoint(file)


def test_a_cut_in_the_data_is_told_in_bytes_expected_and_found(tmp_path: Path) -> None:
    for file in (write_gguf(tmp_path / "wan.gguf"), write_safetensors(tmp_path / "wan.safetensors", wan_tensors())):
        whole = file.stat().st_size
        os.truncate(file, whole - 1000)
        with pytest.raises(CheckpointError, match=rf"expected {whole:,} bytes .*its header, got {whole - 1000:,}"):
            read_checkpoint(file)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1",
            "is a Git LFS pointer to the model; run git lfs pull, or download the file itself",
        ),
        (
            (10**7).to_bytes(8, "little") + b"{}",
            "expected a header of 10,000,000 bytes, got a file of 10",
        ),
        ((2).to_bytes(8, "little") + b"[]", "its header is not a JSON object"),
        ((2).to_bytes(8, "little") + b"{}", "is not a Wan model: its 0 tensors"),
    ],
)
def test_a_safetensors_file_that_is_something_else_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "wan.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        read_checkpoint(file)


def test_another_model_is_refused_with_some_of_its_names(tmp_path: Path) -> None:
    tensors = {"double_blocks.0.img_attn.qkv.weight": torch.zeros(4, 4), "blocks.0.lora_A.weight": torch.zeros(4, 4)}
    for file in (
        write_safetensors(tmp_path / "flux.safetensors", tensors),
        write_gguf(tmp_path / "flux.gguf", {name: tuple(tensor.shape) for name, tensor in tensors.items()}, "F16"),
    ):
        with pytest.raises(CheckpointError, match=r"is not a Wan model: its 2 tensors .*blocks\.0\.lora_A\.weight"):
            read_checkpoint(file)


def drop(shapes: dict[str, tuple[int, ...]], *starts: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if not name.startswith(starts)}


INCOMPLETE: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "one block": (
        drop(wan_shapes(blocks=40), "blocks.17."),
        r"has blocks\.39 but lacks 1 of the blocks before it: blocks\.17;",
    ),
    "a VACE block": (
        drop(wan_shapes(vace=3), "vace_blocks.0."),
        r"has vace_blocks\.2 but lacks 1 of the blocks",
    ),
    "all blocks": (drop(wan_shapes(), "blocks."), r"has no transformer block named blocks\.0"),
    "all but VACE blocks": (drop(wan_shapes(vace=1), "blocks."), r"no transformer block named blocks\.0"),
    "the matrices of a block": (
        drop(wan_shapes(), "blocks.1.self"),
        r"blocks\.1 has no matrices",
    ),
    "the head": (drop(wan_shapes(), "head."), "has no output layer .* join the parts of a split model"),
    "the patch embedding": (drop(wan_shapes(), "patch_embedding."), r"patch_embedding\.weight"),
    "the patch's shape": (
        wan_shapes() | {"patch_embedding.weight": (128, 64)},
        r"5 dimensions .* \(128, 64\)",
    ),
}


@pytest.mark.parametrize("lacks", INCOMPLETE)
def test_a_model_that_lacks_a_part_is_refused_with_its_name(tmp_path: Path, lacks: str) -> None:
    shapes, reason = INCOMPLETE[lacks]
    file = write_safetensors(tmp_path / "wan.safetensors", wan_tensors(shapes))
    with pytest.raises(CheckpointError, match=reason):
        read_checkpoint(file)


def test_no_library_is_needed_to_read_a_safetensors_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_safetensors(tmp_path / "wan.safetensors", wan_tensors())
    for library in ("safetensors", "gguf", "numpy"):
        monkeypatch.setitem(sys.modules, library, None)
    assert read_checkpoint(file).architecture == TINY


@pytest.mark.parametrize("library", ["gguf", "numpy"])
def test_without_the_gguf_package_a_sentence_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    file = write_gguf(tmp_path / "wan.gguf")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(CheckpointError, match=r"wan\.gguf needs the Python package gguf, .*; pip install gguf"):
        read_checkpoint(file)


# ---- what a header may say that is not so


def refusal(path: Path) -> str:
    """The one sentence in which a file is refused."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1500
    return message


@pytest.mark.parametrize("lie", LYING_SAFETENSORS)
def test_a_safetensors_header_that_lies_is_refused_in_a_sentence(tmp_path: Path, lie: str) -> None:
    header, reason = LYING_SAFETENSORS[lie]
    message = refusal(raw_safetensors(tmp_path / "wan.safetensors", header, 8))
    assert re.search(rf"wan\.safetensors \([\d,]+ bytes\) is not a complete safetensors file: .*{reason}", message)
    assert message.endswith("; download it again")


@pytest.mark.parametrize("name", ODD_NAMES, ids=lambda name: ascii(name)[:20])
def test_an_odd_name_is_printed_on_one_line(tmp_path: Path, name: str) -> None:
    key = json.dumps(name)
    message = refusal(raw_safetensors(tmp_path / "wan.safetensors", f"{{{key}:{entry()}}}", 8))
    assert "is not a Wan model" in message
    assert "has no valid dtype" in refusal(raw_safetensors(tmp_path / "wan.safetensors", f"{{{key}:0}}", 8))
    if name.isascii():
        (tmp_path / "wan.gguf").write_bytes(gguf_header([gguf_tensor(name.encode())]) + bytes(64))
        assert "is not a Wan model" in refusal(tmp_path / "wan.gguf")


def test_bytes_are_those_of_the_offsets_whatever_the_type_is_called(tmp_path: Path) -> None:
    header = {
        "patch_embedding.weight": ("BF16", (128, 16, 1, 2, 2), 16384),
        "blocks.0.self_attn.q.weight": ("F4", (128, 128), 8192),  # two elements in a byte
        "blocks.0.ffn.0.weight": ("F8_E8M0", (256, 128), 32768),
        "blocks.0.ffn.0.scale": ("NEW_TYPE_7", (128,), 100),
        "head.head.weight": ("I8", (64, 128), 8192),
    }
    fields, end = {"__metadata__": {"format": "pt", "modelspec": None}}, 0
    for name, (dtype, shape, nbytes) in header.items():
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes], "more": {}}
        end += nbytes
    profile = read_checkpoint(raw_safetensors(tmp_path / "wan.safetensors", json.dumps(fields), end))
    assert dict(profile.dtypes) == {dtype: nbytes for dtype, _, nbytes in header.values()}
    assert profile.model.block_bytes == 8192 + 32768 + 100


def test_the_files_own_name_is_printed_on_one_line(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("Windows has no such names")
    assert r"\x1b[2J\nwan.safetensors" in refusal(raw_safetensors(tmp_path / "\x1b[2J\nwan.safetensors", "{}"))
    assert r"\x1b[2J\nwan.safetensors" in refusal(tmp_path / "missing" / "\x1b[2J\nwan.safetensors")
    (tmp_path / "\x1b[2J\nwan.ckpt").touch()
    assert r"\x1b[2J\nwan.ckpt" in refusal(tmp_path / "\x1b[2J\nwan.ckpt")


def test_text_that_json_escapes_passes_in_metadata(tmp_path: Path) -> None:
    tensors = wan_tensors()
    metadata = {"workflow": json.dumps({"a": ['"', "\\", '\\"', "}{", "\x1b"]}), "名": "\\"}
    save_file(tensors, tmp_path / "wan.safetensors", metadata)
    assert read_checkpoint(tmp_path / "wan.safetensors").architecture == TINY


@pytest.mark.parametrize("lie", LYING_SIZES)
def test_sizes_that_no_plan_could_use_are_refused(tmp_path: Path, lie: str) -> None:
    changes, reason = LYING_SIZES[lie]
    file = write_sparse_safetensors(tmp_path / "wan.safetensors", wan_shapes() | changes)
    if reason:
        assert re.search(reason, refusal(file))
    else:  # a name like any other
        assert len(read_checkpoint(file).model.blocks) == 2


@pytest.mark.parametrize("lie", LYING_GGUF)
def test_a_gguf_header_that_lies_is_refused_in_a_sentence(tmp_path: Path, lie: str) -> None:
    content, reason = LYING_GGUF[lie]
    (tmp_path / "wan.gguf").write_bytes(content)
    message = refusal(tmp_path / "wan.gguf")
    assert re.search(rf"wan\.gguf \([\d,]+ bytes\) is not a complete GGUF file: .*{reason}", message)


# ---- what else is touched


def test_a_header_that_is_too_long_is_refused_with_what_to_do(tmp_path: Path) -> None:
    file = raw_safetensors(tmp_path / "wan.safetensors", "{" + " " * (8 << 20))
    assert re.search(r"at most 8,388,608 bytes, got 8,388,609; save the model again without", refusal(file))


def test_a_name_that_is_a_path_is_a_name_and_no_other_file_is_opened(tmp_path: Path) -> None:
    names = dict.fromkeys(("../../../etc/passwd", "/dev/zero", "C:/Windows/win.ini", "file:///etc/passwd"), (4,))
    files = [
        write_sparse_safetensors(tmp_path / "wan.safetensors", wan_shapes() | names),
        write_sparse_gguf(tmp_path / "wan.gguf", wan_shapes() | names, "F16"),
    ]
    for file in files:
        with Watched() as touched:
            assert read_checkpoint(file).architecture == TINY
        assert {place for event, place in touched if event == "open"} == {str(file)}


def test_a_pipe_a_device_and_a_socket_are_refused_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform == "win32":
        pytest.skip("Windows has no such files")
    pipe, device, plug = (tmp_path / f"{kind}.safetensors" for kind in ("pipe", "device", "socket"))
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as opened:
        monkeypatch.chdir(tmp_path)
        opened.bind(plug.name)  # of about 100 letters at most
        for path in (pipe, device, plug):
            assert f"{path.name} is a pipe, a socket or a device; name a model file" in refusal(path)


def test_links_to_a_model_are_followed_and_links_in_a_circle_are_told(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("Windows needs a right for links")
    link = tmp_path / "link.safetensors"
    link.symlink_to(write_safetensors(tmp_path / "wan.safetensors", wan_tensors()))
    assert read_checkpoint(link).architecture == TINY
    circle = tmp_path / "circle.safetensors"
    circle.symlink_to(circle)
    assert "circle.safetensors cannot be read" in refusal(circle)
