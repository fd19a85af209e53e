"""The measured link: for real on the CPU, and with a recording stand-in for torch.cuda."""

from __future__ import annotations

import contextlib
import json
import logging
import time

import pytest
import torch
from wanvideo_enhanced_blockswap.hardware import MIB, HardwareUnavailableError, LinkSpeed, link, measure_link

CPU = torch.device("cpu")
NBYTES = MIB


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


class FakeCuda:
    """torch.cuda as far as the measurement uses it: copies take the time of a table and calls are recorded."""

    def __init__(self, *, register=0, milliseconds=None, copy_error=None):
        self.calls = []
        self.streams = 0
        self._register = register
        self._milliseconds = milliseconds or {}
        self._copy_error = copy_error

    def cudart(self):
        return self

    def cudaHostRegister(self, pointer, size, flags):  # noqa: N802 - the runtime's name
        self.calls.append(("register", pointer, size, flags))
        return self._register

    def cudaHostUnregister(self, pointer):  # noqa: N802 - the runtime's name
        self.calls.append(("unregister", pointer))
        return 0

    def synchronize(self, _device=None):
        self.calls.append(("synchronize",))

    def device(self, _device):
        return contextlib.nullcontext()

    def stream(self, _stream):
        if self._copy_error is not None:
            raise self._copy_error
        return contextlib.nullcontext()

    def current_stream(self):
        self.streams = 0
        return self.Stream(main=True)

    def Stream(self, *, main=False):  # noqa: N802 - torch's name
        self.streams += 0 if main else 1
        return self

    def wait_event(self, _event):
        pass

    def wait_stream(self, _stream):
        pass

    def Event(self, *, enable_timing):  # noqa: N802 - torch's name
        assert enable_timing
        return FakeEvent(self)

    def copy_milliseconds(self):
        return self._milliseconds[self.streams]


class FakeEvent:
    def __init__(self, cuda):
        self._cuda = cuda

    def record(self, _stream):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, _end):
        return self._cuda.copy_milliseconds()


@pytest.fixture
def measure_pinned(monkeypatch):
    """The pinned part of a measurement, on a stand-in for torch.cuda."""

    def measure(cuda, counts=(1, 2)):
        monkeypatch.setattr(torch, "cuda", cuda)
        return link._measure_pinned(torch.empty(NBYTES, dtype=torch.uint8), counts)

    return measure


@pytest.fixture
def cached(tmp_path):
    """A first measurement of the CPU with a conspicuous figure, and its cache file."""
    measure_link(CPU, nbytes=NBYTES, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"pageable": 12345.0}))
    return path


def test_the_cpu_has_a_pageable_figure_and_no_pinned_one():
    speed = measure_link(CPU, nbytes=NBYTES)
    assert speed.pinned == ()
    assert speed.pageable > 0


def test_a_pageable_copy_that_is_slow_however_small_is_made_only_twice(monkeypatch):
    readings = iter([0.0, 0.9, 1.0, 1.9])
    monkeypatch.setattr(time, "perf_counter", lambda: next(readings))
    second = int(NBYTES / 0.9 * 0.010)  # what the first lets 10 ms expect
    assert measure_link(CPU, nbytes=NBYTES).pageable == pytest.approx(second / 0.9)


def test_a_measurement_works_inside_inference_mode():
    with torch.inference_mode():
        assert measure_link(CPU, nbytes=NBYTES).pageable > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU answers")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(HardwareUnavailableError, match="cuda:0"):
        measure_link(torch.device("cuda:0"))


@pytest.mark.parametrize(("counts", "nbytes"), [((), NBYTES), ((0, 1), NBYTES), ((1, 8), 7), ((1,), 0)])
def test_counts_that_cannot_share_a_copy_are_refused(counts, nbytes):
    with pytest.raises(ValueError, match="stream_counts: expected numbers from 1"):
        measure_link(CPU, stream_counts=counts, nbytes=nbytes)


def test_a_device_without_room_leaves_every_figure_out_with_one_warning(monkeypatch, tmp_path, caplog):
    def fail(*_args, **_kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch, "empty", fail)
    assert measure_link(CPU, nbytes=NBYTES, cache_dir=tmp_path) == LinkSpeed((), None)
    assert len(warnings_in(caplog)) == 1
    assert not list(tmp_path.iterdir())


def test_each_stream_count_has_its_own_pinned_figure(measure_pinned):
    figures, host_copy = measure_pinned(FakeCuda(milliseconds={1: 4.0, 2: 2.0}))
    assert host_copy > 0
    assert figures == ((1, pytest.approx(NBYTES / 4e-3)), (2, pytest.approx(NBYTES / 2e-3)))


def test_the_pages_are_locked_at_their_exact_size_and_unlocked_after_the_last_copy(measure_pinned):
    cuda = FakeCuda(milliseconds={1: 4.0, 2: 2.0})
    measure_pinned(cuda)
    (register, pointer, size, _flags), *rest = cuda.calls
    assert (register, size) == ("register", NBYTES)
    assert rest == [("synchronize",), ("unregister", pointer)]


