"""In the real wrapper, models that only the wrapper runs, swapped, give the unswapped latents at the planned cost.

The files have the families' own weights at a small width (see tiny_families.py). These are not as in the wrapper:
Uni3C and TheDenk's controlnets: the net is of its class, but not from its loader, which takes the real width only.
LongVie2, FlashVSR and MTV: what is built for the real width only is built for that of the file.
LongCat: the width is the real one, by which the wrapper knows it, with 3 blocks of its 48.
Encoders of audio, images, faces and expressions: their outputs are random, or follow from the images.

Not here:
SCAIL-2, UniAnimate, UniLumos, BindWeave, EchoShot, ATI, WanMove, StoryMem, Time-to-move, Pusa: nothing in or beside the
blocks but convolutions or a projection ahead of them, or inputs.
FlashPortrait: as FantasyPortrait, with its weights under other names in the file.
WanAnimate and MultiTalk in a loop over windows: they run the same forwards as here, again.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from rig_figures import COUNTER_BYTES
from rig_runs import COUNTS, Runs
from rig_variants import BESIDE, BLOCKS_OF, FAMILIES, PARTS
from wanvideo_enhanced_blockswap.blockswap.model.layout import Placement

pytestmark = pytest.mark.rig

STAYS_IN_PART = "stand_in_unmerged"
"""The wrapper leaves this LoRA on the device for good; after a run with us, it is where the blocks' weights were."""

every_family = pytest.mark.parametrize("family", FAMILIES)
every_family_that_leaves = pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=STAYS_IN_PART) if name == STAYS_IN_PART else ())
        for name in FAMILIES
    ],
)
every_count = pytest.mark.parametrize("count", COUNTS)


STAND_IN_BYTES = 30 * 3 * 2 * 384 * 128 * 2
"""Of Stand-In's layers: blocks, queries, keys and values, two factors of a rank of 128, bf16."""

LOADED_TO_DEVICE = {"uni3c_stay": "uni3c_controlnet"}
"""What is on the device before the run, since its loader was asked for that: it goes to the host, once."""


def the_plan(run: SimpleNamespace) -> dict[str, Any]:
    """A run's plan; where it has two, as when a second window is larger than the first, that of more memory."""
    return max(run.plans.values(), key=lambda plan: plan["device_bytes"])


def planned_bytes(run: SimpleNamespace, prefix: str = "") -> int:
    """Bytes of everything that the plan counts, as stored.

    Args:
        prefix: Of the modules' names; all by default.
    """
    plan = the_plan(run)
    sizes = zip(plan["names"], plan["streamed_bytes"], plan["small_bytes"], strict=True)
    return sum(large + small for name, large, small in sizes if name.startswith(prefix))


def loaded_bytes(family: str, run: SimpleNamespace) -> int:
    """Bytes that the family's loader has put on the device before the run."""
    if family == STAYS_IN_PART:
        return STAND_IN_BYTES
    return planned_bytes(run, LOADED_TO_DEVICE[family]) if family in LOADED_TO_DEVICE else 0


def other_bytes(families: Runs, family: str, peak: str) -> int:
    """Device memory that a run needs beside what the plan counts: the peak of one without swapping, less all of it.
    Where the wrapper moves some of it away before its peak, that is less than what one with our node and all of it on
    the device needs.
    """
    unswapped, resident = families.unswapped(family), families.resident(family)
    return max(
        getattr(unswapped, peak) - planned_bytes(resident), getattr(resident, peak) - the_plan(resident)["device_bytes"]
    )


@every_count
@every_family
def test_latents_are_those_of_the_unswapped_model(families: Runs, family: str, count: object) -> None:
    assert families.of(family, count).latents == families.unswapped(family).latents


@every_count
@every_family
def test_blocks_are_swapped(families: Runs, family: str, count: object) -> None:
    plan = the_plan(families.of(family, count))
    assert sum(plan["swapped"]) >= (1 if count == "auto" else min(count, BLOCKS_OF[family]))


@every_count
@every_family_that_leaves
def test_no_planned_weight_is_copied_back(families: Runs, family: str, count: object) -> None:
    run, unswapped = families.of(family, count), families.unswapped(family)
    most = unswapped.d2h_bytes - planned_bytes(run) + loaded_bytes(family, run)
    assert run.d2h_bytes <= most + COUNTER_BYTES


@every_count
@every_family
def test_weights_take_no_more_device_memory_than_planned(families: Runs, family: str, count: object) -> None:
    run = families.of(family, count)
    assert run.peak_bytes <= 1.02 * (other_bytes(families, family, "peak_bytes") + the_plan(run)["device_bytes"])


@every_count
@every_family
def test_placing_takes_no_more_device_memory_than_planned(families: Runs, family: str, count: object) -> None:
    run = families.of(family, count)
    whole = other_bytes(families, family, "whole_peak_bytes") + loaded_bytes(family, run)
    assert run.whole_peak_bytes <= 1.02 * (whole + the_plan(run)["device_bytes"])


@every_count
@every_family_that_leaves
def test_after_a_run_the_transformer_is_the_wrappers_own(families: Runs, family: str, count: object) -> None:
    run, unswapped = families.of(family, count), families.unswapped(family)
    assert run.counters == unswapped.counters == [[-1, -1, 0]]
    assert run.places == unswapped.places
    assert not run.has_own_forward
    assert run.after_bytes <= unswapped.after_bytes


# In bf16, and without LoRAs that are merged, as `plan` takes a model.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("mtv", "control_lora")])
def test_plan_gives_the_bytes_of_the_run(families: Runs, family: str) -> None:
    plan, blocks = the_plan(families.of(family, 1)), families.file(family).model.blocks
    sizes = zip(plan["names"], plan["streamed_bytes"], plan["small_bytes"], strict=True)
    loaded = [one for one in sizes if not one[0].startswith("uni3c_controlnet")]  # the rig's is in no file
    assert [one[:2] for one in loaded] == [(block.name, block.streamed_bytes) for block in blocks]
    # Counters of layers and the kernels of a filter are in no file.
    small = [sum(one.nbytes for one in block.tensors if one.placement is Placement.SMALL) for block in blocks]
    assert all(0 <= found - said <= 1024 for (_, _, found), said in zip(loaded, small, strict=True))


@pytest.mark.parametrize("family", BESIDE)
def test_the_rig_runs_the_wrappers_own_swapping(families: Runs, family: str) -> None:
    native, unswapped = families.native(family), families.unswapped(family)
    assert native.latents == unswapped.latents
    assert native.d2h_bytes > sum(unswapped.block_bytes)


@every_family
def test_all_blocks_run_in_the_rigs_forwards(families: Runs, family: str) -> None:
    assert {one["blocks"] for one in families.unswapped(family).forwards} == {BLOCKS_OF[family]}


@pytest.mark.parametrize(("family", "part"), [(family, part) for family, parts in PARTS.items() for part in parts])
def test_the_rigs_latents_follow_from_each_part(families: Runs, family: str, part: str) -> None:
    assert families.changed(family, changed=part).latents != families.unswapped(family).latents


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in PARTS])
def test_the_rigs_latents_follow_from_what_the_family_adds(families: Runs, family: str) -> None:
    assert families.changed(family, left_out=True).latents != families.unswapped(family).latents
