"""`demo`: runs a real Wan transformer unswapped, then swapped, and compares outputs, bytes and times."""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..blockswap.device.backend import Backend, backend_for
from ..blockswap.device.streams import CudaStreams, InlineStreams, Streams
from ..blockswap.engine.session import SwapSession
from ..blockswap.engine.trace import EVERY_FORWARD
from ..blockswap.errors import SettingsError
from ..blockswap.model.layout import ModelProfile
from ..blockswap.model.profile import blocks_of, profile_model
from ..blockswap.model.wan import tokens_for
from ..blockswap.plan.make_plan import Weights, make_plan
from ..blockswap.plan.swap_plan import SwapPlan, Timing, blocks_in_words
from ..blockswap.run.text import plan_details
from ..blockswap.simulation.backend import simulated_backend
from ..blockswap.simulation.streams import SimulatedHardware, SimulatedStreams
from ..blockswap.spans import STALL, Span, total_ms
from ..hardware import MIB, format_bytes, measure_link, probe_device, read_device_memory, read_host_memory
from ..hardware.pinning import PinBudget
from .options import cache_dir, card_inputs, choose_device, parse_count, parse_shape, parse_size
from .output import Result, table
from .picture import check_picture, draw_timeline
from .wan_model import PRESETS, Inputs, build, denoise, make_inputs, refuse_if_too_large

FORWARDS_PER_STEP = 2

SIMULATED_RATIO = 0.67
"""Transfer over compute time of a block on the simulated device, unless `--link` is given: that of Wan 14B in bf16 at
832x480, 17 frames, on an RTX 4090 over PCIe 4.0 x16 (28 ms over 42 ms, from assumed rates). With the speed of a real
link, copies would be invisible beside the compute time of a CPU."""

VIRTUAL = """no GPU here: the device is simulated, and its times are predictions: each block computes for as long as \
it took on this CPU, and copies run at the speed of the assumed link"""


def demo(options: Namespace) -> Result:
    """Runs the demo.

    Raises:
        SettingsError: An option has an impossible value.
        HostMemoryError: The host cannot hold the preset.
        PlanError: No plan fits.
    """
    device, preset, host = choose_device(options.device), PRESETS[options.preset], read_host_memory()
    count = parse_count(options.blocks_to_swap, preset.layers)
    shape = preset.shape if options.shape is None else parse_shape(options.shape)
    tokens_for(preset.architecture, *shape)  # raises for a shape that Wan cannot denoise
    check_picture(Path(options.picture))
    is_simulated = device.type == "cpu"
    refuse_if_too_large(options.preset, preset, available_bytes=host.available_bytes, is_simulated=is_simulated)
    model = build(preset, seed=options.seed)
    inputs = make_inputs(preset, shape, device, seed=options.seed)
    make_stage = Stage if is_simulated else DeviceStage
    stage = make_stage(model, inputs, device, steps=options.steps, quiet=options.json)
    profile = stage.profile
    vram_bytes = _vram_bytes(options.vram, profile, device)
    on_card = card_inputs(profile, vram_bytes, host)
    unswapped, compute_ms = stage.run_unswapped()
    timing = _timing(options, device, compute_ms, profile.blocks[0].slab_bytes)
    # Only CUDA, HIP and the simulated device have streams and page-locking.
    overlaps = device.type in ("cpu", "cuda")
    on_card = replace(on_card, overlap=overlaps, pin=overlaps, timing=timing)
    plan = make_plan(profile, replace(on_card, blocks_to_swap=count, slots=options.slots))
    swapped = stage.run_swapped(plan, timing, PinBudget(host.pin_budget_bytes))
    title = f"{options.preset}: {plan.swapped_count} of {len(plan.swapped)} blocks swapped, the last step"
    draw_timeline(swapped.spans, Path(options.picture), title=title)
    data = _figures(stage, plan, unswapped, swapped) | {
        "picture": options.picture,
        "link_bytes_per_s": timing.pinned_bytes_per_s or timing.pageable_bytes_per_s,
        "reasons": list(plan.reasons),
    }
    card = f"{stage.name}, {format_bytes(vram_bytes)} of memory{'' if options.vram else ' (for this demo; --vram)'}"
    broken = _broken_promises(data)
    details = plan_details(plan) if options.verbose else []
    return Result(data, _text(card, plan, data, broken, details), succeeded=not broken)


def _vram_bytes(text: str | None, profile: ModelProfile, device: torch.device) -> int:
    """Memory of the card: as given; else enough for half of the blocks below the node's threshold."""
    memory = read_device_memory(device)
    total = None if memory is None else memory.total_bytes
    if text is None:
        half = 2 * (profile.other_bytes + profile.small_device_bytes + MIB) + profile.block_bytes
        return half if total is None else min(half, total)
    size = parse_size("--vram", text)
    if total is not None and size > total:
        raise SettingsError(f"--vram: expected at most the {format_bytes(total)} of {device}, got {format_bytes(size)}")
    return size