def test_a_copy_that_raises_leaves_no_page_locked(measure_pinned):
    cuda = FakeCuda(copy_error=RuntimeError("unspecified launch failure"))
    with pytest.raises(RuntimeError, match="launch failure"):
        measure_pinned(cuda)
    assert cuda.calls[-1][0] == "unregister"


def test_a_driver_that_refuses_to_page_lock_leaves_no_pinned_figure_and_one_warning(measure_pinned, caplog):
    assert measure_pinned(FakeCuda(register=1)) == ((), None)
    assert len(warnings_in(caplog)) == 1
    assert "code 1, the driver cannot lock this memory" in warnings_in(caplog)[0]


def test_after_a_refusal_the_pending_error_is_taken_out_and_nothing_is_unlocked(measure_pinned):
    cuda = FakeCuda(register=2)
    measure_pinned(cuda)
    assert [call[0] for call in cuda.calls] == ["register", "synchronize"]


def test_copies_that_are_slow_however_small_are_made_only_twice(measure_pinned, monkeypatch):
    cuda = FakeCuda(milliseconds={1: 900.0})
    copies = []
    monkeypatch.setattr(cuda, "copy_milliseconds", lambda: copies.append(1) or 900.0)
    measure_pinned(cuda, (1,))
    assert len(copies) == 2


class SimulatedLink:
    """Copies in virtual time: to the device at the speed of a link, inside the host's memory at the host's."""

    def __init__(self, monkeypatch, target, speed, *, host_speed=11e9):
        self.now = 0.0
        self.sizes = []
        self.host_seconds = 0.0
        device = target.untyped_storage().data_ptr()

        def copy(to, of, *, non_blocking=False):
            is_device = to.untyped_storage().data_ptr() == device
            seconds = of.nbytes / (speed if is_device else host_speed)
            self.now += seconds
            if is_device:
                self.sizes.append(of.nbytes)
            else:
                self.host_seconds += seconds

        monkeypatch.setattr(torch.Tensor, "copy_", copy)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(FakeEvent, "record", lambda event, _stream: setattr(event, "at", self.now))
        monkeypatch.setattr(FakeEvent, "elapsed_time", lambda event, end: (end.at - event.at) * 1e3)


@pytest.fixture
def simulate(monkeypatch):
    """A whole measurement as it is made of a GPU, over a simulated link of a given speed; the link, and what came."""

    def measure(speed, **changes):
        target = torch.empty(link._NBYTES, dtype=torch.uint8)
        simulated = SimulatedLink(monkeypatch, target, speed, **changes)
        pageable = link._measure_copy(link._host_buffer(target.nbytes), target)
        monkeypatch.setattr(torch, "cuda", FakeCuda())
        pinned, host_copy = link._measure_pinned(target, link._STREAM_COUNTS)
        return simulated, LinkSpeed(pinned, pageable, host_copy)

    return measure


@pytest.mark.parametrize("gigabytes", [0.5, 0.7, 1, 2, 3.2, 5, 6.7, 7, 13, 25, 55, 375])
def test_over_no_link_of_half_a_gigabyte_per_second_or_more_does_a_measurement_copy_for_long(simulate, gigabytes):
    simulated, found = simulate(gigabytes * 1e9)
    assert simulated.now <= 0.6
    # All figures are taken, so that it can be kept, and they are those of the link.
    assert [count for count, _ in found.pinned] == list(link._STREAM_COUNTS)
    speeds = [found.pageable, *(speed for _, speed in found.pinned)]
    assert speeds == [pytest.approx(gigabytes * 1e9)] * len(speeds)
    assert found.host_copy == pytest.approx(11e9)


def test_a_slow_host_adds_little_to_the_measurement_of_a_slow_link(simulate):
    simulated, found = simulate(0.5e9, host_speed=2e9)
    assert simulated.now <= 0.7
    assert found.host_copy == pytest.approx(2e9)


@pytest.mark.parametrize("gigabytes", [7, 25])
def test_over_a_link_of_usual_speed_every_copy_is_whole_and_each_figure_is_of_three_and_one_before(simulate, gigabytes):
    simulated, _ = simulate(gigabytes * 1e9)
    copies = 4 * (1 + len(link._STREAM_COUNTS))
    assert sum(simulated.sizes) == copies * link._NBYTES


def test_over_a_slow_link_only_the_first_copy_from_each_kind_of_memory_is_whole(simulate):
    simulated, _ = simulate(1e9)
    whole = [index for index, size in enumerate(simulated.sizes) if size == link._NBYTES]
    assert whole == [0, 4]
    cut = sum(simulated.sizes) - 2 * link._NBYTES
    assert cut == pytest.approx(26 * 0.010 * 1e9)


