"""The adopt benchmark: what it moves and locks, on any machine; speed is not tested."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import adopt

SMALL = ["--model", "small", "--blocks", "4", "--device", "cpu", "--repeats", "1"]


@pytest.mark.parametrize("cold", [[], ["--cold"]])
def test_all_blocks_are_adopted_from_their_files(capsys: pytest.CaptureFixture[str], cold: list[str]) -> None:
    assert adopt.main([*SMALL, *cold, "--lock", "none", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["swapped_bytes"] == 4 * (2 << 20)
    assert found["pinned_bytes"] == 0
    assert found["gbytes_per_s"] > 0
    assert found["copy_gbytes_per_s"] > 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no mlock")
def test_pages_are_locked_at_their_exact_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert adopt.main([*SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    if found["refusals"]:  # a limit of this machine
        assert "could not be page-locked" in found["refusals"][0]
    else:
        assert found["pinned_over_swapped"] <= 1.01
        assert found["pinned_bytes"] == found["swapped_bytes"]


def test_what_cannot_be_meant_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for options, said in (
        (["--blocks", "2"], "--blocks 3 or more"),
        (["--lock", "driver"], "needs a CUDA or HIP device"),
        (["--scratch", "/no/such"], "--scratch: expected an existing folder, got '/no/such'"),
    ):
        with pytest.raises(SystemExit) as ended:
            adopt.main([*SMALL, *options])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


def test_the_text_tells_speed_and_locks(capsys: pytest.CaptureFixture[str]) -> None:
    assert adopt.main([*SMALL, "--lock", "none"]) == 0
    printed = capsys.readouterr().out
    assert "4 blocks, 8.0 MiB, warm files" in printed
    assert "GB/s; a copy in memory" in printed
    assert "NOT MET" in printed or "met: " in printed
    assert "- met: 0.000 page-locked over swapped bytes" in printed
