"""The gate around the stand-in wrapper, on the pretend accelerator."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import standin
import torch
from standin import Workflow
from standin.measuring import measured, unswapped
from wanvideo_enhanced_blockswap.blockswap import PinBudget, SwapRun, SwapSettings, TorchMachine, backend_for
from wanvideo_enhanced_blockswap.blockswap.device.backend import Backend
from wanvideo_enhanced_blockswap.blockswap.device.streams import InlineStreams
from wanvideo_enhanced_blockswap.blockswap.device.worker import ThreadWorker
from wanvideo_enhanced_blockswap.blockswap.simulation.backend import SimulatedRegistrar
from wanvideo_enhanced_blockswap.blockswap.wrapper.find import find_wrapper
from wanvideo_enhanced_blockswap.blockswap.wrapper.gate import Gate
from wanvideo_enhanced_blockswap.blockswap.wrapper.wanvideo import COUNTERS

DEVICE = "hpu:0"
BLOCKS, VACE_BLOCKS = 4, 2


def arguments(count: int | None, **changes: Any) -> dict[str, object]:
    """Our node's arguments: a number of blocks, or automatic."""
    by_hand = {"blocks_to_swap": count, "vace_blocks_to_swap": min(count, VACE_BLOCKS)} if count is not None else {}
    return SwapSettings(auto_hardware_tuning=count is None, **{**by_hand, **changes}).to_blockswapargs()


def truth(variant: str) -> torch.Tensor:
    """Latents of the unswapped model."""
    return unswapped(variant, DEVICE).latents


class GateBench:
    """An installed gate, and what it has made.

    Args:
        pin_bytes: What may be page-locked, by a registrar that only counts; None: the device cannot.
    """

    def __init__(self, *, pin_bytes: int | None = None) -> None:
        self.registrar = SimulatedRegistrar()
        self.pins = PinBudget(1 << 40 if pin_bytes is None else pin_bytes)
        self._can_pin = pin_bytes is not None
        self.refuses = False
        self.gate = Gate(find_wrapper(standin.NODE_CLASS_MAPPINGS), self._make_run)
        self.gate.install()

    def _make_run(self, transformer: Any, blocks: Any, settings: SwapSettings) -> SwapRun | None:
        if self.refuses:
            return None
        device = transformer.main_device
        backend = backend_for(device, pin_budget=self.pins)
        if self._can_pin:
            streams = InlineStreams(device)
            backend = Backend(
                device,
                open_streams=lambda count, overlap: streams,
                registrar=self.registrar,
                pin_budget=self.pins,
                make_worker=lambda _: ThreadWorker(),
            )
        return SwapRun(blocks, settings, TorchMachine(device), backend, root=transformer)

    def workflow(self, variant: str, args: dict[str, object] | None) -> Workflow:
        """Loaded with these arguments."""
        workflow = Workflow(variant, device=DEVICE)
        workflow.load(args)
        return workflow

    def run_of(self, workflow: Workflow) -> SwapRun:
        """The run of the first expert."""
        run = self.gate.run_of(workflow.transformer)
        assert run is not None
        return run


def sampled(workflow: Workflow, **options: Any) -> SimpleNamespace:
    """One run: its latents and what it cost."""
    with measured(DEVICE) as cost:
        cost.latents = workflow.sample(**options)
    return cost


def block_bytes(transformer: Any) -> int:
    """Bytes of the parameters of all blocks by the last run's profile, meta or not."""
    lists = [transformer.blocks, *([transformer.vace_blocks] if getattr(transformer, "vace_blocks", None) else [])]
    return sum(p.numel() * p.element_size() for blocks in lists for p in blocks.parameters())


def is_as_new(transformer: Any) -> bool:
    """Whether nothing of ours is on the transformer."""
    counters = {name: getattr(transformer, name) for name in COUNTERS}
    return counters == COUNTERS and not {"forward", "_apply"} & {*vars(transformer)}


def allocated() -> int:
    """Bytes in use on the device."""
    return int(torch.get_device_module(torch.device(DEVICE)).memory_allocated())
