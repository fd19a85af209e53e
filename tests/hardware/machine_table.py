"""The text of machines.txt: for each machine its readings, and the plans that follow from them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from checkpoint_files import embedding_shapes, wan_shapes, write_sparse_gguf, write_sparse_safetensors
from facts import Facts, make_plan
from fake_machine import Readings, in_place, read
from machines import Machine
from wanvideo_enhanced_blockswap.blockswap.checkpoint.wan_file import read_checkpoint
from wanvideo_enhanced_blockswap.blockswap.errors import PlanError
from wanvideo_enhanced_blockswap.blockswap.model.activations import activation_bytes
from wanvideo_enhanced_blockswap.blockswap.model.recognise import CheckpointProfile
from wanvideo_enhanced_blockswap.blockswap.model.wan import block_flops, tokens_for
from wanvideo_enhanced_blockswap.blockswap.plan import make_plan as planning
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import Activations, HostTier, SwapPlan
from wanvideo_enhanced_blockswap.blockswap.settings import SwapSettings
from wanvideo_enhanced_blockswap.commands.plan import once_loaded
from wanvideo_enhanced_blockswap.hardware import (
    GIB,
    DeviceMemory,
    DeviceSpec,
    DiskSpeed,
    LinkSpeed,
    Vendor,
    format_bytes,
    tune,
)
from wanvideo_enhanced_blockswap.hardware.cards import find_gpu
from wanvideo_enhanced_blockswap.hardware.records import PcieLink

GOLDEN = Path(__file__).parent / "machines.txt"
INTRODUCTION = """\
What is read on each machine of machines.py, and the plans that follow from it with the default settings (automatic).
Nothing here was measured: the readings are those of public reports, and compute times are those assumed for GPUs that
hardware/cards knows. `python tests/hardware/write_machines.py` writes this file; the tests compare it.

A cell:  35/40 2 slots  4.60+1.31  pin 22.9  12 ms  7.1% !
         swapped blocks of all; slots of the window; GB on the device, residents and small tensors + window; host tiers
         of the swapped blocks (pin: page-locked, fil: read from their file, stg: through staging slabs, pag: pageable)
         and their GB; what compute waits for copies in a forward, and what the copies take as a share of compute,
         ? without compute times; ! over the budget even so. refused: what is too small. A dash: no device to swap on.
