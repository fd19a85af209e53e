"""Every machine of machines.py: what is read of it, and what is planned on it, as machines.txt has it."""

from __future__ import annotations

import difflib
import logging
import re
import sys

import pytest
import torch
from fake_machine import in_place, read
from machine_table import GOLDEN, TIERS, models, plans, readings_of, table
from machines import MACHINES, Machine, linux, rtx_3060, rtx_3090
from wanvideo_enhanced_blockswap.blockswap.errors import PlanError
from wanvideo_enhanced_blockswap.blockswap.plan.budget import SAFETY_RESERVE
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import SwapPlan
from wanvideo_enhanced_blockswap.hardware import GIB, HostPlatform, Vendor, probe_device
from wanvideo_enhanced_blockswap.hardware.monitor import GPU_PERCENT, open_readings
from wanvideo_enhanced_blockswap.hardware.records import PcieLink

MOST_WARNINGS = 3
BY_LABEL = {machine.label: machine for machine in MACHINES}
every_machine = pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.label)


@pytest.fixture(scope="module")
def rows():
    return models()


@pytest.fixture(scope="module")
def every_reading():
    return {machine.label: readings_of(machine) for machine in MACHINES}


@pytest.fixture(scope="module")
def every_plan(rows, every_reading):
    return {machine.label: plans(machine, every_reading[machine.label], rows) for machine in MACHINES}


def test_there_are_at_least_40_machines_and_no_two_of_one_name():
    assert len(BY_LABEL) == len(MACHINES) >= 40


@pytest.mark.parametrize("name", ["RX 6800", "RX 7900 XT", "RX 7900 XTX", "RX 9070 XT"])
def test_each_radeon_is_there_with_hip_on_linux_and_on_windows(name, every_reading):
    found = [machine for machine in MACHINES if machine.hip and machine.cards[0].name == f"AMD Radeon {name}"]
    platforms = {every_reading[machine.label].host.platform for machine in found if len(machine.cards) == 1}
    assert {HostPlatform.LINUX, HostPlatform.WINDOWS} <= platforms


def test_readings_and_plans_are_those_of_the_table(rows, every_reading, every_plan):
    found = [(machine, every_reading[machine.label], every_plan[machine.label]) for machine in MACHINES]
    before, now = GOLDEN.read_text(encoding="utf-8"), table(found, rows)
    difference = difflib.unified_diff(before.splitlines(), now.splitlines(), "machines.txt", "now", lineterm="", n=9)
    command = "python tests/hardware/write_machines.py"
    assert now == before, "\n".join([*difference, "", f"If that is how it should be: {command}"])


@every_machine
def test_the_readings_of_a_machine_are_possible(machine, every_reading):
    found = every_reading[machine.label]
    if found.memory is not None:
        assert 0 <= found.memory.free_bytes <= found.memory.total_bytes
        assert found.memory.source
    assert 0 <= found.host.available_bytes <= found.host.physical_bytes
    assert 0 <= found.host.pin_budget_bytes < found.host.physical_bytes


@every_machine
def test_a_plan_can_be_made_for_every_gpu(machine, every_reading):
    found = every_reading[machine.label]
    assert (found.memory is None) == (machine.device == "cpu")


@every_machine
def test_a_machine_gives_as_many_warnings_as_it_has_readings_that_nobody_knows(machine, every_reading):
    assert len(every_reading[machine.label].warnings) == machine.warnings <= MOST_WARNINGS


@every_machine
def test_the_utilisation_of_a_machine_is_read_or_unknown_with_one_warning(machine, tmp_path, caplog):
    with in_place(machine, tmp_path):
        spec = probe_device(torch.device(machine.device))
        caplog.clear()
        with open_readings(spec) as readings:
            found = dict(readings)[GPU_PERCENT]()
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    is_unknown = spec.vendor is not Vendor.OTHER and found is None
    assert len(warnings) == int(is_unknown)


