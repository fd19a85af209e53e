"""Takes each rule of order, the release, the prefetch and the wrap-around out of the code; its test must fail."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import mutant_child
import pytest

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutant:
    """One change of the code, and the test that must fail with it.

    Attributes:
        name: What is broken.
        file: In which module of blockswap/.
        before: Text that occurs there exactly once.
        after: What it becomes.
        test: Name of the test in test_happens_before.py, or its start.
    """

    name: str
    file: str
    before: str
    after: str
    test: str


MUTANTS = [
    Mutant(
        "rule 1: no free event at allocation",
        "engine/transfer.py",
        "                self.streams.record(slot.free, self._compute)  # Rule 1\n",
        "                pass\n",
        "test_rule_1_the_first_copy_waits_for_the_windows_allocation",
    ),
    Mutant(
        "rule 2: no wait for the free event",
        "engine/transfer.py",
        "            self.streams.wait(copies, slot.free)  # Rules 1 and 2\n",
        "",
        "test_rule_2_a_copy_waits_for_the_block_that_last_read_its_slot",
    ),
    Mutant(
        "rule 2: no wait for the previous content's copies",
        "engine/transfer.py",
        "                self.streams.wait(copies, previous)  # Rule 2\n",
        "                pass\n",
        "test_rule_2_a_copy_waits_for_the_copies_of_a_block_that_was_passed_by",
    ),
    Mutant(
        "rule 3: a wait for the first chunk only",
        "engine/transfer.py",
        "        for event in slot.pending:\n            self.streams.wait(self._compute, event)  # Rule 3\n",
        "        for event in slot.pending[:1]:\n            self.streams.wait(self._compute, event)\n",
        "test_rule_3_a_block_waits_for_every_chunk_of_its_slot",
    ),
    Mutant(
        "rule 3: a new compute stream does not wait for the old",
        "engine/transfer.py",
        "            self._wait_for(self._compute, before)  # Rule 3\n",
        "            pass\n",
        "test_rule_3_a_new_compute_stream_waits_for_the_old_one",
    ),
    Mutant(
        "rule 3: a new compute stream does not wait before a resident block",
        "engine/swapper.py",
        "        self._transfer.follow()\n        if step.released",
        "        if step.slot is not None:\n            self._transfer.follow()\n        if step.released",
        "test_rule_3_a_new_compute_stream_waits_for_the_old_one_before_a_resident_block",
    ),
    Mutant(
        "rule 4: no free event at the release",
        "engine/transfer.py",
        "        self.streams.record(self._slots[index].free, self._compute)  # Rule 4\n",
        "",
        "test_rule_4_a_slot_is_free_only_when_the_next_block_begins",
    ),
    Mutant(
        "rule 4: no free event after an exception",
        "engine/transfer.py",
        "                slot.pending, slot.consumed, slot.filled_bytes = (), True, 0\n"
        "                self.streams.record(slot.free, compute)  # Rule 4\n",
        "                slot.pending, slot.consumed, slot.filled_bytes = (), True, 0\n",
        "test_rule_4_a_slot_is_free_after_an_exception",
    ),
    Mutant(
        "rule 5: the window goes while copies write it",
        "engine/transfer.py",
        "events = [self._wait_for(compute, copies) for copies in self.streams.copy_streams]  # Rule 5\n",
        "events = []\n",
        "test_rule_5_the_window_is_given_up_behind_the_prefetch_that_writes_it",
    ),
    Mutant(
        "rule 5: the stream that memory was allocated on does not wait",
        "engine/transfer.py",
        "            self._wait_for(self._home, compute)  # Rule 5\n",
        "            pass\n",
        "test_rule_5_memory_goes_back_to_the_stream_it_was_allocated_on",
    ),
    Mutant(
        "rule 6: no host wait before unlocking",
        "host/pages.py",
        "            self.streams.host_wait(event)  # Rule 6\n",
        "            pass\n",
        "test_rule_6_a_slab_is_unlocked_behind_the_host_wait_for_its_last_copy",
    ),
    Mutant(
        "rule 6: no host wait for copies that were struck",
        "engine/transfer.py",
        "                self.streams.host_wait(event)  # Rule 6: an interrupted copy",
        "                pass  #",
        "test_rule_6_a_slab_is_unlocked_behind_copies_that_were_struck_amid",
    ),
    Mutant(
        "rule 6: no host wait for a copy that was struck in the worker",
        "engine/transfer.py",
        "                    self.streams.host_wait(event)  # Rule 6: a failed job has left no event behind\n",
        "                    pass\n",
        "test_rule_6_a_staging_slab_is_unlocked_behind_a_copy_that_was_struck_amid",
    ),
    Mutant(
        "rule 7: the window goes while the worker fills it",
        "engine/transfer.py",
        "            succeeded = self._join_worker()\n",
        "            succeeded = True\n",
        "test_rule_7_the_window_goes_only_when_the_worker_is_done",
    ),
    Mutant(
        "rule 8: the worker copies with another device current",
        "host/staging.py",
        "            with self._store.streams.guard():  # Rule 8\n",
        "            if True:\n",
        "test_rule_7_a_block_waits_until_the_worker_has_recorded",
    ),
    Mutant(
        "rule 7: the worker overwrites a staging slab that is being copied",
        "host/staging.py",
        "            staging.settle()  # Rule 7\n            self._store",
        "            self._store",
        "test_rule_7_the_worker_waits_for_the_last_copy_from_its_staging_slab",
    ),
    Mutant(
        "rule 7: the worker reads a file into a staging slab that is being copied",
        "host/staging.py",
        "        staging.settle()  # Rule 7\n        self._read",
        "        self._read",
        "test_rule_7_the_worker_waits_for_the_last_copy_before_it_reads_a_file",
    ),
    Mutant(
        "rule 1: the first copy of a resident does not wait for its allocation",
        "engine/transfer.py",
        "                self.streams.wait(stream, self._allocated)  # Rule 1\n",
        "                pass\n",
        "test_rule_1_the_copy_of_a_resident_waits_for_its_allocation",
    ),
    Mutant(
        "rule 3: a resident block does not wait for its copy",
        "engine/transfer.py",
        "        self.streams.wait(self._compute, copied)  # Rule 3\n",
        "",
        "test_rule_3_a_resident_block_waits_for_its_copy",
    ),
    Mutant(
        "release: the worker goes on placing blocks",
        "engine/placer.py",
        "            self._transfer.unlocked.drain()\n",
        "",
        "test_release_stops_the_worker_that_places_blocks",
    ),
    Mutant(
        "placing: a forward waits for the whole adopt",
        "engine/session.py",
        "            self.adopt(wait=False)\n        finished",
        "            self.adopt(wait=True)\n        finished",
        "test_placing_goes_on_while_the_first_blocks_run",
    ),
    Mutant(
        "rule 7: a block does not wait for the worker",
        "engine/transfer.py",
        "            self._await_worker(slot)  # Rule 7\n",
        "            pass\n",
        "test_rule_7_a_block_waits_until_the_worker_has_recorded",
    ),
    Mutant(
        "pageable slabs are copied in the host thread",
        "engine/session.py",
        "        transfer.host_copies = not plan.overlap\n",
        "        transfer.host_copies = True\n",
        "test_pageable_copies_overlap_compute_as_predicted",
    ),
    Mutant(
        "rule 8: a copy is started with another device current",
        "engine/swapper.py",
        "        with self._transfer.streams.guard():  # Rule 8\n            self._apply(self._ring.leave())\n",
        "        if True:\n            self._apply(self._ring.leave())\n",
        "test_rule_8_calls_run_with_the_windows_device_current",
    ),
    Mutant(
        "rule 8: a block begins with another device current",
        "engine/swapper.py",
        "            with self._transfer.streams.guard():  # Rule 8\n                self._finish()\n",
        "            if True:\n                self._finish()\n",
        "test_rule_8_calls_run_with_the_windows_device_current",
    ),
    Mutant(
        "release: slots are never given back",
        "engine/swapper.py",
        "            self._copies.release(step.released)\n",
        "            pass\n",
        "test_rule_4_a_slot_is_free_only_when_the_next_block_begins",
    ),
    Mutant(
        "release: parameters stay in their slot",
        "engine/swapper.py",
        "            bind(binding.streamed, binding.masters)\n        self._transfer.computed(block, slot)",
        "            pass\n        self._transfer.computed(block, slot)",
        "test_release_shows_every_parameter_its_master_between_forwards",
    ),
    Mutant(
        "prefetch: only the block that begins is onloaded",
        "plan/schedule.py",
        "for block in window:",
        "for block in window[:1]:",
        "test_prefetch_copies_a_block_while_the_one_before_computes",
    ),
    Mutant(
        "wrap-around: nothing is onloaded at the end of a forward",
        "plan/schedule.py",
        "        return self._step(0, is_running=False)\n",
        "        released, self._in_use = self._in_use, None\n        return Step(released, (), None)\n",
        "test_wrap_around_copies_the_next_forwards_first_blocks_before_it_begins",
    ),
]


PROCESSES = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
PROCESSES.set_forkserver_preload(["torch._dynamo", "torch.utils.cpp_extension", "pytest"])
"""Each mutant has a process of its own, since what is broken lives on in garbage. They fork from one that has imported
what takes long."""


def run_tests(folder: Path, *tests: str) -> tuple[int | None, str]:
    """Exit code and output of pytest, over tests of test_happens_before.py and the package in `folder`."""
    process = PROCESSES.Process(target=mutant_child.run, args=(folder, tests))
    process.start()
    process.join()
    said = (folder / mutant_child.OUTPUT).read_text(encoding="utf-8")
    package = folder / mutant_child.PACKAGE / "__init__.py"
    assert (folder / mutant_child.IMPORTED_FROM).read_text(encoding="utf-8") == str(package), said
    return process.exitcode, said


def copy_package(target: Path) -> Path:
    """A copy of the shipped package under its import name, which is found before the installed one."""
    package = target / "wanvideo_enhanced_blockswap"
    shutil.copytree(ROOT / "blockswap", package / "blockswap", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "hardware", package / "hardware", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, package / path.name)
    return package


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_test_of_a_rule_fails_when_the_rule_is_broken(mutant: Mutant, tmp_path: Path) -> None:
    path = copy_package(tmp_path) / "blockswap" / mutant.file
    source = path.read_text()
    assert source.count(mutant.before) == 1, f"{mutant.name}: the code has changed; write the mutant anew"
    path.write_text(source.replace(mutant.before, mutant.after))
    code, said = run_tests(tmp_path, mutant.test)
    assert code == 1, f"{mutant.name} survived:\n{said}"
    assert "TransferError" in said or "AssertionError" in said or "assert " in said


def test_every_rules_test_passes_when_nothing_is_broken(tmp_path: Path) -> None:
    copy_package(tmp_path)
    code, said = run_tests(tmp_path, *sorted({mutant.test for mutant in MUTANTS}))
    assert code == 0, said
