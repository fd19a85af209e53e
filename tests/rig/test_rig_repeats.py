"""One loaded model, run after run in the real wrapper, failures among them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from comfy_client import Comfy
from rig_runs import HALF
from rig_variants import BLOCKS, VARIANTS, ours

pytestmark = pytest.mark.rig

CLEAN = 5
"""Runs before the first failure."""

IN_THE_MIDDLE = BLOCKS + HALF
"""Of the second forward, counted in blocks."""

FAILURES = {"interrupt": "InterruptProcessingException", "error": "RuntimeError"}
"""Each fault, with the exception that the user sees."""

Sequence = dict[str, list[SimpleNamespace]]


@pytest.fixture(scope="module", params=["bf16", "lora_merged", "fp8_scaled", "gguf", "vace"])
def sequence(request: pytest.FixtureRequest, comfy: Comfy) -> Sequence:
    """`clean` runs, then one of each of FAILURES with a clean one (`after`) behind it, then one (`squeezed`) in whose
    middle the device has no byte more than is in use, and one behind that; the loader is cached.
    """
    case = VARIANTS[request.param] | {"sample": {"cfg": 1.0}}
    found: Sequence = {"truth": [comfy.run(case)]}
    case["swap"] = ours(HALF)
    found["clean"] = [comfy.run(case, cached=index > 0) for index in range(CLEAN)]
    found["failed"], found["after"] = [], []
    for kind in FAILURES:
        found["failed"].append(comfy.run(case, cached=True, fault={"kind": kind, "at": IN_THE_MIDDLE}))
        found["after"].append(comfy.run(case, cached=True))
    squeeze = {"kind": "memory", "at": IN_THE_MIDDLE}
    found["squeezed"] = [comfy.run(case, cached=True, fault=squeeze), comfy.run(case, cached=True)]
    return found


def test_every_run_gives_the_unswapped_latents(sequence: Sequence) -> None:
    (truth,) = sequence["truth"]
    assert [getattr(run, "error", None) for run in sequence["clean"] + sequence["after"]] == [None] * (
        CLEAN + len(FAILURES)
    )
    assert {run.latents for run in sequence["clean"] + sequence["after"]} == {truth.latents}


def test_every_run_costs_what_the_first_one_did(sequence: Sequence) -> None:
    figures = {(run.h2d_bytes, run.d2h_bytes, run.peak_bytes) for run in sequence["clean"] + sequence["after"]}
    assert len(figures) == 1


def test_a_device_that_has_no_memory_left_in_the_middle_of_a_run_is_got_along_with(sequence: Sequence) -> None:
    (truth,) = sequence["truth"]
    assert [getattr(run, "error", None) for run in sequence["squeezed"]] == [None, None]
    assert {run.latents for run in sequence["squeezed"]} == {truth.latents}
    # What is remembered is the smaller plan.
    assert sequence["squeezed"][1].peak_bytes < sequence["clean"][0].peak_bytes


def test_failures_reach_the_user_as_they_are(sequence: Sequence) -> None:
    seen = [run.error.split(":")[0] for run in sequence["failed"]]
    assert seen == list(FAILURES.values())


def test_failures_strike_in_the_middle(sequence: Sequence) -> None:
    for run in sequence["failed"]:
        assert sum(one["blocks"] for one in run.forwards) == IN_THE_MIDDLE


def test_the_device_memory_is_free_after_every_run(sequence: Sequence) -> None:
    (truth,) = sequence["truth"]
    everything = sequence["clean"] + sequence["failed"] + sequence["after"] + sequence["squeezed"]
    assert {run.after_bytes for run in everything} == {truth.after_bytes}


def test_the_transformer_is_the_wrappers_own_after_every_run(sequence: Sequence) -> None:
    (truth,) = sequence["truth"]
    for run in sequence["clean"] + sequence["failed"] + sequence["after"]:
        assert (run.counters, run.places, run.has_own_forward) == ([[-1, -1, 0]], truth.places, False)


def test_host_memory_does_not_grow_from_run_to_run(sequence: Sequence) -> None:
    second, fifth = sequence["clean"][1], sequence["clean"][CLEAN - 1]
    assert fifth.host_bytes == pytest.approx(second.host_bytes, rel=0.03)


def test_host_memory_does_not_grow_with_failures(sequence: Sequence) -> None:
    second, last, squeezed = sequence["clean"][1], sequence["after"][-1], sequence["squeezed"][-1]
    assert last.host_bytes <= 1.03 * second.host_bytes
    more_slabs = squeezed.slab_bytes - second.slab_bytes  # the plan that is remembered swaps more blocks
    assert squeezed.host_bytes <= 1.03 * second.host_bytes + more_slabs


@pytest.mark.parametrize("variant", ["two_experts", "two_experts_fp8_scaled"])
def test_with_ram_for_both_experts_a_second_run_reads_no_file_and_fills_no_slab(comfy: Comfy, variant: str) -> None:
    first, second = (comfy.run(VARIANTS[variant], swap=ours(BLOCKS), cached=cached) for cached in (False, True))
    assert second.latents == first.latents
    assert first.slab_fills == 2 * BLOCKS
    assert first.file_bytes == first.slab_bytes > 0
    assert (second.slab_fills, second.file_bytes, second.slab_bytes) == (0, 0, first.slab_bytes)