@every_machine
def test_the_plans_of_a_machine_keep_to_what_they_may_take(machine, every_plan, every_reading):
    found = every_reading[machine.label]
    for plan in every_plan[machine.label].values():
        if not isinstance(plan, SwapPlan):
            continue
        assert plan.over_ceiling == (plan.device_bytes > plan.budget_bytes)
        assert plan.device_bytes <= found.memory.free_bytes
        assert plan.pinned_bytes <= found.host.pin_budget_bytes
        assert sum(tier is not None for tier in plan.tiers) == plan.swapped_count
        reserve = int(SAFETY_RESERVE * found.memory.total_bytes)
        assert plan.over_ceiling or plan.device_bytes <= found.memory.free_bytes - reserve


@every_machine
def test_a_refusal_on_a_machine_says_what_is_wanted_and_what_there_is(machine, every_plan):
    refusals = [str(plan) for plan in every_plan[machine.label].values() if isinstance(plan, PlanError)]
    numbers = re.compile(r"not enough V?RAM: [\d.]+ [MG]B .*needed .*, [\d.]+ [MG]?B .*; .*close other programs")
    assert [text for text in refusals if not numbers.search(text)] == []


def test_every_host_tier_and_both_refusals_occur(every_plan):
    found = [plan for of_a_machine in every_plan.values() for plan in of_a_machine.values()]
    assert {tier for plan in found if isinstance(plan, SwapPlan) for tier in plan.tiers if tier} == set(TIERS)
    refusals = {" ".join(str(plan).split()[:3]) for plan in found if isinstance(plan, PlanError)}
    assert refusals == {"not enough RAM:", "not enough VRAM:"}


@pytest.mark.parametrize(("device", "link"), [("cuda:0", (1, 4, 3, 16)), ("cuda:1", (1, 16, 4, 16))])
def test_under_reordered_visibility_each_card_has_its_own_link(device, link):
    cards = rtx_3090(serial=1, bus=1), rtx_3060(serial=2, bus=0x21, link=(1, 4, 3, 16))
    machine = Machine(label="two cards", host=linux(64, 60), cards=cards, visible=(1, 0), device=device)
    found = readings_of(machine)
    assert (found.spec.pcie, found.warnings) == (PcieLink(*link), ())


def test_amdsmi_is_asked_about_the_card_that_torch_shows_first_not_about_its_own_first(every_reading):
    found = every_reading["RX 6800 and 7900 XTX, HIP_VISIBLE_DEVICES=1,0, free memory told wrong"]
    assert (found.spec.name, found.memory.source) == ("AMD Radeon RX 7900 XTX", "amdsmi")
    assert found.memory.free_bytes == 20 * GIB


@pytest.mark.parametrize("label", [label for label in BY_LABEL if "MIG" in label])
def test_the_gpu_that_holds_a_mig_instance_is_never_asked(label, tmp_path):
    with in_place(BY_LABEL[label], tmp_path):
        read(BY_LABEL[label])
        asked = {argument for _, *arguments in sys.modules["pynvml"].calls for argument in arguments}
    assert "handle 1" in asked
    assert "handle 0" not in asked


@pytest.mark.parametrize("label", [label for label in BY_LABEL if "container of" in label])
def test_a_container_has_no_more_memory_than_its_limit(label, every_reading):
    host = every_reading[label].host
    assert host.available_bytes <= host.cgroup_limit_bytes < host.physical_bytes


def test_both_versions_of_control_groups_leave_the_same_memory(every_reading):
    one, two = (
        every_reading[f"RTX 4090 in a container of 16 GB on a host of 64, cgroup v{version}"].host for version in (1, 2)
    )
    assert (one.available_bytes, one.cgroup_limit_bytes) == (two.available_bytes, two.cgroup_limit_bytes)


@pytest.mark.parametrize(
    ("word", "platform"),
    [("Windows", HostPlatform.WINDOWS), ("WSL2", HostPlatform.WSL2), ("Linux", HostPlatform.LINUX)],
)
def test_a_machine_runs_what_its_name_says(word, platform, every_reading):
    assert {every_reading[label].host.platform for label in BY_LABEL if word in label} == {platform}
