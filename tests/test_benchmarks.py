"""The benchmarks run; figures that are the same on every machine are checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import predictions, soak


@pytest.mark.usefixtures("short_texts")
def test_predictions_come_true_on_the_simulated_device(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    options = ["--device", "cpu", "--shapes", "32x32x5,64x64x5", "--counts", "half,all", "--steps", "3"]
    assert predictions.main([*options, "--json", "--markdown", str(table)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["shape"], row["blocks_swapped"]) for row in rows] == [
        ("32x32x5", 6),
        ("32x32x5", 12),
        ("64x64x5", 6),
        ("64x64x5", 12),
    ]
    assert any(row["measured_stall_ms"] > 0 for row in rows)
    for row in rows:
        assert row["measured_weight_bytes"] == row["predicted_weight_bytes"]
        assert row["measured_step_ms"] == pytest.approx(row["predicted_step_ms"], rel=0.01)
    assert table.read_text().count("| 64x64x5 |") == 2


@pytest.mark.usefixtures("short_texts")
def test_a_prediction_that_does_not_come_true_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = predictions.make_plan

    def optimistic(*arguments):
        plan = real(*arguments)
        object.__setattr__(plan, "device_bytes", plan.device_bytes * 9 // 10)
        return plan

    monkeypatch.setattr(predictions, "make_plan", optimistic)
    assert predictions.main(["--device", "cpu", "--shapes", "32x32x5", "--counts", "half", "--steps", "2"]) == 1
    assert "limit 1%" in capsys.readouterr().out


@pytest.mark.usefixtures("short_texts")
def test_predictions_of_a_part_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--shapes", "32x32x5", "--blocks", "4", "--steps", "2", "--json"]
    assert predictions.main([*options, "--counts", "half,all"]) == 0
    assert [row["blocks_swapped"] for row in json.loads(capsys.readouterr().out)["rows"]] == [2, 4]
    with pytest.raises(SystemExit):
        predictions.main([*options, "--counts", "5"])
    assert "from 0 to 4" in capsys.readouterr().err


@pytest.mark.usefixtures("short_texts")
def test_a_soak_of_random_runs_leaves_nothing_and_gets_nothing_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    soak.main(["--runs", "12", "--seed", "3", "--json"])  # too short to judge host memory by
    found = json.loads(capsys.readouterr().out)
    assert (found["runs"], found["wrong_outputs"], found["device_bytes_left"]) == (12, 0, 0)
    assert sum(found["outcomes"].values()) == 12
    assert found["files"][0] == found["files"][1]
    assert found["threads"][0] == found["threads"][1]
