"""The sampler with readers from a table, and its own readers with the vendors faked; nothing here sleeps."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import threading
import weakref
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import torch
from fake_vendors import ADDRESS, UUID, NVMLError_NotSupported
from wanvideo_enhanced_blockswap.hardware import (
    DeviceSpec,
    HardwareUnavailableError,
    Sampler,
    Samples,
    Vendor,
    probe_device,
)
from wanvideo_enhanced_blockswap.hardware import monitor as sampling
from wanvideo_enhanced_blockswap.hardware.rocm import Rocm

NEVER_S = 3600.0
"""An interval that does not pass while a test runs."""
SOON_S = 0.001
PATIENCE_S = 30.0
NOTHING = Samples(
    count=0,
    gpu_percent_mean=None,
    gpu_percent_max=None,
    vram_used_peak_bytes=None,
    rss_peak_bytes=None,
    host_available_least_bytes=None,
)
CPU = probe_device(torch.device("cpu"))


FIGURES = {
    "gpu": sampling.GPU_PERCENT,
    "vram": sampling.VRAM_USED_BYTES,
    "rss": sampling.RSS_BYTES,
    "host": sampling.HOST_AVAILABLE_BYTES,
}


class Table:
    """Readings that answer from a list each, raising what is an exception; after the last answer they know nothing.

    `done` is set when every list has been read.
    """

    def __init__(self, *, gpu=(), vram=(), rss=(), host=()):
        self._left = {"gpu": list(gpu), "vram": list(vram), "rss": list(rss), "host": list(host)}
        self.done = threading.Event()
        self.opened = self.closed = 0

    @contextlib.contextmanager
    def open(self, _spec):
        self.opened += 1
        try:
            yield [(figure, partial(self.read, name)) for name, figure in FIGURES.items()]
        finally:
            self.closed += 1

    def read(self, name):
        answers = self._left[name]
        answer = answers.pop(0) if answers else None
        if not any(self._left.values()) and name == "host":  # the last that is asked in a round
            self.done.set()
        if isinstance(answer, BaseException):
            raise answer
        return answer


def sampled(table):
    """The samples of a whole table."""
    with Sampler(CPU, interval_s=SOON_S, open_readings=table.open) as sampler:
        assert table.done.wait(PATIENCE_S)
    return sampler.samples()


def sampling_threads():
    return [thread for thread in threading.enumerate() if thread.name == sampling.THREAD_NAME]


def end_threads():
    for thread in sampling_threads():
        thread.join(PATIENCE_S)
    assert not sampling_threads()


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_utilisation_is_averaged_and_memory_is_taken_at_its_worst():
    found = sampled(Table(gpu=[20.0, 90.0, 40.0], vram=[10, 30, 20], rss=[7, 5, 6], host=[300, 100, 200]))
    assert found.count >= 3
    assert (found.gpu_percent_mean, found.gpu_percent_max) == (50.0, 90.0)
    assert (found.vram_used_peak_bytes, found.rss_peak_bytes, found.host_available_least_bytes) == (30, 7, 100)


def test_byte_counts_are_whole_numbers():
    found = sampled(Table(vram=[(1 << 52) + 1], rss=[3], host=[4]))
    assert found.vram_used_peak_bytes == (1 << 52) + 1
    assert all(type(n) is int for n in (found.vram_used_peak_bytes, found.rss_peak_bytes))


def test_what_no_reading_tells_is_none_without_a_warning(caplog):
    found = sampled(Table(rss=[1, 2]))
    assert (found.gpu_percent_mean, found.gpu_percent_max, found.vram_used_peak_bytes) == (None, None, None)
    assert found.rss_peak_bytes == 2
    assert not warnings_in(caplog)


@pytest.mark.parametrize(
    "error",
    [
        OSError(24, "Too many open files"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        HardwareUnavailableError("gone"),
        ValueError("free memory: expected 0 to 10 bytes, got 11"),
        psutil.AccessDenied(),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("name", ["gpu", "vram", "rss", "host"])
def test_a_figure_that_cannot_be_read_is_none_with_one_warning_and_the_others_stand(caplog, name, error):
    answers = {"gpu": [1.0] * 3, "vram": [1] * 3, "rss": [1] * 3, "host": [1] * 3}
    found = sampled(Table(**(answers | {name: [error] * 3})))
    figures = {
        "gpu": found.gpu_percent_max,
        "vram": found.vram_used_peak_bytes,
        "rss": found.rss_peak_bytes,
        "host": found.host_available_least_bytes,
    }
    assert [key for key, figure in figures.items() if figure is None] == [name]
    assert len(warnings_in(caplog)) == 1


def test_a_reading_that_fails_once_is_missing_alone():
    found = sampled(Table(gpu=[10.0, RuntimeError("busy"), 30.0]))
    assert (found.gpu_percent_mean, found.gpu_percent_max) == (20.0, 30.0)


def test_constructing_a_sampler_starts_no_thread_and_opens_nothing():
    table = Table()
    sampler = Sampler(CPU, open_readings=table.open)
    assert (sampling_threads(), table.opened) == ([], 0)
    assert sampler.samples() == NOTHING


def test_one_daemon_thread_runs_during_the_block_and_none_after_it():
    table = Table()
    with Sampler(CPU, interval_s=NEVER_S, open_readings=table.open):
        assert [thread.daemon for thread in sampling_threads()] == [True]
    assert sampling_threads() == []


def test_the_end_does_not_wait_for_the_interval_and_reads_once_more():
    table = Table(gpu=[70.0])
    with Sampler(CPU, interval_s=NEVER_S, open_readings=table.open) as sampler:
        pass
    assert (sampler.samples().count, sampler.samples().gpu_percent_mean) == (1, 70.0)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_run_that_ends_with_an_exception_leaves_no_thread_and_keeps_what_was_read(error):
    table = Table(rss=[5])
    sampler = Sampler(CPU, interval_s=NEVER_S, open_readings=table.open)
    with pytest.raises(error), sampler:
        raise error
    assert sampling_threads() == []
    assert (sampler.samples().rss_peak_bytes, table.closed) == (5, 1)


def test_the_readers_are_opened_once_and_closed_when_the_block_ends():
    table = Table(gpu=[1.0, 2.0, 3.0])
    sampled(table)
    assert (table.opened, table.closed) == (1, 1)


def test_a_sampler_can_be_used_again_and_counts_anew():
    table = Table(rss=[9, 4])
    sampler = Sampler(CPU, interval_s=NEVER_S, open_readings=table.open)
    peaks = []
    for _ in range(2):
        with sampler:
            pass
        peaks.append((sampler.samples().count, sampler.samples().rss_peak_bytes))
    assert peaks == [(1, 9), (1, 4)]


def test_a_sampler_in_use_cannot_be_entered_again():
    table = Table()
    with (
        Sampler(CPU, interval_s=NEVER_S, open_readings=table.open) as sampler,
        pytest.raises(RuntimeError, match="already in a with block"),
    ):
        sampler.__enter__()
    assert (sampling_threads(), table.opened) == ([], 1)


def test_figures_may_be_asked_for_while_the_run_lasts():
    table = Table(gpu=[30.0, 50.0])
    with Sampler(CPU, interval_s=SOON_S, open_readings=table.open) as sampler:
        assert table.done.wait(PATIENCE_S)
        assert sampler.samples().gpu_percent_max in (30.0, 50.0)  # the reading that is being added may be missing


def test_a_mistake_in_a_reader_is_printed_and_costs_neither_the_run_nor_what_was_read(monkeypatch):
    seen, table = [], Table(gpu=[60.0, TypeError("a mistake")], host=[1, 2])
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_type))
    with Sampler(CPU, interval_s=SOON_S, open_readings=table.open) as sampler:
        end_threads()
    assert (seen, sampler.samples().gpu_percent_max, table.closed) == ([TypeError], 60.0, 1)


def test_a_reading_that_never_comes_back_does_not_hold_up_the_end_of_the_run(monkeypatch, caplog):
    monkeypatch.setattr(sampling, "JOIN_S", 0.01)
    release, table = threading.Event(), Table()
    monkeypatch.setattr(table, "read", lambda _name: release.wait(PATIENCE_S) and 1)
    with Sampler(CPU, interval_s=NEVER_S, open_readings=table.open) as sampler:
        (thread,) = sampling_threads()
    assert len(warnings_in(caplog)) == 1
    with sampler:
        release.set()
    thread.join(PATIENCE_S)
    assert sampler.samples().count == 1
    assert sampling_threads() == []


def test_a_system_without_threads_left_costs_the_figures_and_not_the_run(monkeypatch, caplog):
    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with Sampler(CPU) as sampler:
        pass
    assert sampler.samples() == NOTHING
    assert len(warnings_in(caplog)) == 1


def test_an_interrupt_while_the_thread_starts_leaves_no_thread(monkeypatch):
    start, threads = threading.Thread.start, []

    def start_and_be_interrupted(thread):
        start(thread)
        threads.append(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start_and_be_interrupted)
    with pytest.raises(KeyboardInterrupt), Sampler(CPU, interval_s=NEVER_S, open_readings=Table().open):
        pass
    threads[0].join(PATIENCE_S)
    assert sampling_threads() == []


def test_a_model_in_an_exception_that_ended_the_run_is_not_kept_alive():
    class Model:
        pass

    sampler, table = Sampler(CPU, interval_s=NEVER_S, open_readings=Table().open), []

    def run():
        model = Model()
        table.append(weakref.ref(model))
        with sampler:
            raise RuntimeError(model)

    with contextlib.suppress(RuntimeError):
        run()
    gc.collect()
    assert table[0]() is None


@pytest.mark.parametrize("interval_s", [0.0, -1.0, float("nan"), float("inf")])
def test_an_interval_that_is_no_time_is_refused(interval_s):
    with pytest.raises(ValueError, match="interval_s: expected more than 0 seconds"):
        Sampler(CPU, interval_s=interval_s)


# The readers that are used when none are given.


def spec(vendor, *, uuid=f"GPU-{UUID}", integrated=None, total=1000, device="cuda:0"):
    return DeviceSpec("GPU", vendor, device, uuid, ADDRESS, None, integrated, None, total, None)


def once(of):
    with Sampler(of, interval_s=NEVER_S) as sampler:
        pass
    return sampler.samples()


@pytest.fixture
def sysfs(monkeypatch, tmp_path):
    """A sysfs with a card at ADDRESS that has 300 of 1000 bytes in use."""
    folder = tmp_path / "bus" / "pci" / "devices" / ADDRESS
    folder.mkdir(parents=True)
    for name, text in {"mem_info_vram_total": "1000", "mem_info_vram_used": "300", "gpu_busy_percent": "17"}.items():
        (folder / name).write_text(text)
    monkeypatch.setattr(sampling, "Rocm", partial(Rocm, sysfs_root=tmp_path))
    return folder


def test_without_a_gpu_only_the_host_is_sampled(caplog):
    found = once(CPU)
    assert (found.count, found.gpu_percent_mean, found.vram_used_peak_bytes) == (1, None, None)
    assert found.rss_peak_bytes > 1 << 20
    assert found.host_available_least_bytes > 0
    assert not warnings_in(caplog)


def test_an_nvidia_card_is_read_through_nvml_opened_and_closed_once(install_nvml):
    nvml = install_nvml()
    found = once(spec(Vendor.NVIDIA))
    assert (found.gpu_percent_mean, found.vram_used_peak_bytes) == (83.0, 300)
    names = [name for name, *_ in nvml.calls]
    assert (names.count("nvmlInit"), names.count("nvmlShutdown")) == (1, 1)
    assert names.count("nvmlDeviceGetUtilizationRates") == names.count("nvmlDeviceGetMemoryInfo") == 1


def test_a_card_that_nvml_cannot_read_is_asked_through_torch(install_nvml, install_cuda):
    install_cuda(free=600)
    install_nvml(nvmlDeviceGetMemoryInfo=NVMLError_NotSupported("no"))
    assert once(spec(Vendor.NVIDIA)).vram_used_peak_bytes == 400


def test_a_reading_of_the_gpu_that_holds_the_instance_is_not_believed(install_nvml, install_cuda):
    install_cuda(free=600)
    install_nvml(nvmlDeviceGetMemoryInfo=SimpleNamespace(total=7000, free=1000, used=6000))
    assert once(spec(Vendor.NVIDIA)).vram_used_peak_bytes == 400


def test_without_nvml_memory_comes_from_torch_with_one_warning(install_cuda, monkeypatch, caplog):
    install_cuda(free=100)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = once(spec(Vendor.NVIDIA))
    assert (found.gpu_percent_mean, found.vram_used_peak_bytes) == (None, 900)
    assert len(warnings_in(caplog)) == 1


def test_an_amd_card_is_read_through_sysfs_and_amdsmi_is_left_alone(sysfs, install_amdsmi):
    amdsmi = install_amdsmi()
    found = once(spec(Vendor.AMD))
    assert (found.gpu_percent_mean, found.vram_used_peak_bytes) == (17.0, 300)
    assert amdsmi.calls == []


def test_an_amd_card_that_sysfs_does_not_show_is_asked_through_torch(sysfs, install_cuda):
    install_cuda(hip="7.0", free=250)
    for file in sysfs.iterdir():
        file.unlink()
    found = once(spec(Vendor.AMD))
    assert (found.gpu_percent_mean, found.vram_used_peak_bytes) == (None, 750)


def test_a_free_figure_above_the_total_is_not_believed(sysfs, install_cuda, caplog):
    install_cuda(hip="7.0", free=2000)
    (sysfs / "mem_info_vram_total").unlink()
    assert once(spec(Vendor.AMD)).vram_used_peak_bytes is None
    assert any("expected 0 to 1000 bytes, got 2000" in warning for warning in warnings_in(caplog))


def test_a_gpu_that_shares_the_hosts_memory_is_told_by_the_hosts_figures(install_nvml):
    install_nvml()
    found = once(spec(Vendor.NVIDIA, integrated=True))
    assert (found.gpu_percent_mean, found.vram_used_peak_bytes) == (83.0, None)


def test_a_device_of_another_kind_has_no_figures_of_its_own():
    found = once(spec(Vendor.OTHER, device="xpu:0"))
    assert (found.gpu_percent_mean, found.vram_used_peak_bytes) == (None, None)