def _timing(options: Namespace, device: torch.device, compute_ms: tuple[float, ...], block_bytes: int) -> Timing:
    """Speeds for the plan's prediction: measured on a real device, assumed for the simulated one."""
    if device.type == "cpu":
        speed = block_bytes / (SIMULATED_RATIO * statistics.mean(compute_ms) / 1e3)
        speed = speed if options.link is None else options.link * 1e9
        return Timing(compute_ms=compute_ms, pinned_bytes_per_s=speed, streams=options.streams or 1)
    link = measure_link(device, cache_dir=cache_dir())
    timing = Timing(compute_ms=compute_ms, pageable_bytes_per_s=link.pageable)
    if not link.pinned:
        return timing
    streams, speed = link.best()
    return replace(timing, pinned_bytes_per_s=speed, streams=options.streams or streams)


@dataclass(slots=True)
class Moved:
    """Bytes copied between host and device."""

    to_device: int = 0
    to_host: int = 0


@dataclass(slots=True)
class Run:
    """Result and figures of one run of the denoising loop.

    Attributes:
        step_ms: Duration of each step, by the device's clock.
        stall_ms: The time of each step in which compute waited for copies.
        spans: Those of the last step.
        moved: Bytes copied between host and device in one step, with adopt and release.
        above_weights_bytes: Peak of the device memory beside the weights, on a real device.
        weight_bytes: Peak of the device memory of block weights; on a real device, with activations.
        slab_bytes: Host memory of the slabs.
        pinned_bytes: Page-locked host memory.
    """

    latents: torch.Tensor
    step_ms: list[float] = field(default_factory=list)
    stall_ms: list[float] = field(default_factory=list)
    spans: tuple[Span, ...] = ()
    moved: Moved = field(default_factory=Moved)
    above_weights_bytes: int = 0
    weight_bytes: int = 0
    slab_bytes: int = 0
    pinned_bytes: int = 0


def _figures(stage: Stage, plan: SwapPlan, unswapped: Run, swapped: Run) -> dict[str, Any]:
    """Figures of both runs, and of the plan."""
    blocks = stage.profile.blocks
    return {
        "outputs_equal": torch.equal(unswapped.latents, swapped.latents),
        "weights_d2h_bytes": swapped.moved.to_host - unswapped.moved.to_host,
        "h2d_bytes": swapped.moved.to_device - unswapped.moved.to_device,
        "planned_weight_bytes": plan.device_bytes,
        "peak_weight_bytes": swapped.weight_bytes - unswapped.above_weights_bytes,
        "unswapped_weight_bytes": Weights(stage.profile).nbytes(((False,) * len(blocks), 0)),
        "swapped_bytes": sum(blocks[i].streamed_bytes for i in plan.swapped_indices),
        "slab_bytes": swapped.slab_bytes,
        "pinned_bytes": swapped.pinned_bytes,
        "blocks": len(blocks),
        "blocks_swapped": plan.swapped_count,
        "slots": plan.slots,
        "stall_ms_per_forward": statistics.median(swapped.stall_ms) / FORWARDS_PER_STEP,
        "planned_stall_ms_per_forward": plan.stall_ms,  # None if a speed was unknown
        "step_ms": statistics.median(swapped.step_ms),
        "unswapped_step_ms": statistics.median(unswapped.step_ms),
        "clock": stage.clock,
        "device": stage.name,
        "measured_by": stage.measured_by,
    }


def _broken_promises(data: dict[str, Any]) -> list[str]:
    broken, over = [], data["peak_weight_bytes"] - data["planned_weight_bytes"]
    if not data["outputs_equal"]:
        broken.append("the outputs differ")
    if data["weights_d2h_bytes"]:
        broken.append(f"{data['weights_d2h_bytes']:,} bytes of weights were copied back")
    if over > 0:
        broken.append(f"the weights took {over:,} bytes more than planned")
    return broken


