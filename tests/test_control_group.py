"""A model larger than the memory that its process may have: a real limit of the system, set by a control group."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from in_control_group import BLOCK_BYTES, FORWARDS, build, predict
from on_disk import skip_unless_on_disk
from safetensors.torch import load_file, save_file
from wanvideo_enhanced_blockswap.hardware import MIB, format_bytes

LAYERS = 16
MODEL_BYTES = LAYERS * BLOCK_BYTES  # 1 GB
LIMIT_BYTES = 640 * MIB
TESTS = Path(__file__).parent


class ControlGroup:
    """A group of processes with a limit of memory, of either version of the system's control groups."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_version1 = (folder / "memory.limit_in_bytes").exists()

    @property
    def join(self) -> Path:
        """The file that takes the number of a process."""
        return self._folder / "cgroup.procs"

    def limit(self, nbytes: int) -> None:
        """Limits memory, with nothing swapped out: a process that takes more, and can drop nothing, is killed."""
        if self._is_version1:
            (self._folder / "memory.limit_in_bytes").write_text(str(nbytes))
            (self._folder / "memory.swappiness").write_text("0")
        else:
            (self._folder / "memory.max").write_text(str(nbytes))
            if (self._folder / "memory.swap.max").exists():  # not on a system without swap
                (self._folder / "memory.swap.max").write_text("0")

    @property
    def kills(self) -> int:
        """Number of processes that were killed at the limit."""
        name = "memory.oom_control" if self._is_version1 else "memory.events"
        return int(dict(line.split() for line in (self._folder / name).read_text().splitlines())["oom_kill"])

    @property
    def times_full(self) -> int:
        """How often the limit was reached, so that the system had to drop pages of files."""
        if self._is_version1:
            return int((self._folder / "memory.failcnt").read_text())
        events = dict(line.split() for line in (self._folder / "memory.events").read_text().splitlines())
        return int(events["max"])


def own_groups() -> Iterator[Path]:
    """Folders of this process's control groups that may have children with a limit of memory, innermost first."""
    for line in Path("/proc/self/cgroup").read_text().splitlines() if sys.platform == "linux" else ():
        _, controllers, group = line.split(":", 2)
        if controllers in ("", "memory"):
            mount = Path("/sys/fs/cgroup", controllers)
            own = mount / group.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_dir() and folder.is_relative_to(mount))


@contextlib.contextmanager
def group_in(parent: Path) -> Iterator[ControlGroup]:
    """A limited group, which must be empty at the end."""
    folder = parent / f"blockswap-test-{os.getpid()}"
    folder.mkdir()
    try:
        made = ControlGroup(folder)
        made.limit(LIMIT_BYTES)
        yield made
    finally:
        folder.rmdir()


def refusal(folder: Path) -> str | None:
    """Why a group cannot have limited children; None if it can."""
    try:
        with group_in(folder):
            return None
    except OSError as refused:
        return f"{folder}: {refused.strerror}"


@pytest.fixture(scope="module")
def parent() -> Path:
    """The folder of a group that may have limited children."""
    refusals = {folder: refusal(folder) for folder in own_groups()}
    for folder, why in refusals.items():
        if why is None:
            return folder
    whys = "; ".join(map(str, refusals.values())) or "this system has none"
    pytest.skip(f"no control group with a limit of memory can be made: {whys}")


@pytest.fixture
def group(parent: Path) -> Iterator[ControlGroup]:
    """A new group for each test."""
    with group_in(parent) as made:
        yield made


@pytest.fixture(scope="module")
def truth(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor]]:
    """The file of a model, and what the unswapped model makes."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    model = build(LAYERS, "meta").to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.05, 0.05)
    outputs = [predict(model, seed) for seed in range(FORWARDS)]
    save_file(dict(model.named_parameters()), path)
    skip_unless_on_disk(path)
    return path, outputs


def run_in(group: ControlGroup, file: Path, way: str, results: Path) -> subprocess.CompletedProcess[str]:
    """Runs the model in the group, which is charged for each page of the file that it brings into memory."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, str(TESTS / "in_control_group.py"), str(group.join), str(file), str(LAYERS)]
    paths = os.pathsep.join((str(TESTS.parent), str(TESTS)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(results), way], capture_output=True, text=True, timeout=120, env=environment, check=False
    )


@pytest.mark.parametrize("way", ["planned", "locked"])
def test_a_model_larger_than_the_memory_runs_within_what_its_plan_adds(
    group: ControlGroup, truth: tuple[Path, list[torch.Tensor]], tmp_path: Path, way: str
) -> None:
    file, expected = truth
    done = run_in(group, file, way, tmp_path / "outputs")
    assert (done.returncode, group.kills) == (0, 0), done.stderr
    figures = json.loads(done.stdout)
    outputs = load_file(tmp_path / "outputs")
    assert all(torch.equal(outputs[str(seed)], expected[seed]) for seed in range(FORWARDS))
    assert group.times_full > 0, "the limit was never felt"
    assert MODEL_BYTES > LIMIT_BYTES > figures["added_bytes"] > 0
    assert figures["file_bytes"] >= MODEL_BYTES - figures["added_bytes"]
    tier = "pinned" if way == "locked" else "pageable"
    assert figures["tiers"]["file"] + figures["tiers"][tier] == LAYERS
    most = figures["added_bytes"] + figures["device_bytes"] + 0.02 * MODEL_BYTES
    assert figures["anonymous_bytes"] <= most, f"{format_bytes(figures['anonymous_bytes'])}: {figures}"
    # Less than planned: the window, which a plan takes for memory of the device, takes room for slabs here.
    assert figures["locked_bytes"] <= figures["pinned_bytes"], figures
    assert (figures["locked_bytes"] > 0) == (way == "locked"), figures


def test_the_group_kills_a_process_with_a_slab_for_each_block(
    group: ControlGroup, truth: tuple[Path, list[torch.Tensor]], tmp_path: Path
) -> None:
    done = run_in(group, truth[0], "slabs", tmp_path / "outputs")
    assert done.returncode == -signal.SIGKILL
    assert group.kills == 1
