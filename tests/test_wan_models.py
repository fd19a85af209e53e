"""Every model file that ComfyUI-WanVideoWrapper loads is planned for, and each tensor is counted where it lives."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
from checkpoint_files import ELEMENT_BYTES, Header, write_header, write_sparse_gguf
from wan_models import (
    MODELS,
    MODULES,
    Published,
    animate,
    lynx,
    s2v,
    stored,
    talk_module,
    under,
    vace_module,
    wan,
)
from wanvideo_enhanced_blockswap.blockswap.checkpoint.wan_file import read_checkpoint
from wanvideo_enhanced_blockswap.blockswap.errors import CheckpointError
from wanvideo_enhanced_blockswap.blockswap.model.groups import in_order, is_beside
from wanvideo_enhanced_blockswap.blockswap.model.layout import device_bytes
from wanvideo_enhanced_blockswap.blockswap.model.recognise import CheckpointProfile
from wanvideo_enhanced_blockswap.cli import main
from wanvideo_enhanced_blockswap.hardware.units import GIB

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="NTFS would store the zeros of stretched files")

SWAPPED = re.compile(
    r"^(\w+_model\.|(model\.)?(diffusion_model\.)?)?("
    r"(vace_blocks|blocks|(face_adapter|ip_adapter)\.(fuser_)?blocks)\.\d+\."
    r"|(controlnet\.blocks|controlnet_zero|audio_injector\.injector(_adain_layers)?)\.\d+\."
    r"|(refextractor|casual_audio_encoder|image_to_cond|face_encoder|motion_encoder|multitalk_audio_proj)\."
    r"|audio_proj\.(proj|norm)|controlnet_(blocks|patch_embedding)\.)"
)
"""Names, as files have them, of what is swapped: the blocks, and what is beside them."""
AS_FLOAT = re.compile(r"motion_encoder\.|(refextractor\.|controlnet_)patch_embedding\.")
"""Those that are loaded as float32."""
MACHINE = ("--gpu", "RTX 4090", "--ram", "256GiB", "--json")
every_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
every_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)


def header_bytes(header: Header, *, in_blocks: bool) -> int:
    return sum(
        (4 if AS_FLOAT.search(name) else ELEMENT_BYTES[dtype]) * math.prod(shape)
        for name, (dtype, shape) in header.items()
        if bool(SWAPPED.search(name)) == in_blocks
        and not name.endswith(".comfy_quant")  # which says how, and is no weight
    )


def write(folder: Path, model: Published) -> Path:
    return write_header(folder / f"{model.name}.safetensors", model.header())


def base(folder: Path, size: str = "14B") -> Path:
    return write_header(folder / "base.safetensors", stored(wan(size), "fp8"))


def run_plan(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, object]]:
    code = main(["plan", *map(str, arguments), *MACHINE])
    shown = json.loads(capsys.readouterr().out)
    assert isinstance(shown, dict)
    return code, shown


# ---- whole models


@every_model
def test_a_model_is_planned_for_and_named_and_its_blocks_are_those_of_its_header(
    model: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown = run_plan(capsys, write(tmp_path, model))
    assert code == 0, shown
    assert shown["family"] == model.family
    header = model.header()
    assert shown["block_bytes"] == header_bytes(header, in_blocks=True)
    assert shown["other_bytes"] == header_bytes(header, in_blocks=False)


@pytest.mark.parametrize(
    ("name", "blocks", "block_bytes"),
    [
        ("wan2.2_animate_14B_bf16", 40, 33_985_130_496),
        ("LongCat_TI2V_comfy_bf16", 48, 27_084_767_232),
        ("diffusion_pytorch_model", 30, 2 * 2_786_442_240),
        ("wan2.1_t2v_14B_bf16", 40, 40 * 2 * 351_394_304),
    ],
)
def test_the_blocks_of_published_files_have_the_bytes_that_their_headers_give(
    tmp_path: Path, name: str, blocks: int, block_bytes: int
) -> None:
    profile = read_checkpoint(write(tmp_path, next(model for model in MODELS if model.name == name)))
    found = [block.nbytes for block in profile.model.blocks if block.name.startswith("blocks.")]
    assert (len(found), sum(found)) == (blocks, block_bytes)


def test_plan_shows_the_family_below_its_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_header(tmp_path / "wan.safetensors", stored(wan("1.3B", 36, image=True), "BF16"))
    assert main(["plan", str(path), *MACHINE[:4]]) == 0
    assert re.match(
        r"The weights fit: [^\n]*\n\nmodel +Wan 2\.1 I2V 1\.3B, [\d.]+ GB of blocks\n", capsys.readouterr().out
    )


def test_longcat_has_48_blocks_of_width_4096_and_three_matrices_in_each_feed_forward_layer(tmp_path: Path) -> None:
    model = next(model for model in MODELS if model.family == "LongCat")
    architecture = read_checkpoint(write(tmp_path, model)).architecture
    assert (architecture.blocks, architecture.width, architecture.heads) == (48, 4096, 32)
    assert (architecture.ffn_width, architecture.ffn_matrices) == (11008, 3)


@pytest.mark.parametrize(("channels", "positions", "tokens"), [(16, False, 0), (36, False, 257), (36, True, 514)])
def test_the_tokens_of_an_image_are_known(tmp_path: Path, channels: int, positions: bool, tokens: int) -> None:
    shapes = wan("1.3B", channels, image=channels == 36)
    shapes |= {"img_emb.emb_pos": (1, 514, 1280)} if positions else {}
    file = write_header(tmp_path / "wan.safetensors", stored(shapes, "BF16"))
    assert read_checkpoint(file).architecture.image_tokens == tokens


def test_both_layouts_of_animate_give_the_same_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plans = []
    for fused in (False, True):
        file = write_header(tmp_path / f"{fused}.safetensors", stored(animate(fused=fused), "BF16"))
        plans.append(run_plan(capsys, file, "--shape", "832x480x81", "--link", "25"))
    assert plans[0] == plans[1]
    assert plans[0][0] == 0


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("Wan2_2-S2V-14B_fp8_e4m3fn_scaled_KJ", 1 + 12 + 12),
        ("Wan21-OneToAllAnimation_fp8_e4m3fn_scaled_KJ", 2 + 3 * 7),
        ("wan2.2_animate_14B_bf16", 2),
        ("LongCat-Avatar_comfy_bf16", 1),
        ("Wan21-SkyReelsV3-A2V_fp8_scaled_mixed", 1),
    ],
)
def test_what_is_beside_the_blocks_is_swapped_in_the_order_of_a_forward(tmp_path: Path, name: str, beside: int) -> None:
    profile = read_checkpoint(write(tmp_path, next(model for model in MODELS if model.name == name)))
    names = [block.name for block in profile.model.blocks]
    assert names == in_order(names)
    assert sum(map(is_beside, names)) == beside
    assert len(names) - beside == profile.architecture.blocks


def test_a_plan_says_how_many_blocks_and_how_many_modules_beside_them_are_swapped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_header(tmp_path / "s2v.safetensors", stored(s2v(), "fp8"))
    asked = ["plan", str(file), "--gpu", "RTX 3060 12GB", "--ram", "64GiB", "--shape"]
    assert main([*asked, "832x480x81", "--verbose"]) == 0
    shown = capsys.readouterr().out
    found = re.search(r"(\d+) of 65 parts are swapped, the fewest", shown)
    beside = re.search(r"of what is swapped, (\d+) modules are beside the blocks: ", shown)
    assert found is not None
    assert beside is not None
    assert 0 < int(beside[1]) < int(found[1])
    assert main([*asked, "1280x720x121"]) == 0
    where = "0 blocks on the GPU, 40 streaming, with 25 other parts of the model"
    assert re.match(rf"It fits only with \d+\.\d MB of the reserve: {where}\. ", capsys.readouterr().out)


def test_s2v_streams_through_two_slots_of_a_block_and_the_size_of_an_injector(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_header(tmp_path / "s2v.safetensors", stored(s2v(), "BF16"))
    shown = run_plan(capsys, file, "--blocks-to-swap", "all")[1]
    assert shown["blocks_to_swap"] == 40 + 25
    block, small = max(shown["slot_bytes"], 0), shown["resident_bytes"]  # type: ignore[call-overload]
    assert block == device_bytes(2 * (8 * 5120**2 + 2 * 5120 * 13824))
    assert shown["device_bytes"] - 2 * block - small < 0.3 * GIB  # type: ignore[operator]
    assert small < 0.03 * GIB  # type: ignore[operator]


def test_the_blocks_of_ovis_audio_half_are_in_the_blocks_of_the_video_half(tmp_path: Path) -> None:
    whole = read_checkpoint(write(tmp_path, next(model for model in MODELS if "Ovi audio" in model.family)))
    assert len(whole.model.blocks) == whole.architecture.blocks == 30
    assert "audio_block.self_attn.q.weight" in {tensor.name for tensor in whole.model.blocks[29].tensors}


# ---- modules


@every_module
def test_a_module_is_counted_where_it_lives(
    module: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = run_plan(capsys, base(tmp_path))[1]
    code, shown = run_plan(capsys, base(tmp_path), "--module", write(tmp_path, module))
    assert code == 0, shown
    assert shown["family"] == f"Wan 2.1/2.2 T2V 14B + {module.family}"
    for key, in_blocks in (("block_bytes", True), ("other_bytes", False)):
        assert shown[key] - alone[key] == header_bytes(module.header(), in_blocks=in_blocks)  # type: ignore[operator]


@every_module
def test_a_module_in_the_models_place_is_called_what_it_is(module: Published, tmp_path: Path) -> None:
    sentence = rf"are those of a module \({module.family}\); name the model .* give this file with --module"
    with pytest.raises(CheckpointError, match=sentence):
        read_checkpoint(write(tmp_path, module))


def test_the_blocks_of_a_vace_module_are_swapped_as_vace_blocks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = write_header(tmp_path / "vace.safetensors", stored(vace_module("14B"), "fp8"))
    profile = read_checkpoint(base(tmp_path), modules=[module])
    assert profile.architecture.vace_blocks == 8
    assert [block.name for block in profile.model.blocks[:9]] == [*(f"vace_blocks.{n}" for n in range(8)), "blocks.0"]
    shown = run_plan(capsys, base(tmp_path), "--module", module, "--blocks-to-swap", "all")[1]
    assert shown["blocks_to_swap"] == 48


@pytest.mark.parametrize("part", [1, 2])
def test_a_module_in_several_files_is_read_whole(tmp_path: Path, part: int) -> None:
    header = stored(vace_module("14B"), "BF16")
    names = [*header]
    for number, own in enumerate((names[:100], names[100:]), start=1):
        write_header(tmp_path / f"vace-0000{number}-of-00002.safetensors", {name: header[name] for name in own})
    profile = read_checkpoint(base(tmp_path), modules=[tmp_path / f"vace-0000{part}-of-00002.safetensors"])
    whole = write_header(tmp_path / "vace.safetensors", header)
    assert profile.model.block_bytes == read_checkpoint(base(tmp_path), modules=[whole]).model.block_bytes
    assert profile.architecture.vace_blocks == 8


def test_several_modules_add_up(tmp_path: Path) -> None:
    files = [
        write_header(tmp_path / f"{number}.safetensors", stored(shapes, "F16"))
        for number, shapes in enumerate((vace_module("14B"), talk_module(), lynx("full"), lynx("ref")))
    ]
    profile = read_checkpoint(base(tmp_path), modules=files)
    assert profile.architecture.parts == ("VACE", "MultiTalk/InfiniteTalk", "Lynx")
    first = next(block for block in profile.model.blocks if block.name == "blocks.0")
    kept = {tensor.name for tensor in first.tensors}
    assert {"audio_cross_attn.q_linear.weight", "self_attn.ref_adapter.to_k_ref.weight"} <= kept


@pytest.mark.parametrize(
    ("size", "shapes", "reason"),
    [
        ("1.3B", talk_module(), r"has blocks\.39, but the blocks of .* end at blocks\.29; give the module for a model"),
        (
            "14B",
            vace_module("1.3B"),
            r"module\.safetensors has blocks of width 1536, those of .* have 5120; give",
        ),
        ("14B", wan("1.3B"), "is a whole model, not a module; name it as the model, or give it with --experts"),
        ("14B", {"decoder.conv1.weight": (4, 4)}, "is not a module .*: its tensors are those of a VAE; name the Wan"),
        ("14B", {"blocks.0.self_attn.q.lora_A.weight": (4, 4)}, "those of a LoRA; .* give this file with --lora"),
        ("14B", {"x": (4, 4)}, "is not a module of a Wan model: its tensors are those of another model"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(
    tmp_path: Path, size: str, shapes: dict[str, tuple[int, ...]], reason: str
) -> None:
    module = write_header(tmp_path / "module.safetensors", stored(shapes, "BF16"))
    with pytest.raises(CheckpointError, match=reason):
        read_checkpoint(base(tmp_path, size), modules=[module])


def test_vace_is_refused_beside_a_model_that_takes_an_image(tmp_path: Path) -> None:
    model = write_header(tmp_path / "i2v.safetensors", stored(wan("14B", 36), "fp8"))
    module = write_header(tmp_path / "vace.safetensors", stored(vace_module("14B"), "fp8"))
    with pytest.raises(CheckpointError, match=r"VACE needs a T2V model, and .* has 36 input channels"):
        read_checkpoint(model, modules=[module])


# ---- GGUF


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "F16"])
def test_a_gguf_of_animate_has_its_face_fusers_in_its_blocks(tmp_path: Path, prefix: str, kind: str) -> None:
    files = [
        write_sparse_gguf(tmp_path / f"{fused}.gguf", under(prefix, animate(fused=fused)), kind)
        for fused in (False, True)
    ]
    first, second = map(read_checkpoint, files)
    assert first.family == second.family == "Animate 14B"
    assert [block.nbytes for block in first.model.blocks] == [block.nbytes for block in second.model.blocks]
    sizes = {block.name: block.nbytes for block in first.model.blocks}
    assert sizes["blocks.0"] > sizes["blocks.1"]


def test_modules_beside_a_gguf_are_gguf_where_the_loader_asks_for_it(tmp_path: Path) -> None:
    model = write_sparse_gguf(tmp_path / "wan.gguf", wan("14B"), "Q4_K")
    vace = write_sparse_gguf(tmp_path / "vace.gguf", vace_module("14B"), "Q4_K")
    talk = write_header(tmp_path / "talk.safetensors", stored(talk_module(), "F16"))
    assert read_checkpoint(model, modules=[vace, talk]).architecture.parts == ("VACE", "MultiTalk/InfiniteTalk")
    other = write_header(tmp_path / "vace.safetensors", stored(vace_module("14B"), "F16"))
    with pytest.raises(CheckpointError, match=r"expected a \.gguf file, got vace\.safetensors; give the module as \.g"):
        read_checkpoint(model, modules=[other])
    with pytest.raises(CheckpointError, match=r"expected a \.safetensors file, got vace\.gguf; give the module as \.s"):
        read_checkpoint(base(tmp_path), modules=[vace])


def test_a_gguf_that_lacks_its_tensor_of_5_dimensions_is_told_how_to_get_it(tmp_path: Path) -> None:
    for whole_model in (wan("1.3B"), under("model.diffusion_model.", wan("1.3B") | vace_module("1.3B"))):
        shapes = {name: shape for name, shape in whole_model.items() if len(shape) < 5}
        with pytest.raises(CheckpointError, match=r"lack patch_embedding\.weight, .* fix_5d_tensors\.py"):
            read_checkpoint(write_sparse_gguf(tmp_path / "wan.gguf", shapes, "Q4_K"))
        with pytest.raises(CheckpointError, match=r"lack patch_embedding\.weight; join the parts of a split model, or"):
            read_checkpoint(write_header(tmp_path / "wan.safetensors", stored(shapes, "BF16")))


# ---- LoRAs, experts, context windows

LORA_LAYOUTS = {
    "ComfyUI": ("diffusion_model.blocks.{n}.self_attn.q.{side}.weight", "lora_A", "lora_B"),
    "kohya": ("lora_unet_blocks_{n}_self_attn_q.{side}.weight", "lora_down", "lora_up"),
    "Fun": ("lora_unet__blocks_{n}_self_attn_q.{side}.weight", "lora_down", "lora_up"),
    "DiffSynth": ("pipe.dit.blocks.{n}.self_attn.q.{side}.default.weight", "lora_A", "lora_B"),
    "PEFT": ("base_model.model.blocks.{n}.self_attn.q.{side}.weight", "lora_A", "lora_B"),
    "plain": ("blocks.{n}.self_attn.q.{side}.weight", "lora.down", "lora.up"),
}


@pytest.mark.parametrize("layout", LORA_LAYOUTS)
def test_an_unmerged_lora_is_in_the_blocks_that_it_changes_in_the_type_of_the_computation(
    layout: str, tmp_path: Path
) -> None:
    name, down, up = LORA_LAYOUTS[layout]
    shapes = {}
    for number in range(40):
        shapes[name.format(n=number, side=down)] = (64, 5120)
        shapes[name.format(n=number, side=up)] = (5120, 64)
    lora = write_header(tmp_path / "lora.safetensors", {key: ("F32", shape) for key, shape in shapes.items()})
    alone = read_checkpoint(base(tmp_path))
    profile = read_checkpoint(base(tmp_path), loras=[lora, lora])
    for before, after in zip(alone.model.blocks, profile.model.blocks, strict=True):
        assert after.nbytes - before.nbytes == 2 * 2 * (64 * 5120) * 2
    assert profile.model.other_bytes == alone.model.other_bytes


def test_plan_takes_several_loras(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = {
        "blocks.0.ffn.0.lora_A.weight": ("BF16", (32, 5120)),
        "blocks.0.ffn.0.lora_B.weight": ("BF16", (13824, 32)),
    }
    lora = write_header(tmp_path / "lora.safetensors", header)
    alone, both = (
        run_plan(capsys, base(tmp_path), *loras)[1]["block_bytes"] for loras in ([], ["--lora", lora, "--lora", lora])
    )
    assert both - alone == 2 * 2 * 32 * (5120 + 13824)  # type: ignore[operator]


def test_unianimates_lora_adds_layers_beside_the_blocks(tmp_path: Path) -> None:
    header = {
        "dwpose_embedding.0.weight": ("F16", (16, 3, 3, 3, 3)),
        "blocks.0.self_attn.q.lora_A.default.weight": ("F16", (64, 5120)),
    }
    profile = read_checkpoint(base(tmp_path), loras=[write_header(tmp_path / "lora.safetensors", header)])
    assert profile.family.endswith("+ UniAnimate")
    assert profile.model.other_bytes - read_checkpoint(base(tmp_path)).model.other_bytes == 2 * 16 * 3 * 27


@pytest.mark.parametrize(("side", "shape"), [("lora_B", (1536, 32)), ("diff", (1536, 1536))])
def test_a_lora_for_a_model_of_another_size_is_refused(side: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    header = {f"diffusion_model.blocks.0.self_attn.q.{side}.weight": ("F16", shape)}
    header["diffusion_model.blocks.0.self_attn.q.lora_A.weight"] = ("F16", (32, 1536))
    lora = write_header(tmp_path / "lora.safetensors", header)
    with pytest.raises(
        CheckpointError, match=rf"is not for .*has shape \({shape[0]}, .*the layer 5120 outputs; give a"
    ):
        read_checkpoint(base(tmp_path), loras=[lora])


@pytest.mark.parametrize(
    ("kind", "wide", "copies", "with_lora"),
    [
        ("BF16", False, 0, 3),
        ("fp8", True, 1, 4),
        ("fp8_scaled", False, 2, 4),
        ("fp8_weight_scale", False, 2, 4),
        ("fp8_comfy", False, 2, 4),
    ],
)
def test_how_the_wrapper_runs_a_file_follows_from_what_is_stored(
    kind: str, wide: bool, copies: int, with_lora: int, tmp_path: Path
) -> None:
    model = write_header(tmp_path / "model.safetensors", stored(wan("1.3B"), kind))
    header = {f"blocks.0.ffn.0.{side}.weight": ("BF16", (8960, 1536)) for side in ("lora_A", "lora_B")}
    lora = write_header(tmp_path / "lora.safetensors", header)
    options = read_checkpoint(model).forward_options
    assert (options.wide, options.weight_copies) == (wide, copies)
    options = read_checkpoint(model, loras=[lora]).forward_options
    assert (options.wide, options.weight_copies) == (False, with_lora)


def test_a_mixed_file_whose_last_block_is_not_quantised_is_scaled(tmp_path: Path) -> None:
    mixed, plain = (stored(wan("1.3B"), kind) for kind in ("fp8_scaled", "BF16"))
    mixed = {name: entry for name, entry in mixed.items() if not name.startswith("blocks.29.")}
    mixed |= {name: entry for name, entry in plain.items() if name.startswith("blocks.29.")}
    options = read_checkpoint(write_header(tmp_path / "mixed.safetensors", mixed)).forward_options
    assert (options.wide, options.weight_copies) == (False, 2)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("double_blocks.0.lora_A.weight", r"changes no layer of .*; give a LoRA for this model"),
        ("decoder.conv1.weight", "is not a LoRA: its tensors are those of a VAE; give a LoRA for this model"),
    ],
)
def test_a_lora_of_another_model_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    lora = write_header(tmp_path / "lora.safetensors", {name: ("F16", (4, 4))})
    with pytest.raises(CheckpointError, match=reason):
        read_checkpoint(base(tmp_path), loras=[lora])


def test_a_pair_of_experts_is_what_two_models_beside_each_other_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = base(tmp_path)
    assert run_plan(capsys, file, "--experts", file) == run_plan(capsys, file, "--beside", file)


def test_a_context_window_bounds_the_tokens_of_a_forward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = base(tmp_path)
    whole = run_plan(capsys, file, "--shape", "832x480x257")[1]
    window = run_plan(capsys, file, "--shape", "832x480x257", "--context-window", "81")[1]
    short = run_plan(capsys, file, "--shape", "832x480x41", "--context-window", "81")[1]
    assert (whole["tokens"], window["tokens"], short["tokens"]) == (65 * 1560, 21 * 1560, 11 * 1560)
    code, shown = run_plan(capsys, file, "--context-window", "81")
    assert code == 1
    assert "--context-window: the size of the video is unknown; give it with --shape" in str(shown["error"])
    assert "expected a multiple of 4 plus 1" in str(
        run_plan(capsys, file, "--shape", "832x480x257", "--context-window", "80")[1]["error"]
    )


# ---- models in several files


def split(folder: Path, parts: int, *, index: bool) -> list[Path]:
    entries = list(stored(wan("1.3B"), "BF16").items())
    files = []
    for number in range(parts):
        name = f"diffusion_pytorch_model-{number + 1:05}-of-{parts:05}.safetensors"
        files.append(write_header(folder / name, dict(entries[number::parts])))
    if index:
        names = {name: files[number % parts].name for number, (name, _) in enumerate(entries)}
        text = json.dumps({"metadata": {}, "weight_map": names})
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    return files


def whole(folder: Path) -> CheckpointProfile:
    return read_checkpoint(write_header(folder / "whole.safetensors", stored(wan("1.3B"), "BF16")))


@pytest.mark.parametrize("index", [False, True])
def test_any_part_and_the_index_give_the_whole_model(tmp_path: Path, index: bool) -> None:
    files = split(tmp_path, 3, index=index)
    named = [files[0], files[2], *([tmp_path / "diffusion_pytorch_model.safetensors.index.json"] if index else [])]
    for path in named:
        profile = read_checkpoint(path)
        assert profile.model.block_bytes == whole(tmp_path).model.block_bytes
        assert profile.model.other_bytes == whole(tmp_path).model.other_bytes


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    files = split(tmp_path, 3, index=True)
    files[1].unlink()
    for path in (files[0], tmp_path / "diffusion_pytorch_model.safetensors.index.json"):
        with pytest.raises(CheckpointError, match=r"3 files, of which 1 are missing: diffusion.*-00002-of-00003\.safe"):
            read_checkpoint(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "is not the index of a model in several files; name the model file"),
        ("[" * 30_000, "is not the index"),
        ('{"weight_map": []}', "is not the index"),
        ('{"weight_map": {"a": 3}}', "is not the index"),
        ('{"weight_map": {"a": ["b"]}}', "is not the index"),
        ('{"weight_map": {"a": "wan.bin"}}', "is not the index"),
        ('{"weight_map": {"a": "wan.safetensors"}}', r"a model in 1 files, of which 1 are missing: wan\.safetensors"),
        ('{"weight_map": {"a": "../x-00001-of-00001.safetensors"}}', "names files in other folders"),
        ('{"weight_map": {"a": "C:\\\\x-00001-of-00001.safetensors"}}', "names files in other folders"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    index = tmp_path / "wan.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match=reason):
        read_checkpoint(index)


# ---- what is not read


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        (
            {"weight": ("U8", (8192, 1)), "weight.quant_state.bitsandbytes__nf4": ("U8", (80,))},
            r"tensor blocks\.0\.self_attn\.q\.weight is stored as packed 4-bit \(bitsandbytes nf4\), which is not read",
        ),
        ({"weight": ("U8", (8192, 1))}, r"blocks\.0\.self_attn\.q\.weight is stored as packed U8 of shape \(8192, 1\)"),
        ({"weight": ("I8", (128, 128)), "SCB": ("F32", (128,))}, r"q\.weight is stored as 8-bit .*bitsandbytes int8"),
        ({"qweight": ("I8", (128, 64)), "wscales": ("BF16", (2, 128))}, r"q\.qweight is stored as SVDQuant, which"),
        ({"weight._data": ("U8", (64, 128)), "weight._scale": ("BF16", (128, 1))}, r"q\.weight is stored as Quanto's"),
        ({"qweight": ("U8", (16, 128)), "qzeros": ("U8", (1, 16))}, r"q\.qweight is stored as packed 4-bit \(GPTQ or"),
        ({"weight": ("U8", (128, 64)), "biases": ("F16", (128, 2))}, r"q\.weight is stored as MLX's packed integers"),
        ({"W_q": ("U8", (64, 128)), "meta": ("F32", (1,))}, r"q\.W_q is stored as HQQ's packed integers"),
    ],
)
def test_a_packing_that_is_not_read_is_named_with_a_tensor_and_a_cure(
    tmp_path: Path, layers: dict[str, tuple[str, tuple[int, ...]]], reason: str
) -> None:
    header = {name: entry for name, entry in stored(wan("1.3B"), "BF16").items() if ".self_attn.q." not in name}
    for number in range(30):
        header |= {f"blocks.{number}.self_attn.q.{end}": entry for end, entry in layers.items()}
    file = write_header(tmp_path / "packed.safetensors", header)
    with pytest.raises(CheckpointError, match=f"{reason}.*; use the fp8, bf16 or GGUF file of the model"):
        read_checkpoint(file)


OTHERS = {
    "a LoRA": ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "lora_unet_blocks_0_ffn_0.lora_down.weight"),
    "a text encoder": ("token_embedding.weight", "shared.weight", "enc.blk.0.attn_q.weight"),
    "a VAE": ("decoder.middle.0.residual.0.gamma", "encoder.conv_in.weight", "model.decoder.conv1.weight"),
    "a CLIP vision encoder": ("visual.transformer.0.attn.to_qkv.weight", "vision_model.embeddings.class_embedding"),
    "an audio encoder": ("wav2vec2.encoder.layers.0.attention.k_proj.weight", "model.encoder.layers.0.fc1.weight"),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in OTHERS.items() for name in names])
def test_another_file_in_the_models_place_is_called_what_it_is(tmp_path: Path, kind: str, name: str) -> None:
    file = write_header(tmp_path / "file.safetensors", {name: ("BF16", (4, 4))})
    with pytest.raises(CheckpointError, match=f"is not a Wan model: its 1 tensors .* are those of {kind}; name the"):
        read_checkpoint(file)


CONTENTS = {
    "a GGUF file; rename it to .gguf": b"GGUF" + bytes(60),
    "a Git LFS pointer to the model; run git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:",
    "a web page in the place of the model; download the file": b"<!DOCTYPE html><html>",
    "a zip file, in which torch.save keeps pickles; convert it": b"PK\x03\x04" + bytes(60),
    "a pickle; convert it to .safetensors": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
}


@pytest.mark.parametrize("called", CONTENTS)
def test_a_file_under_a_wrong_name_is_called_what_it_is(tmp_path: Path, called: str) -> None:
    file = tmp_path / "wan.safetensors"
    file.write_bytes(CONTENTS[called])
    with pytest.raises(CheckpointError, match=rf"wan\.safetensors is {called}"):
        read_checkpoint(file)


def test_a_safetensors_file_that_is_called_gguf_is_named(tmp_path: Path) -> None:
    file = write_header(tmp_path / "wan.gguf", stored(wan("1.3B"), "BF16"))
    with pytest.raises(CheckpointError, match=r"is a safetensors file; rename it to \.safetensors"):
        read_checkpoint(file)
    assert read_checkpoint(file.rename(tmp_path / "wan.sft")) == whole(tmp_path)


def test_a_safetensors_file_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    file = write_header(tmp_path / "wan.safetensors", stored(wan("1.3B"), "BF16"))
    size = file.stat().st_size
    with file.open("r+b") as changed:
        length = int.from_bytes(changed.read(8), "little")
        text = changed.read(length)
        text += b" " * ((0x0280 - length) % (1 << 16))
        changed.seek(0)
        changed.write(len(text).to_bytes(8, "little") + text)
        changed.truncate(size + len(text) - length)
        changed.seek(0)
        assert changed.read(2) == b"\x80\x02"
    assert read_checkpoint(file) == whole(tmp_path)


@pytest.mark.parametrize("end", [".part", ".crdownload", ".incomplete", ".aria2"])
def test_a_download_that_has_not_ended_is_named(tmp_path: Path, end: str) -> None:
    file = tmp_path / f"wan.safetensors{end}"
    file.touch()
    with pytest.raises(CheckpointError, match="an unfinished download; let it finish, or resume it"):
        read_checkpoint(file)


def test_aria2s_note_beside_a_file_tells_that_it_is_unfinished(tmp_path: Path) -> None:
    file = base(tmp_path)
    (tmp_path / f"{file.name}.aria2").touch()
    with pytest.raises(CheckpointError, match=r"is an unfinished download, as .*\.aria2 shows; let it finish"):
        read_checkpoint(file)


@pytest.mark.parametrize("end", [".pt", ".pth", ".bin", ".ckpt"])
def test_a_pickle_is_named_by_its_ending(tmp_path: Path, end: str) -> None:
    file = tmp_path / f"wan{end}"
    file.touch()
    with pytest.raises(CheckpointError, match=r"got wan\..*, a pickle, which runs code when it is loaded; convert it"):
        read_checkpoint(file)
