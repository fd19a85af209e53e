"""A measurement is kept for one device, driver and torch; a damaged file costs one warning and a new measurement."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
from wanvideo_enhanced_blockswap.hardware import MIB, DeviceSpec, LinkSpeed, Vendor, link, measure_link
from wanvideo_enhanced_blockswap.hardware.link import MeasurementKey, cache_name, keep_measurement, read_measurement

KEY = MeasurementKey("RTX 4090", "GPU-1", "0000:01:00.0", "580.1", "2.13.0", (1, 2, 4), 64 * MIB)
SPEED = LinkSpeed(((1, 20e9), (2, 24e9), (4, 24.5e9)), 9e9, 12e9)
CARD = DeviceSpec("RTX 4090", Vendor.NVIDIA, "cpu", "GPU-1", "0000:01:00.0", 128, False, "580.1", None, None)
"""A card whose copies stay inside the host's memory."""


@pytest.fixture
def kept(tmp_path):
    """The file of a measurement."""
    path = tmp_path / cache_name(KEY)
    keep_measurement(path, KEY, SPEED)
    return path


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """How often the link of a card has been measured after it was asked for once more."""
    times = []
    monkeypatch.setattr(link, "_measure", lambda *_: times.append(1) or SPEED)

    def measure(card):
        monkeypatch.setattr(link, "probe_device", lambda _device: card)
        assert measure_link(torch.device("cpu"), cache_dir=tmp_path, stream_counts=(1, 2, 4)) == SPEED
        return len(times)

    return measure


def damage(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(path, caplog):
    """Whether the file is not used, with one warning."""
    assert read_measurement(path, KEY) is None
    (message,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return "measuring again" in message


def test_a_measurement_comes_back_as_it_was_kept(kept, caplog):
    assert read_measurement(kept, KEY) == SPEED
    assert not caplog.records


def test_the_same_card_is_measured_once(measured):
    assert [measured(CARD), measured(CARD)] == [1, 1]


@pytest.mark.parametrize("change", [{"driver": "581.57"}, {"driver": None}])
def test_another_driver_measures_again_and_takes_the_place_of_the_one_before(measured, tmp_path, change):
    other = replace(CARD, **change)
    assert [measured(CARD), measured(other), measured(other), measured(CARD)] == [1, 2, 2, 3]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [{"uuid": "GPU-2"}, {"uuid": None}, {"pci_bus_id": "0000:21:00.0"}, {"pci_bus_id": None}, {"name": "RTX 3090"}],
)
def test_each_card_has_a_measurement_of_its_own_and_both_are_kept(measured, tmp_path, change):
    other = replace(CARD, **change)
    assert [measured(CARD), measured(other), measured(CARD), measured(other)] == [1, 2, 2, 2]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("field", ["name", "uuid", "pci_bus_id", "driver", "torch_version"])
def test_a_record_whose_key_differs_in_anything_is_measured_again(kept, field):
    assert read_measurement(kept, replace(KEY, **{field: "another"})) is None


@pytest.mark.parametrize(
    "speed",
    [float("nan"), float("inf"), -1.0, 0, 999.9, 1.1e13, 10**400, None, "9e9", []],
    ids=lambda speed: repr(speed)[:9],
)
@pytest.mark.parametrize("place", ["pageable", "host_copy", "pinned"])
def test_a_speed_that_cannot_have_been_measured_is_measured_again(kept, caplog, place, speed):
    if place == "host_copy" and speed is None:
        pytest.skip("not every measurement has this figure")
    damage(kept, **{place: [[1, 20e9], [2, speed], [4, 24e9]] if place == "pinned" else speed})
    assert refused(kept, caplog)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"3", b"{}", b"\xff\xfe\x00"], ids=repr)
def test_what_is_no_record_is_measured_again(kept, caplog, text):
    kept.write_bytes(text)
    assert refused(kept, caplog)


def test_a_folder_in_its_place_is_measured_again(kept, caplog):
    kept.unlink()
    kept.mkdir()
    assert refused(kept, caplog)


@pytest.mark.parametrize("key", [None, [], {}, "x", {"name": "RTX 4090"}])
def test_a_record_of_another_measurement_is_passed_over_without_a_word(kept, caplog, key):
    damage(kept, key=key)
    assert read_measurement(kept, KEY) is None
    assert not caplog.records


def test_a_damaged_file_is_measured_anew_and_replaced(tmp_path, caplog):
    measure_link(torch.device("cpu"), nbytes=MIB, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    damage(path, pageable=1e300)
    speed = measure_link(torch.device("cpu"), nbytes=MIB, cache_dir=tmp_path)
    assert speed.pageable < 1e13
    assert len(caplog.records) == 1
    assert json.loads(path.read_text())["pageable"] == speed.pageable


@pytest.mark.parametrize("name", ["../../etc/passwd", "/dev/zero", "a\x00b\n\x1b[2J", "CON", "x" * 5000, "名", ""])
def test_the_files_name_is_safe_whatever_the_driver_calls_the_device(tmp_path, name):
    key = MeasurementKey(name, name, name, name, name, (1,), 1)
    file = cache_name(key)
    assert (tmp_path / file).parent == tmp_path
    assert file.startswith("link-")
    assert set(file) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.")
    assert len(file) == len("link-0123456789abcdef.json")
    keep_measurement(tmp_path / file, key, LinkSpeed((), 9e9))
    assert read_measurement(tmp_path / file, key) == LinkSpeed((), 9e9)


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path, caplog):
    (tmp_path / "file").touch()
    keep_measurement(tmp_path / "file" / "link.json", KEY, SPEED)
    (record,) = caplog.records
    assert "cannot be written" in record.getMessage()