def _text(card: str, plan: SwapPlan, data: dict[str, Any], broken: list[str], details: list[str]) -> str:
    link, is_virtual = data["link_bytes_per_s"], data["clock"] == "virtual"
    speed = "unknown" if link is None else f"{link / 1e9:.2f} GB/s"
    lines = [
        card,
        f"plan: {''.join('s' if swapped else 'G' for swapped in plan.swapped)}  (G on the GPU, s streaming)",
        f"      {blocks_in_words(plan)}",
        *(f"      {text}" for text in (*plan.remarks, *details)),
        "",
        _table(data),
        "",
        f"outputs equal: {'yes, bit for bit' if data['outputs_equal'] else 'NO'}",
        f"copies to the GPU: {speed}{' (assumed)' if is_virtual else ''}",
        f"bytes counted by: {data['measured_by']}; timeline: {data['picture']}",
        *([VIRTUAL] if is_virtual else []),
        *(f"BROKEN: {promise}" for promise in broken),
    ]
    return "\n".join(lines)


def _table(data: dict[str, Any]) -> str:
    def size(field: str) -> str:
        return format_bytes(data[field])

    stall = data["planned_stall_ms_per_forward"]
    planned_stall = "unknown" if stall is None else f"{stall:.2f} ms"
    weights = (size(f"{run}_weight_bytes") for run in ("unswapped", "peak", "planned"))
    rows = [
        ["", "unswapped", "swapped", "planned"],
        ["VRAM for the blocks", *weights],
        ["RAM for the blocks that stream", "", size("slab_bytes"), size("swapped_bytes")],
        ["copied to the GPU at the start and in one step", "", size("h2d_bytes"), ""],
        ["weights copied back", "", size("weights_d2h_bytes"), format_bytes(0)],
        ["step", f"{data['unswapped_step_ms']:.1f} ms", f"{data['step_ms']:.1f} ms", ""],
        ["the GPU waits in a pass of the model", "", f"{data['stall_ms_per_forward']:.2f} ms", planned_stall],
    ]
    return table(rows)


class Stage:
    """Runs the model, given on the host, unswapped and swapped on a simulated device."""

    name = "simulated"
    clock = "virtual"  # compute takes as long as measured on this CPU, copies as long as over the assumed link
    measured_by = "accounting"  # the engine's own counters

    def __init__(self, model: nn.Module, inputs: Inputs, device: torch.device, *, steps: int, quiet: bool) -> None:
        self.blocks = blocks_of(model)
        self.profile = profile_model(self.blocks, root=model).profile
        self.device = device
        self._model = model
        self._inputs = inputs
        self._steps = steps
        self._quiet = quiet

    def run_unswapped(self) -> tuple[Run, tuple[float, ...]]:
        """The run that gives the true output, and the duration of each block in ms."""
        compute_ms = self._time_blocks(InlineStreams(self.device))
        latents = self._loop(self._steps, "unswapped")
        return Run(latents, step_ms=[FORWARDS_PER_STEP * sum(compute_ms)]), compute_ms

    def run_swapped(self, plan: SwapPlan, timing: Timing, pins: PinBudget) -> Run:
        """The same loop, swapped; a simulated device needs the timing of blocks and link."""
        assert timing.compute_ms is not None
        assert timing.pinned_bytes_per_s is not None
        speed, compute_ms = timing.pinned_bytes_per_s / 1e3, dict(enumerate(timing.compute_ms))
        hardware = SimulatedHardware(link_bytes_per_ms=speed, compute_ms=compute_ms)
        streams = SimulatedStreams(hardware, count=plan.streams)
        backend = simulated_backend(streams, pin_budget=pins)
        run = self._run_session(plan, backend, lambda: streams.compute_stream.now_ms)
        run.moved = self._count_one_step(plan, backend)
        run.weight_bytes = streams.peak_bytes
        return run

    def _time_blocks(self, streams: Streams) -> tuple[float, ...]:
        """Median duration of each block over the forwards of a step, after a step of warm-up."""
        marks: list[list[Any]] = [[] for _ in self.blocks]  # of each block: begin, end, begin, end, …

        def mark(found: list[Any], *_: object) -> None:
            found.append(streams.mark(streams.current()))

        with contextlib.ExitStack() as hooks:
            for (_, block), found in zip(self.blocks, marks, strict=True):
                hooks.enter_context(block.register_forward_pre_hook(functools.partial(mark, found)))
                hooks.enter_context(block.register_forward_hook(functools.partial(mark, found)))
            self._loop(2, "warm-up")
        warm = [found[2 * FORWARDS_PER_STEP :] for found in marks]
        return tuple(statistics.median(map(streams.elapsed_ms, found[::2], found[1::2])) for found in warm)

    def _run_session(self, plan: SwapPlan, backend: Backend, now_ms: Callable[[], float]) -> Run:
        run = Run(self._inputs.latents)
        with SwapSession(self.blocks, lambda profile, held: plan, backend, traced=EVERY_FORWARD) as session:
            session.adopt()
            assert session.trace is not None
            trace, before = session.trace, now_ms()

            def after_step() -> None:
                nonlocal before
                run.step_ms.append(now_ms() - before)
                run.spans = trace.spans()
                run.stall_ms.append(total_ms(run.spans, STALL))
                trace.start()
                before = now_ms()  # the next step begins after the trace is read

            trace.start()
            run.latents = self._loop(self._steps, "swapped", session.forward, after_step)
            run.slab_bytes, run.pinned_bytes = session.slab_bytes, session.pinned_bytes
        return run

    def _count_one_step(self, plan: SwapPlan, backend: Backend) -> Moved:
        """Bytes that the engine itself counts in one step, with adopt and release."""
        with SwapSession(self.blocks, lambda profile, held: plan, backend) as session:
            self._loop(1, "counting", session.forward)
        counters = session.counters
        return Moved(counters.onloaded_bytes + counters.placed_bytes, counters.returned_bytes)

    def _loop(
        self,
        steps: int,
        label: str,
        forward: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
        after_step: Callable[[], object] = lambda: None,
    ) -> torch.Tensor:
        from tqdm import tqdm

        with tqdm(total=steps, desc=label, unit="step", disable=self._quiet) as bar:

            def advance() -> None:
                after_step()
                bar.update()

            return denoise(self._model, self._inputs, steps=steps, forward=forward, after_step=advance)


