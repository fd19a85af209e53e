"""The command line: what it prints for a person, for a program, and for impossible values."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import wan_shapes, wan_tensors, write_safetensors, write_sparse_gguf, write_sparse_safetensors
from wanvideo_enhanced_blockswap.cli import main
from wanvideo_enhanced_blockswap.commands.demo import CopyCounter
from wanvideo_enhanced_blockswap.hardware import GIB, HostMemory, HostPlatform

DEMO_FIELDS = {
    "outputs_equal",
    "weights_d2h_bytes",
    "planned_weight_bytes",
    "peak_weight_bytes",
    "swapped_bytes",
    "slab_bytes",
    "blocks",
    "blocks_swapped",
    "slots",
    "stall_ms_per_forward",
    "step_ms",
    "device",
    "measured_by",
}


DEMO = ("demo", "--steps", "1", "--shape", "32x32x5")


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict]:
    code = main([*arguments, "--json"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1, lines
    return code, json.loads(lines[0])


def check_promises(shown: dict) -> None:
    assert shown.keys() >= DEMO_FIELDS
    assert shown["outputs_equal"] is True
    assert shown["weights_d2h_bytes"] == 0
    assert 0 < shown["peak_weight_bytes"] <= shown["planned_weight_bytes"]
    assert shown["slab_bytes"] <= 1.01 * shown["swapped_bytes"]
    assert shown["swapped_bytes"] >= shown["blocks_swapped"] * (1 << 20)
    assert shown["step_ms"] > 0


@pytest.mark.usefixtures("short_texts")
@pytest.mark.parametrize(("asked", "swapped"), [("0", 0), ("1", 1), ("half", 6), ("all", 12), (None, None)])
def test_the_demo_keeps_its_promises_on_a_simulated_device(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, asked: str | None, swapped: int | None
) -> None:
    picture = tmp_path / "timeline.png"
    options = [] if asked is None else ["--blocks-to-swap", asked]
    code, shown = run_json(capsys, *DEMO, "--device", "cpu", "--picture", str(picture), *options)
    assert code == 0
    check_promises(shown)
    assert shown["measured_by"] == "accounting"
    assert shown["blocks_swapped"] == swapped or (asked is None and 2 < shown["blocks_swapped"] < shown["blocks"])
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("short_texts")
@pytest.mark.parametrize("asked", ["0", "1", "half", "all", None])
def test_the_demo_keeps_its_promises_on_a_device_that_counts_for_itself(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, pretend_stats, asked: str | None
) -> None:
    options = [] if asked is None else ["--blocks-to-swap", asked]
    picture = str(tmp_path / "t.png")
    code, shown = run_json(capsys, *DEMO, "--device", "hpu:0", "--picture", picture, *options)
    assert code == 0
    check_promises(shown)
    assert shown["measured_by"] == "pretend"
    slots_are_enough = shown["slots"] == shown["blocks_swapped"]
    streamed = shown["blocks_swapped"] * (shown["swapped_bytes"] // max(1, shown["blocks_swapped"]))
    assert shown["h2d_bytes"] >= shown["unswapped_weight_bytes"] - 100_000
    assert shown["h2d_bytes"] >= (1 if slots_are_enough else 2) * streamed


def test_the_dispatcher_counts_the_copies_that_the_device_counts(pretend_device: torch.device, pretend_stats) -> None:
    from pretend_accelerator import install

    before = install().copy_stats()
    with CopyCounter() as counter:
        there = torch.randn(1000).to(pretend_device)
        there.copy_(torch.zeros(1000))
        back = there[:10].cpu()
        there + there
    now = install().copy_stats()
    assert back.device.type == "cpu"
    assert counter.moved.to_device == now["h2d_bytes"] - before["h2d_bytes"] == 8000
    assert counter.moved.to_host == now["d2h_bytes"] - before["d2h_bytes"] == 40


@pytest.mark.usefixtures("short_texts")
def test_the_demo_says_it_all_to_a_person(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*DEMO, "--device", "cpu", "--picture", str(tmp_path / "t.png")]) == 0
    said = capsys.readouterr()
    assert "outputs equal: yes, bit for bit" in said.out
    assert re.search(r"the GPU waits in a pass of the model +\d+\.\d\d ms", said.out)
    assert "swapped: 100%" in said.err


BAD_VALUES = [
    (["demo", "--blocks-to-swap", "13"], r"0 to 12.*got '13'"),
    (["demo", "--blocks-to-swap", "-1"], r"0 to 12.*got '-1'"),
    (["demo", "--blocks-to-swap", "nan"], r"whole number.*got 'nan'"),
    (["demo", "--blocks-to-swap", "most"], r"half or all.*got 'most'"),
    (["demo", "--device", "toaster"], r"--device: expected.*'toaster'"),
    (["demo", "--device", "cuda:99"], r"--device: expected.*'cuda:99'"),
    (
        ["demo", "--vram", "1MiB"],
        r"--vram: not enough for the weights outside the blocks: .* needed, 1.0 MB given",
    ),
    (["demo", "--vram=-5GiB"], r"--vram"),
    (["demo", "--vram", "nan"], r"--vram"),
    (["demo", "--vram", "twelve"], r"--vram: expected a memory size such as 12GB, got 'twelve'"),
    (["demo", "--vram", "12KB"], r"--vram: expected a memory size such as 12GB, got '12KB', which is 12288 bytes"),
    (["demo", "--vram", "99999999999"], r"--vram: expected a memory size of at most 1048576 TB, got"),
    (
        ["plan", "WAN", "--gpu", "4060 Ti"],
        r"--gpu: RTX 4060 Ti exists with 8 GB and 16 GB; add the size, such as .*--vram",
    ),
    (["plan", "WAN", "--gpu", "RTX 3080 16GB"], r"--gpu: RTX 3080 exists with 10 GB and 12 GB, not with 16 GB"),
    (["demo", "--shape", "32x"], r"WxHxF.*'32x'"),
    (["demo", "--shape", f"{'9' * 180}x16x1"], r"at most 100000 for each"),
    (["demo", "--shape", "17x16x1"], r"width: expected a multiple of 16, got 17"),
    (["simulate", "--blocks", "4", "--swapped", "101%", "--ratio", "1"], r"--swapped: expected"),
    (["plan", "missing.safetensors", "--vram", "12GiB"], r"missing\.safetensors"),
    (
        ["plan", "WAN", "--vram", "12GiB", "--ram", "8GiB", "--available-ram", "9GiB"],
        r"--available-ram: expected at most the 8.0 GB of RAM, got 9.0 GB",
    ),
    (
        ["plan", "WAN", "--vram", "12", "--ram", "8 GB", "--available-ram", "9G"],
        r"--available-ram: expected at most the 8.0 GB of RAM, got 9.0 GB",
    ),
    (["simulate", "--blocks", "4", "--swapped", "5", "--ratio", "1"], r"0 to 4.*got 5"),
    (["simulate", "--blocks", "4", "--swapped", "x", "--ratio", "1"], r"got 'x'"),
    (["simulate", "--blocks", "4", "--swapped", "nan%", "--ratio", "1"], r"--swapped"),
    (["simulate", "--blocks", "4", "--swapped", "2", "--ratio", "1", "--skip", "4"], r"0 to 3.*got 4"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_VALUES)
def test_a_bad_value_gets_one_clear_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    if "WAN" in arguments:
        path = write_safetensors(tmp_path / "wan.safetensors", wan_tensors())
        arguments = [str(path) if word == "WAN" else word for word in arguments]
    assert main([*arguments, "--json"]) == 1
    printed = capsys.readouterr()
    error = json.loads(printed.out)["error"]
    assert len(printed.err.splitlines()) == 1
    assert re.search(message, error), error


@pytest.mark.parametrize(
    "arguments",
    [
        ["simulate", "--blocks", "0", "--swapped", "0", "--ratio", "1"],
        ["simulate", "--blocks", "4", "--swapped", "2", "--ratio", "nan"],
        ["simulate", "--blocks", "4", "--swapped", "2", "--ratio", "-1"],
        ["simulate", "--blocks", "4", "--swapped", "2", "--ratio", "inf"],
        ["simulate", "--blocks", "4", "--swapped", "2", "--ratio", "1", "--slots", "0"],
        ["demo", "--steps", "0"],
        ["demo", "--link", "0"],
        ["demo", "--seed", "99999999999999999999999"],
        ["demo", "--preset", "70b"],
        [],
    ],
)
def test_a_command_line_that_cannot_be_read_ends_with_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert main([*arguments, "--json"]) == 2
    assert "error" in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("picture", ["", "folder", "x.banana", "nowhere/x.png"])
def test_a_picture_that_cannot_be_drawn_is_refused_before_the_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    code, shown = run_json(capsys, "demo", "--picture", picture)
    assert code == 1
    assert shown["error"].startswith("--picture: expected")


def test_an_interrupt_ends_with_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(device: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wanvideo_enhanced_blockswap.commands.probe.measure_link", interrupted)
    code, shown = run_json(capsys, "probe", "--device", "cpu")
    assert (code, shown) == (130, {"error": "interrupted"})


def test_a_preset_that_the_host_cannot_hold_is_refused_with_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = HostMemory(8 << 30, 6 << 30, None, None, HostPlatform.LINUX)
    monkeypatch.setattr("wanvideo_enhanced_blockswap.commands.demo.read_host_memory", lambda: small)
    code, shown = run_json(capsys, "demo", "--preset", "14b")
    assert code == 1
    assert "14b" in shown["error"]
    assert "6.0 GB" in shown["error"]


def test_simulate_meets_the_bound_where_two_slots_suffice(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = run_json(capsys, "simulate", "--blocks", "40", "--swapped", "20", "--ratio", "1.5", "--slots", "2")
    assert code == 0
    assert shown["step_time"] == pytest.approx(shown["bound"] * shown["ratio_to_bound"])
    assert shown["ratio_to_bound"] <= 1.01


PLAN_KEYS = {
    "blocks_to_swap",
    "resident_bytes",
    "window_bytes",
    "pinned_bytes",
    "streams",
    "predicted_stall_ms",
    "over_ceiling",
    "reasons",
}


def test_plan_knows_no_stall_without_a_link_a_gpu_and_a_shape(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write_safetensors(tmp_path / "wan.safetensors", wan_tensors())
    common = ["plan", str(path), "--vram", "12GiB"]
    parts = (["--gpu", "RTX 4090 Laptop"], ["--link", "12"], ["--shape", "64x64x5"])  # whose lanes nobody publishes
    for missing in range(len(parts)):
        given = [word for i, part in enumerate(parts) if i != missing for word in part]
        assert run_json(capsys, *common, *given)[1]["predicted_stall_ms"] is None
    every = [word for part in parts for word in part]
    known = run_json(capsys, *common, *every, "--blocks-to-swap", "all")[1]
    assert known["predicted_stall_ms"] >= 0
    assert known["blocks_to_swap"] == known["blocks"]
    assert known.keys() >= PLAN_KEYS
    assert known["resident_bytes"] + known["window_bytes"] == known["device_bytes"]
    assert all(isinstance(reason, str) and len(reason.split()) > 2 for reason in known["reasons"])


@pytest.mark.parametrize("size", ["16GB", "16 gb", "16G", "16", "16GiB", "16.0 GB", "16384MB"])
def test_a_gb_is_that_of_the_box_however_it_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, size: str
) -> None:
    path = write_safetensors(tmp_path / "wan.safetensors", wan_tensors())
    assert run_json(capsys, "plan", str(path), "--vram", size)[1]["vram_bytes"] == 16 * GIB


def test_the_link_of_a_known_card_is_assumed_unless_it_is_given(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write_safetensors(tmp_path / "wan.safetensors", wan_tensors())
    named = ["plan", str(path), "--gpu", "4060", "--shape", "64x64x5", "--blocks-to-swap", "all"]
    shown = run_json(capsys, *named)[1]
    assert (shown["card"], shown["vram_bytes"]) == ("RTX 4060", 8 * GIB)
    assert shown["link_assumed"] == "assumed: PCIe 4.0 x8, 12.6 GB/s; --link changes it"
    assert shown["predicted_stall_ms"] is not None
    given = run_json(capsys, *named, "--link", "6.3")[1]
    assert given["link_assumed"] is None
    assert given["predicted_transfer_ms"] == pytest.approx(2 * shown["predicted_transfer_ms"], rel=1e-3)
    assert main(named) == 0
    assert "assumed: PCIe 4.0 x8, 12.6 GB/s; --link changes it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "vram", "why"),
    [
        ("DGX Spark", 128, "nothing is swapped on GB10: GPU and CPU share one memory"),
        ("Radeon 8060S", 96, "nothing is swapped on Radeon 8060S: GPU and CPU share one memory"),
        ("Apple M4 Max", 96, "nothing is swapped on Apple M4 Max: GPU and CPU share one memory"),
        ("Arc B580", 12, "nothing is swapped on Arc B580: Intel GPUs have not been tried"),
    ],
)
def test_on_some_gpus_nothing_is_swapped_and_the_plan_says_why(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, vram: int, why: str
) -> None:
    path = write_sparse_safetensors(tmp_path / "wan.safetensors", wan_shapes(1536, 8960, 30))
    code, shown = run_json(capsys, "plan", str(path), "--gpu", name, "--ram", "96GB")
    assert (code, shown["vram_bytes"], shown["blocks_to_swap"]) == (0, vram * GIB, 0)
    assert any(reason.startswith(why) for reason in shown["reasons"])


def test_a_model_that_does_not_fit_where_nothing_is_swapped_is_refused_with_both_reasons(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write_sparse_safetensors(tmp_path / "wan.safetensors", wan_shapes(5120, 13824, 40))
    code, shown = run_json(capsys, "plan", str(path), "--gpu", "B580", "--ram", "64GB")
    assert code == 1
    assert shown["error"].startswith("nothing is swapped on Arc B580: Intel GPUs have not been tried; ")
    assert "not enough VRAM: 26.2 GB needed for the model's blocks (all 40 blocks on the GPU)" in shown["error"]


def test_where_nothing_can_be_swapped_a_count_by_hand_changes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write_sparse_safetensors(tmp_path / "wan.safetensors", wan_shapes(1536, 8960, 30))
    by_hand = ["plan", str(path), "--ram", "96GB", "--blocks-to-swap", "all"]
    assert run_json(capsys, *by_hand, "--gpu", "B580")[1]["blocks_to_swap"] == 0
    assert run_json(capsys, *by_hand, "--gpu", "8060S")[1]["blocks_to_swap"] == 30


def test_the_memory_that_is_given_goes_before_that_of_the_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write_safetensors(tmp_path / "wan.safetensors", wan_tensors())
    for name in ("RTX 3080", "RTX 3080 12GB", "RTX 3080 20GB"):
        shown = run_json(capsys, "plan", str(path), "--gpu", name, "--vram", "20", "--shape", "64x64x5")[1]
        assert (shown["card"], shown["vram_bytes"]) == (name, 20 * GIB)
        assert shown["predicted_stall_ms"] is not None


def test_half_of_a_vace_model_is_half_of_both_kinds_of_blocks(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write_safetensors(tmp_path / "vace.safetensors", wan_tensors(wan_shapes(blocks=6, vace=4)))
    shown = run_json(capsys, "plan", str(path), "--vram", "12GiB", "--blocks-to-swap", "half")[1]
    assert shown["blocks_to_swap"] == 5
    assert len([i for i in shown["swapped"] if i < 4]) == 2


def test_a_model_beside_it_takes_its_part_of_the_host(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = write_sparse_gguf(tmp_path / "high.gguf", wan_shapes(1536, 8960, 30), "Q8_0")
    one = ["plan", str(path), "--vram", "12GiB", "--ram", "2GiB"]
    assert run_json(capsys, *one)[0] == 0
    code, shown = run_json(capsys, *one, "--beside", str(path))
    assert code == 1
    assert (
        "not enough RAM: 1.4 GB needed for weights that the loader copies into memory, 632.8 MB available"
        in shown["error"]
    )


def test_a_model_beside_it_that_stays_in_its_file_takes_only_what_its_plan_adds(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write_sparse_safetensors(tmp_path / "high.safetensors", wan_shapes(5120, 13824, 40))
    alone = run_json(capsys, "plan", str(path), "--vram", "12GiB", "--ram", "31GiB")[1]
    both = run_json(capsys, "plan", str(path), "--vram", "12GiB", "--ram", "31GiB", "--beside", str(path))[1]
    assert both["beside_host_bytes"] == alone["added_bytes"] < alone["block_bytes"]
    assert both["file_bytes"] > alone["file_bytes"]
    assert alone["added_bytes"] + both["added_bytes"] <= 31 * GIB


def test_the_bytes_of_a_plan_are_page_locked_in_other_memory_or_read_from_the_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shapes = wan_shapes(5120, 13824, 40)
    stored = write_sparse_safetensors(tmp_path / "wan.safetensors", shapes)
    copied = write_sparse_gguf(tmp_path / "wan.gguf", shapes, "Q8_0")
    machine = ["--vram", "12GiB", "--ram", "31GiB", "--available-ram", "20GiB"]
    shown = run_json(capsys, "plan", str(stored), *machine)[1]
    assert (shown["host_tiers"], shown["anonymous_bytes"]) == (["file", "pinned"], 0)
    assert shown["pinned_bytes"] == shown["added_bytes"] == shown["host_bytes"] <= 0.9 * 20 * GIB
    assert shown["file_bytes"] + shown["slab_bytes"] == pytest.approx(shown["streamed_bytes_per_forward"], rel=1e-4)
    shown = run_json(capsys, "plan", str(copied), *machine)[1]
    assert (shown["host_tiers"], shown["file_bytes"], shown["added_bytes"]) == (["pinned"], 0, 0)
    assert shown["host_bytes"] == shown["block_bytes"] == shown["pinned_bytes"] + shown["anonymous_bytes"]


def test_the_disk_of_a_named_machine_is_assumed_where_blocks_are_read_from_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write_sparse_safetensors(tmp_path / "wan.safetensors", wan_shapes(5120, 13824, 40))
    known = ["plan", str(path), "--gpu", "RTX 3060 12GB", "--link", "25", "--shape", "832x480x81"]
    for ram, options, is_assumed in (("64GB", (), False), ("16GB", (), True), ("16GB", ("--disk", "3.5"), False)):
        assert run_json(capsys, *known, "--ram", ram, *options)[1]["predicted_stall_ms"] is not None
        assert main([*known, "--ram", ram, *options]) == 0
        assert ("assumed: NVMe, 3.5 GB/s; --disk changes it" in capsys.readouterr().out) == is_assumed


@pytest.mark.parametrize(
    ("machine", "answer"),
    [
        (
            ("--vram", "12GB", "--ram", "64GB"),
            r"The weights fit: \d+ blocks on the GPU, \d+ streaming\. VRAM [\d.]+ GB without the computation, "
            r"RAM [\d.]+ GB\.",
        ),
        (
            ("--gpu", "RTX 3060 12GB", "--ram", "64GB", "--shape", "832x480x81"),
            r"It fits: \d+ blocks on the GPU, \d+ streaming\. VRAM [\d.]+ GB, RAM [\d.]+ GB\. A pass of the model "
            r"takes 85\.3 s, bound by the GPU's computation; a step with CFG takes two\.",
        ),
        (
            ("--gpu", "RTX 4090", "--ram", "16GB", "--disk", "0.2", "--shape", "480x480x17"),
            r"It fits: .* bound by the disk; .*",
        ),
        (
            ("--vram", "8GB", "--ram", "64GB", "--shape", "1280x720x161"),
            r"It does not fit: [\d.]+ GB of VRAM are missing; take fewer frames, or a smaller size\.",
        ),
    ],
)
def test_the_first_line_answers_whether_it_fits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, machine: tuple[str, ...], answer: str
) -> None:
    path = write_sparse_safetensors(tmp_path / "wan.safetensors", wan_shapes(5120, 13824, 40))
    main(["plan", str(path), *machine])
    assert re.fullmatch(answer, capsys.readouterr().out.splitlines()[0])


def test_a_video_that_does_not_fit_is_the_first_reason_and_fails(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write_sparse_safetensors(tmp_path / "wan.safetensors", wan_shapes(5120, 13824, 40))
    common = ["plan", str(path), "--vram", "12GiB", "--ram", "64GiB"]
    assert run_json(capsys, *common)[1]["fits"] is None
    code, shown = run_json(capsys, *common, "--shape", "832x480x81")
    assert (code, shown["fits"]) == (0, True)
    code, shown = run_json(capsys, *common, "--shape", "1280x720x161")
    assert (code, shown["fits"], shown["over_ceiling"]) == (1, False, True)
    assert shown["reasons"][0].startswith("it will probably run out of VRAM: 12.8 GB for the computation")


def test_a_gpu_that_is_not_known_is_planned_for_by_its_memory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = str(write_safetensors(tmp_path / "wan.safetensors", wan_tensors()))
    code, shown = run_json(capsys, "plan", path, "--gpu", "RTX 4065", "--vram", "16GiB", "--shape", "64x64x5")
    assert (code, shown["card"], shown["predicted_stall_ms"]) == (0, "RTX 4065", None)
    code, shown = run_json(capsys, "plan", path, "--gpu", "RTX 4065")
    assert code == 1
    assert "no card is known by the name 'RTX 4065'; the nearest are RTX 4060" in shown["error"]
    assert "give its memory, such as --vram 16GB" in shown["error"]


def test_a_model_beside_it_takes_its_part_of_what_may_be_page_locked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_sparse_safetensors(tmp_path / "high.safetensors", wan_shapes(5120, 13824, 40))
    host = HostMemory(90 * GIB, 90 * GIB, None, None, HostPlatform.WINDOWS)
    monkeypatch.setattr("wanvideo_enhanced_blockswap.commands.plan.read_host_memory", lambda: host)
    one = ["plan", str(path), "--vram", "12GiB", "--ram", "90GiB"]
    alone = run_json(capsys, *one)[1]
    both = run_json(capsys, *one, "--beside", str(path))[1]
    assert both["beside_bytes"] == alone["block_bytes"] + alone["other_bytes"]
    assert alone["pinned_bytes"] + both["pinned_bytes"] <= 0.4 * 90 * GIB
    assert both["host_tiers"] == ["file", "pinned"]


WITHOUT_THE_EXTRA = """
import json, sys

sys.modules.update(dict.fromkeys(("diffusers", "matplotlib", "platformdirs", "tqdm")))
from wanvideo_enhanced_blockswap.cli import main

print(json.dumps([main(command) for command in json.loads(sys.argv[1])]))
"""


def test_only_the_demo_needs_the_demo_extra(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "wan.safetensors", wan_tensors())
    commands = [
        ["plan", str(path), "--vram", "12GiB"],
        ["probe", "--device", "cpu"],
        ["simulate", "--blocks", "4", "--swapped", "2", "--ratio", "1"],
        ["demo", "--device", "cpu", "--picture", str(tmp_path / "t.png")],
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_EXTRA, json.dumps(commands)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
        timeout=120,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 0, 0, 1]
    assert done.stderr.splitlines()[-1].endswith('run pip install -e ".[demo]" in the checkout')


def test_probe_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = run_json(capsys, "probe", "--device", "cpu")
    assert code == 0
    assert shown["device"]["torch_device"] == "cpu"
    assert shown["host_memory"]["physical_bytes"] > 0
