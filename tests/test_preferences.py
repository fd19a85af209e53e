"""The user's settings in ComfyUI's dialog, as Python reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from wanvideo_enhanced_blockswap.blockswap.errors import SettingsError
from wanvideo_enhanced_blockswap.comfyui import KEEP_HOST_SLABS, PIN_BUDGET_GIB, Preferences
from wanvideo_enhanced_blockswap.hardware import GIB


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "comfy.settings.json"


def test_without_a_file_everything_is_at_its_default(file: Path) -> None:
    assert Preferences.read(file) == Preferences(keep_host_slabs=True, pin_budget_bytes=None)


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        ({}, Preferences()),
        ({"Comfy.Locale": "zh"}, Preferences()),
        ({KEEP_HOST_SLABS: False}, Preferences(keep_host_slabs=False)),
        ({PIN_BUDGET_GIB: 0}, Preferences()),
        ({PIN_BUDGET_GIB: 16}, Preferences(pin_budget_bytes=16 * GIB)),
        ({PIN_BUDGET_GIB: 0.5}, Preferences(pin_budget_bytes=GIB // 2)),
    ],
)
def test_what_the_dialog_wrote_is_read(file: Path, stored: dict[str, object], read: Preferences) -> None:
    file.write_text(json.dumps(stored), encoding="utf-8")
    assert Preferences.read(file) == read


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "comfy.settings.json cannot be read as JSON"),
        ("[" * 100_000, "comfy.settings.json cannot be read as JSON"),
        ("[]", "comfy.settings.json: expected a JSON object, got list"),
        (json.dumps({KEEP_HOST_SLABS: 1}), f"{KEEP_HOST_SLABS}: expected true or false, got 1"),
        (json.dumps({PIN_BUDGET_GIB: "16"}), f"{PIN_BUDGET_GIB}: expected 0 to 1024 GB, got '16'"),
        (json.dumps({PIN_BUDGET_GIB: -1}), f"{PIN_BUDGET_GIB}: expected 0 to 1024 GB, got -1"),
        (json.dumps({PIN_BUDGET_GIB: True}), f"{PIN_BUDGET_GIB}: expected 0 to 1024 GB, got True"),
        (json.dumps({PIN_BUDGET_GIB: float("nan")}), f"{PIN_BUDGET_GIB}: expected 0 to 1024 GB, got nan"),
    ],
)
def test_what_it_cannot_have_written_is_said(file: Path, text: str, said: str) -> None:
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError, match=said.replace("(", r"\(")):
        Preferences.read(file)


def test_a_file_that_is_no_text_is_said(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="cannot be read"):
        Preferences.read(file)