The loader has copied GGUF models into host memory and left the others in their files, on a disk that reads 3.5 GB/s, or
7 from the system's cache; tensors outside the blocks are on the device.
"""
SHAPES = ((832, 480, 81), (1280, 720, 81))
TALL_OF_5B = 704
"""5B wants multiples of 32: the nearest to 720."""
Shape = tuple[int, int, int]
Cell = tuple[str, Shape]
Plan = SwapPlan | PlanError | None
Plans = dict[Cell, Plan]
DISK = DiskSpeed(3.5e9, 7e9)
TIERS = {HostTier.PINNED: "pin", HostTier.FILE: "fil", HostTier.STAGED: "stg", HostTier.PAGEABLE: "pag"}


@dataclass(frozen=True)
class Model:
    """A row of the grid."""

    name: str
    checkpoint: CheckpointProfile

    def shapes(self) -> Iterable[Shape]:
        for width, height, frames in SHAPES:
            is_720 = height == SHAPES[1][1]
            yield width, TALL_OF_5B if is_720 and self.name.startswith("5B") else height, frames


def models() -> tuple[Model, ...]:
    """Wan 1.3B, 2.2 5B and 14B, each in bf16, fp8 and GGUF Q4_K; 14B in GGUF F16 too, the most that a loader copies."""
    sizes = {
        "1.3B": wan_shapes(1536, 8960, 30) | embedding_shapes(1536),
        "5B": wan_shapes(3072, 14336, 30, channels=48, latents=48) | embedding_shapes(3072),
        "14B": wan_shapes(5120, 13824, 40) | embedding_shapes(5120),
    }
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, shapes in sizes.items():
            files = {
                "bf16": write_sparse_safetensors(Path(folder) / "bf16.safetensors", shapes),
                "fp8": write_sparse_safetensors(Path(folder) / "fp8.safetensors", shapes, "F8_E4M3"),
                "Q4_K": write_sparse_gguf(Path(folder) / "q4.gguf", shapes, "Q4_K"),
            }
            if name == "14B":
                files["F16"] = write_sparse_gguf(Path(folder) / "f16.gguf", shapes, "F16")
            found += [Model(f"{name} {kind}", read_checkpoint(file)) for kind, file in files.items()]
    return tuple(found)


def readings_of(machine: Machine) -> Readings:
    """What is read of a machine, which is put in place for that."""
    with tempfile.TemporaryDirectory() as folder, in_place(machine, Path(folder)):
        return read(machine)


def plans(machine: Machine, readings: Readings, rows: Sequence[Model]) -> Plans:
    """The plan of each model and shape; the refusal, or None where there is no device to swap on."""
    return {
        (model.name, shape): _plan_or_refusal(machine, readings, model.checkpoint, shape)
        for model in rows
        for shape in model.shapes()
    }


def _plan_or_refusal(machine: Machine, readings: Readings, checkpoint: CheckpointProfile, shape: Shape) -> Plan:
    try:
        return _plan(machine, readings, checkpoint, shape)
    except PlanError as refusal:
        return refusal


def _plan(machine: Machine, readings: Readings, checkpoint: CheckpointProfile, shape: Shape) -> SwapPlan | None:
    if readings.memory is None or readings.spec.vendor is Vendor.OTHER:
        return None
    architecture = checkpoint.architecture
    tokens = tokens_for(architecture, *shape)
    free = max(0, readings.memory.free_bytes - checkpoint.model.other_bytes)
    machine_read = planning.Readings(spec=readings.spec, memory=readings.memory, host=readings.host)
    facts = Facts(
        spec=readings.spec,
        memory=replace(readings.memory, free_bytes=free),
        host=once_loaded(checkpoint.model, machine_read).host,
        link=machine.link,
        disk=DISK,
        compute_ms=_compute_ms(readings, checkpoint, tokens),
        activations=Activations(
            nbytes=activation_bytes(architecture, tokens, checkpoint.forward_options), is_measured=False
        ),
    )
    return make_plan(checkpoint.model, SwapSettings(), facts)


def _compute_ms(readings: Readings, checkpoint: CheckpointProfile, tokens: int) -> tuple[float, ...] | None:
    try:
        gpu = find_gpu(readings.spec.name, total_bytes=readings.spec.total_bytes)
    except ValueError:
        return None
    linear, attention = block_flops(checkpoint.architecture, tokens)
    block_ms = gpu.compute_ms(linear, attention)
    return None if block_ms is None else (block_ms,) * len(checkpoint.model.blocks)


def table(found: Iterable[tuple[Machine, Readings, Plans]], rows: Sequence[Model]) -> str:
    """The whole text, of machines with their readings and plans."""
    parts = (_paragraph(machine, readings) + _grid(planned, rows) for machine, readings, planned in found)
    return "\n".join([INTRODUCTION, *parts])


def _paragraph(machine: Machine, readings: Readings) -> str:
    spec, host = readings.spec, readings.host
    tuned = tune(spec, host, machine.link, vram_threshold_percent=SwapSettings().vram_threshold_percent)
    limit = "no limit" if host.cgroup_limit_bytes is None else f"a limit of {_gib(host.cgroup_limit_bytes)} GB"
    memlock = "unlimited" if host.memlock_bytes is None else format_bytes(host.memlock_bytes)
    lines = {
        "device": _device(spec),
        "driver": f"{spec.driver or 'unknown'}; {_pcie(spec.pcie)}; UUID {spec.uuid or 'unknown'}",
        "memory": _memory(readings.memory),
        "host": f"{host.platform.value}, {_gib(host.available_bytes)} of "
        f"{_gib(host.physical_bytes)} GB available, {limit}; may pin {_gib(host.pin_budget_bytes)} GB, "
        f"memlock {memlock}",
        "link": _link(machine.link),
        "tuning": f"{tuned.tier.name}, up to {tuned.tier.max_streams} streams, {tuned.bandwidth_target:.0%}: "
        f"{_streams(tuned.streams)}, {'pinned' if tuned.pin else 'not pinned'}",
        "warnings": str(len(readings.warnings)),
    }
    if machine.environment:
        lines["variables"] = " ".join(f"{name}={value}" for name, value in machine.environment.items())
    return "\n".join([f"## {machine.label}", *(f"   {name:9} {text}" for name, text in lines.items()), ""])


def _device(spec: DeviceSpec) -> str:
    shared = {None: "", True: ", integrated", False: ", discrete"}[spec.is_integrated]
    address = f" at {spec.pci_bus_id}" if spec.pci_bus_id else ""
    units = "units unknown" if spec.compute_units is None else f"{spec.compute_units} units"
    return f"{spec.name} ({spec.vendor.value}), {spec.torch_device}{address}, {units}{shared}"


def _memory(memory: DeviceMemory | None) -> str:
    if memory is None:
        return "the host's"
    how = "estimate" if memory.is_estimate else "read"
    return f"{_gib(memory.free_bytes)} of {_gib(memory.total_bytes)} GB free, {how}: {memory.source}"


def _pcie(link: PcieLink | None) -> str:
    if link is None:
        return "PCIe unknown"
    parts = (link.generation, link.width, link.max_generation, link.max_width)
    now, width, most, widest = ("?" if part is None else part for part in parts)
    return f"PCIe {now} x{width} now, {most} x{widest} at most"


def _link(link: LinkSpeed | None) -> str:
    if link is None:
        return "not measured"
    speeds = {"pinned": "refused", "pageable": _gigabytes(link.pageable), "host copy": _gigabytes(link.host_copy)}
    if link.pinned:
        streams, speed = link.best()
        speeds["pinned"] = f"{_gigabytes(speed)} on {_streams(streams)}"
    return "GB/s: " + ", ".join(f"{name} {speed}" for name, speed in speeds.items())


def _gigabytes(speed: float | None) -> str:
    return "unknown" if speed is None else f"{speed / 1e9:.1f}"


def _streams(count: int) -> str:
    return "1 stream" if count == 1 else f"{count} streams"


def _grid(found: Plans, rows: Sequence[Model]) -> str:
    heads = ["x".join(map(str, shape)) for shape in SHAPES]
    heads[1] += f" (5B: {SHAPES[1][0]}x{TALL_OF_5B}x{SHAPES[1][2]})"
    grid = ([model.name, *(_cell(found[model.name, shape], model) for shape in model.shapes())] for model in rows)
    cells = [["", *heads], *grid]
    if all(plan is None for plan in found.values()):
        return "   -\n"
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ("  |  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "".join(f"   {line.rstrip()}\n" for line in lines)


def _cell(plan: Plan, model: Model) -> str:
    if plan is None:
        return "-"
    if isinstance(plan, PlanError):
        return "refused: host" if str(plan).startswith("not enough RAM") else "refused: device"
    blocks = f"{plan.swapped_count}/{len(plan.swapped)}"
    mark = " !" if plan.over_ceiling else ""
    if not plan.swapped_count:
        return f"{blocks:>5}          {plan.resident_bytes / GIB:5.2f}{mark}"
    memory = f"{plan.resident_bytes / GIB:5.2f}+{plan.window_bytes / GIB:.2f}"
    return f"{blocks:>5} {plan.slots} slots  {memory}  {_tiers(plan, model):8} {_wait(plan)}{mark}"


def _tiers(plan: SwapPlan, model: Model) -> str:
    held = dict.fromkeys(TIERS, 0)
    for block, tier in zip(model.checkpoint.model.blocks, plan.tiers, strict=True):
        if tier is not None:
            held[tier] += block.slab_host_bytes
    return " ".join(f"{TIERS[tier]} {nbytes / GIB:4.1f}" for tier, nbytes in held.items() if nbytes)


def _wait(plan: SwapPlan) -> str:
    forward = plan.predicted
    if forward is None:
        return "     ?          "
    return f"{forward.stall:6.0f} ms {forward.transferred / forward.compute:5.1%}"


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f}"
