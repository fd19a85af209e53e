"""The adopt benchmark: what it moves and locks, on any machine; speed is not tested."""

from __future__ import annotations

import json
import os
import sys

import pytest

from benchmarks import adopt

SMALL = ["--model", "small", "--blocks", "4", "--device", "cpu", "--repeats", "1"]
WAYS = ("warm", "cold") if hasattr(os, "posix_fadvise") else ("warm",)


def figures_of(capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    assert adopt.main([*SMALL, *options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_all_blocks_are_adopted_and_read_from_their_files(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures_of(capsys, "--lock", "none")
    for way in WAYS:
        assert found[way]["swapped_bytes"] == 4 * (2 << 20)
        assert found[way]["pinned_bytes"] == 0
        assert 0 < found[way]["first_copy_s"] < found[way]["placed_s"]
        assert all(speed > 0 for name, speed in found[way].items() if name.endswith("gbytes_per_s"))
    assert found["copy_gbytes_per_s"] > 0
    assert found["fresh_copy_gbytes_per_s"] > 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no mlock")
def test_pages_are_locked_at_their_exact_size(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures_of(capsys)
    warm = found["warm"]
    if warm["refusals"]:  # a limit of this machine
        assert "could not be locked" in warm["refusals"][0]
    else:
        assert found["pinned_over_swapped"] <= 1.01
        assert warm["pinned_bytes"] == warm["swapped_bytes"]


def test_the_file_tier_is_what_its_figure_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    tiers: list[set[str]] = []
    forward = adopt._forward

    def noted(session: adopt.SwapSession, blocks: int) -> float:
        seconds = forward(session, blocks)
        tiers.append({tier.value for tier in session.tiers.values()})
        return seconds

    monkeypatch.setattr(adopt, "_forward", noted)
    assert adopt.main([*SMALL, "--lock", "none", "--json"]) == 0
    assert tiers == [{"pageable"}, *[{"file"}] * (1 + adopt.FORWARDS)] * len(WAYS)


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
    assert "4 blocks, 8.0 MB" in printed
    assert f"| | {' | '.join(WAYS)} |" in printed
    assert "| first_copy_s | " in printed
    assert "a copy in memory" in printed
    assert "met: 0.000 page-locked over swapped bytes" in printed
