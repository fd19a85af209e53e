"""docs/faults.md names tests that exist, for each of the nineteen troubles."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")


def test_every_trouble_has_a_row_and_every_row_names_tests_that_exist() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    existing = set(re.findall(r"^def (test_\w+)", "\n".join(sources), re.MULTILINE))
    existing |= {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    rows = re.findall(r"^\| (S\d+) \|.*\| ([^|]+) \|$", PAGE, re.MULTILINE)
    assert [name for name, _ in rows] == [f"S{number}" for number in range(1, 20)]
    for name, shown in rows:
        tests = re.findall(r"`(test_\w+)`", shown)
        assert tests, name
        assert set(tests) <= existing, name