class DeviceStage(Stage):
    """The same on a real device, with the device's own counters and clock."""

    clock = "wall"

    def __init__(self, model: nn.Module, inputs: Inputs, device: torch.device, *, steps: int, quiet: bool) -> None:
        super().__init__(model, inputs, device, steps=steps, quiet=quiet)
        self.name = probe_device(device).name
        self._meter = DeviceMeter(device)
        self.measured_by = self._meter.measured_by

    def run_unswapped(self) -> tuple[Run, tuple[float, ...]]:
        self._model.to(self.device)
        is_cuda = self.device.type == "cuda"
        compute_ms = self._time_blocks(CudaStreams(self.device, count=0) if is_cuda else InlineStreams(self.device))
        with self._meter.count_copies() as moved:
            self._loop(1, "counting")
            run = Run(self._inputs.latents, moved=moved())
        before = self._meter.allocated()
        self._meter.reset_peak()
        times = [self._now_ms()]
        run.latents = self._loop(self._steps, "unswapped", after_step=lambda: times.append(self._now_ms()))
        run.step_ms = [end - begin for begin, end in itertools.pairwise(times)]
        run.above_weights_bytes = self._meter.peak() - before
        self._model.to("cpu")
        return run, compute_ms

    def run_swapped(self, plan: SwapPlan, timing: Timing, pins: PinBudget) -> Run:
        for module in self._model.children():
            if module is not self._model.blocks:
                module.to(self.device)
        for parameter in self._model.parameters(recurse=False):
            parameter.data = parameter.data.to(self.device)
        before = self._meter.allocated()
        self._meter.reset_peak()
        backend = backend_for(self.device, pin_budget=pins)
        run = self._run_session(plan, backend, self._now_ms)
        run.weight_bytes = self._meter.peak() - before
        with self._meter.count_copies() as moved:
            self._count_one_step(plan, backend)
            run.moved = moved()
        return run

    def _now_ms(self) -> float:
        torch.get_device_module(self.device).synchronize()
        return time.perf_counter() * 1e3


class DeviceMeter:
    """Reads the counters of a device's torch module; the device has memory of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = torch.get_device_module(device)
        self.measured_by = str(getattr(self._module, "measured_by", device.type))

    def allocated(self) -> int:
        """Bytes allocated on the device now."""
        return int(self._module.memory_allocated(self.device))

    def reset_peak(self) -> None:
        """Starts a new peak."""
        self._module.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Most bytes allocated at once since `reset_peak`."""
        return int(self._module.max_memory_allocated(self.device))

    @contextlib.contextmanager
    def count_copies(self) -> Iterator[Callable[[], Moved]]:
        """Counts the copies inside the block, with the device's own counters or else in torch's dispatcher."""
        stats = getattr(self._module, "copy_stats", None)
        if stats is None:
            with CopyCounter() as counter:
                yield lambda: counter.moved
        else:
            before = stats()
            yield lambda: Moved(*(int(stats()[key] - before[key]) for key in ("h2d_bytes", "d2h_bytes")))


class CopyCounter(TorchDispatchMode):
    """Counts every copy that torch's dispatcher makes between the host and another device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moved = Moved()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            source = args[1 if func is torch.ops.aten.copy_.default else 0]
            match source.device.type == "cpu", result.device.type == "cpu":
                case True, False:
                    self.moved.to_device += source.nbytes
                case False, True:
                    self.moved.to_host += source.nbytes
        return result