@pytest.mark.parametrize(
    ("slow", "cut", "expected"),
    [({0}, {1}, 25e9), ({0, 1, 2}, {1, 2, 3}, 2e9), ({2}, set(), 25e9), (set(), set(), 25e9)],
)
def test_copies_that_are_held_up_cut_no_copy_after_a_fast_one(slow, cut, expected):
    pace, sizes = link._Pace(64 * MIB), []

    def copy(nbytes):
        sizes.append(nbytes)
        return nbytes / (2e9 if len(sizes) - 1 in slow else 25e9)

    assert pace.typical_speed(copy) == pytest.approx(expected)
    assert pace.typical_speed(copy) == pytest.approx(25e9)
    assert [index for index, size in enumerate(sizes) if size != 64 * MIB] == sorted(cut)


def test_a_copy_is_never_cut_below_a_byte_for_each_stream():
    pace = link._Pace(64 * MIB, least_bytes=16)
    pace.typical_speed(lambda nbytes: nbytes / 100.0)  # bytes per second
    assert pace.nbytes == 16


def test_over_a_link_that_hardly_moves_each_stream_still_has_a_byte_to_copy(measure_pinned):
    figures, _ = measure_pinned(FakeCuda(milliseconds={1: 1e9, 2: 1e9}))
    assert figures == ((1, pytest.approx(2 / 1e6)), (2, pytest.approx(2 / 1e6)))


def test_a_kept_measurement_is_taken_again_where_that_is_asked_and_replaced(cached):
    speed = measure_link(CPU, nbytes=NBYTES, cache_dir=cached.parent, again=True)
    assert speed.pageable != 12345.0
    assert measure_link(CPU, nbytes=NBYTES, cache_dir=cached.parent) == speed


@pytest.mark.parametrize(
    ("streams", "seen", "contradicted"),
    [
        pytest.param(1, 10.1e9, False, id="near the figure of one stream"),
        pytest.param(1, 7.9e9, True, id="more than a fifth slower"),
        pytest.param(1, 8.1e9, False, id="less than a fifth slower"),
        pytest.param(4, 10e9, True, id="the figure of one stream where four are used"),
        pytest.param(4, 24.1e9, True, id="more than a fifth faster"),
        pytest.param(16, 20e9, False, id="more streams than were measured"),
    ],
)
def test_a_run_contradicts_the_measurement_by_more_than_a_fifth_of_what_its_streams_reach(streams, seen, contradicted):
    measured = LinkSpeed(((1, 10e9), (4, 20e9)), None)
    assert link.contradicts(measured, streams=streams, seen_bytes_per_second=seen) is contradicted


def test_a_link_without_a_pinned_figure_cannot_be_contradicted():
    assert not link.contradicts(LinkSpeed((), 1e9), streams=1, seen_bytes_per_second=1.0)


def test_a_kept_measurement_is_not_taken_again(cached):
    assert measure_link(CPU, nbytes=NBYTES, cache_dir=cached.parent) == LinkSpeed((), 12345.0)


@pytest.mark.parametrize("changes", [{"nbytes": 2 * NBYTES}, {"stream_counts": (1,)}])
def test_a_measurement_of_another_kind_is_taken_again(cached, changes):
    speed = measure_link(CPU, **({"nbytes": NBYTES, "cache_dir": cached.parent} | changes))
    assert speed.pageable != 12345.0


def test_another_torch_measures_again(cached, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "0.0.1")
    assert measure_link(CPU, nbytes=NBYTES, cache_dir=cached.parent).pageable != 12345.0


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "{}", "null", '{"format": 2}', "\x00\xff"),
        '{"format": 2, "key": KEY, "pinned": 3, "pageable": 1, "host_copy": null}',
        '{"format": 2, "key": KEY, "pinned": [], "pageable": 1, "host_copy": "fast"}',
        *(
            f'{{"format": 2, "key": KEY, "pinned": [], "pageable": {value}, "host_copy": null}}'
            for value in ("NaN", "-1", "null", '"fast"')
        ),
    ],
)
def test_a_corrupt_file_is_ignored_with_one_warning_and_rewritten(cached, caplog, text):
    key = json.dumps(json.loads(cached.read_text())["key"])
    cached.write_bytes(text.replace("KEY", key).encode("latin-1"))
    speed = measure_link(CPU, nbytes=NBYTES, cache_dir=cached.parent)
    assert len(warnings_in(caplog)) == 1
    assert json.loads(cached.read_text())["pageable"] == speed.pageable


def test_writing_leaves_no_draft_behind(cached):
    assert [path.name for path in cached.parent.iterdir()] == [cached.name]


def test_a_write_that_fails_halfway_keeps_the_old_file_and_warns(cached, monkeypatch, caplog):
    before = cached.read_text()

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(json, "dump", fail)
    measure_link(CPU, nbytes=2 * NBYTES, cache_dir=cached.parent)
    assert cached.read_text() == before
    assert [path.name for path in cached.parent.iterdir()] == [cached.name]
    assert "disk full" in warnings_in(caplog)[0]


def test_a_folder_that_cannot_be_made_costs_the_file_and_not_the_measurement(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    assert measure_link(CPU, nbytes=NBYTES, cache_dir=tmp_path / "file" / "cache").pageable > 0
    assert warnings_in(caplog)
