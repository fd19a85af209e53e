"""The table of what fits: the page of the documents, a model's own file, and machines that are too small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_files import embedding_shapes, wan_shapes, write_sparse_gguf, write_sparse_safetensors
from wanvideo_enhanced_blockswap.cli import main
from wanvideo_enhanced_blockswap.commands.common_models import COMMON_MODELS, CommonModel
from wanvideo_enhanced_blockswap.commands.what_fits import CARDS, SHAPES
from wanvideo_enhanced_blockswap.hardware.cards import find_gpu

PAGE = Path(__file__).parents[1] / "docs" / "what-fits.md"
WHOLE = wan_shapes(5120, 13824, 40) | embedding_shapes(5120) | {"head.head.bias": (64,)}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", "--table", *arguments]) == 0
    return capsys.readouterr().out


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict]:
    return json.loads(run(capsys, *arguments, "--json"))["rows"]


def test_the_page_is_the_table_of_today(capsys: pytest.CaptureFixture[str]) -> None:
    command = "python -m wanvideo_enhanced_blockswap plan --table > docs/what-fits.md"
    assert PAGE.read_text(encoding="utf-8") == run(capsys), command


def test_the_table_has_a_row_for_each_model_card_and_size(capsys: pytest.CaptureFixture[str]) -> None:
    found = {(row["model"], row["card"], row["shape"]) for row in rows(capsys)}
    names = [find_gpu(card).name for card in CARDS]
    assert found == {(model.name, card, shape) for model in COMMON_MODELS for card in names for shape in SHAPES}


@pytest.mark.parametrize("shape", ["832x480x81", "1280x720x81"])
def test_a_row_is_what_plan_says_of_the_same_machine(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, shape: str
) -> None:
    file = str(write_sparse_safetensors(tmp_path / "wan.safetensors", WHOLE, "F8_E4M3"))
    machine = ("--gpu", "RTX 3060 12GB", "--ram", "32GB", "--available-ram", "28GB", "--disk", "3.5", "--shape", shape)
    (row,) = rows(capsys, file, *machine)
    assert main(["plan", file, *machine, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert row["missing"] is None
    assert row["kept"] == plan["blocks"] - plan["blocks_to_swap"]
    assert row["vram_bytes"] == plan["other_bytes"] + plan["device_bytes"] + plan["activation_bytes"]
    assert row["ram_bytes"] == plan["host_bytes"]
    assert row["forward_ms"] == pytest.approx(plan["predicted_compute_ms"] + plan["predicted_stall_ms"])
    assert row["bound"] == "computation"


def test_a_described_model_takes_what_its_file_takes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    described = CommonModel(name="fp16", kind="fp16").profile().model
    file = write_sparse_safetensors(tmp_path / "wan.safetensors", WHOLE, "BF16")
    assert main(["plan", str(file), "--vram", "24GB", "--ram", "64GB", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (described.block_bytes, described.other_bytes) == (plan["block_bytes"], plan["other_bytes"])


@pytest.mark.parametrize(
    ("machine", "missing"),
    [
        pytest.param(("--vram", "2GB", "--ram", "64GB"), "VRAM", id="activations"),
        pytest.param(("--vram", "0.2GB", "--ram", "64GB"), "VRAM", id="weights outside the blocks"),
        pytest.param(("--vram", "12GB", "--ram", "8GB"), "RAM", id="GGUF, which the loader copies"),
    ],
)
def test_a_machine_that_is_too_small_is_named_in_its_cell(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, machine: tuple[str, ...], missing: str
) -> None:
    pytest.importorskip("gguf")
    file = str(write_sparse_gguf(tmp_path / "wan.gguf", WHOLE, "Q4_K"))
    (row,) = rows(capsys, file, *machine, "--shape", "832x480x81")
    assert row["missing"] == missing
    assert f"| too little {missing} | | | | |" in run(capsys, file, *machine, "--shape", "832x480x81")


def test_slow_copies_and_slow_disks_bind(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = str(write_sparse_safetensors(tmp_path / "wan.safetensors", WHOLE, "BF16"))
    machine = ("--gpu", "RTX 4090", "--shape", "480x480x17")
    (fast,) = rows(capsys, file, *machine, "--ram", "64GB", "--link", "3")
    (disk,) = rows(capsys, file, *machine, "--ram", "16GB", "--disk", "0.2")
    assert (fast["bound"], disk["bound"]) == ("link", "disk")


def test_without_a_model_only_the_table_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--vram", "12GB"]) == 2
    assert "model (or --table)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        ("--blocks-to-swap", "35"),
        ("--context-window", "17"),
        ("--beside", "wan.safetensors"),
        ("--vram-threshold-percent", "60"),
    ],
    ids=lambda changes: changes[0],
)
def test_each_option_of_a_plan_changes_the_table_as_it_changes_the_plan(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, changes: tuple[str, str]
) -> None:
    file = str(write_sparse_safetensors(tmp_path / "wan.safetensors", WHOLE, "F8_E4M3"))
    machine = ["--gpu", "RTX 3060 12GB", "--ram", "32GB", "--available-ram", "18GB", "--disk", "3.5"]
    machine += ["--shape", "832x480x81", changes[0], file if changes[0] == "--beside" else changes[1]]
    (row,) = rows(capsys, file, *machine)
    assert main(["plan", file, *machine, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert row["kept"] == plan["blocks"] - plan["blocks_to_swap"]
    assert row["vram_bytes"] == plan["other_bytes"] + plan["device_bytes"] + plan["activation_bytes"]
    assert row["ram_bytes"] == plan["host_bytes"]
    assert row["forward_ms"] == pytest.approx(plan["predicted_compute_ms"] + plan["predicted_stall_ms"])


@pytest.mark.parametrize("option", ["--module", "--lora"])
def test_what_is_loaded_into_a_model_needs_the_model(capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert main(["plan", "--table", option, "any.safetensors"]) == 1
    assert "the model that they are loaded into is unknown; name its file" in capsys.readouterr().err


@pytest.mark.parametrize("card", ["Arc B580", "Apple M3 Max"])
def test_a_card_on_which_nothing_is_swapped_has_too_little_vram(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, card: str
) -> None:
    file = str(write_sparse_safetensors(tmp_path / "wan.safetensors", WHOLE, "F8_E4M3"))
    (row,) = rows(capsys, file, "--gpu", card, "--ram", "10GB", "--shape", "832x480x81")
    assert row["missing"] == "VRAM"


def test_a_side_that_is_smaller_than_a_token_is_refused_as_given(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = str(write_sparse_safetensors(tmp_path / "wan.safetensors", WHOLE, "F8_E4M3"))
    assert main(["plan", "--table", file, "--gpu", "RTX 4090", "--shape", "10x480x81"]) == 1
    assert "width: expected a multiple of 16, got 10; use 16" in capsys.readouterr().err
