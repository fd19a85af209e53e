"""Small models whose blocks have what real ones have, and sessions that run them on a simulated device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from wanvideo_enhanced_blockswap.blockswap import PinBudget
from wanvideo_enhanced_blockswap.blockswap.device.backend import Backend
from wanvideo_enhanced_blockswap.blockswap.engine.session import SwapSession
from wanvideo_enhanced_blockswap.blockswap.model.layout import BlockProfile, ModelProfile, Placement, align
from wanvideo_enhanced_blockswap.blockswap.plan.make_plan import Weights
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HeldMemory, HostTier, SwapPlan
from wanvideo_enhanced_blockswap.blockswap.simulation.backend import SimulatedRegistrar, simulated_backend
from wanvideo_enhanced_blockswap.blockswap.simulation.streams import SimulatedHardware, SimulatedStreams


class Block(nn.Module):
    """Two matrices that stream, and a small scale that does not. `dtype` is how they are stored."""

    def __init__(self, width: int = 16, hidden: int = 24, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up = nn.Parameter((torch.randn(hidden, width) / width**0.5).to(dtype), requires_grad=False)
        self.down = nn.Parameter((torch.randn(width, hidden) / hidden**0.5).to(dtype), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down = self.up.to(torch.float32), self.down.to(torch.float32)
        return x + torch.tanh(x @ up.T * self.scale) @ down.T


class Model(nn.Module):
    """Blocks in a row; `run` says which, in which order."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.groups = ["blocks"] * len(blocks)

    def forward(self, x: torch.Tensor, run: Sequence[int] | None = None) -> torch.Tensor:
        for i in range(len(self.blocks)) if run is None else run:
            x = self.blocks[i](x)
        return x

    @property
    def named(self) -> list[tuple[str, nn.Module]]:
        """The blocks, each with the name of its group."""
        return [(f"{group}.{i}", block) for i, (group, block) in enumerate(zip(self.groups, self.blocks, strict=True))]


def toy(count: int = 6, *, seed: int = 0, width: int = 16) -> Model:
    """A model of equal blocks with weights from a seed."""
    torch.manual_seed(seed)
    return Model([Block(width) for _ in range(count)])


def fixed_plan(
    swapped: Sequence[bool],
    *,
    slots: int = 2,
    tiers: Sequence[HostTier] | HostTier = HostTier.PINNED,
    streams: int = 1,
    overlap: bool = True,
) -> Callable[..., SwapPlan]:
    """A planner that decides just this, and promises the device memory that it takes."""

    def planner(profile: ModelProfile, held: HeldMemory | None = None) -> SwapPlan:
        inside = [i for i, is_swapped in enumerate(swapped) if is_swapped]
        weights = Weights(profile)
        window = weights.window((tuple(swapped), slots))
        used = min(slots, len(weights.in_lane(swapped)))
        tier = [tiers] * len(swapped) if isinstance(tiers, HostTier) else list(tiers)
        return SwapPlan(
            swapped=tuple(swapped),
            slots=used,
            slot_bytes=window[0] if used else 0,
            own_slots=window[used:],
            streams=streams,
            overlap=overlap,
            tiers=tuple(t if s else None for t, s in zip(tier, swapped, strict=True)),
            device_bytes=weights.nbytes((tuple(swapped), slots)),
            budget_bytes=1 << 62,
            activation_bytes=None,
            limit_bytes=1 << 62,
            slab_bytes=sum(align(profile.blocks[i].slab_bytes, 4096) for i in inside),
            pinned_bytes=1,  # staging slabs are locked if anything is
            staging_bytes=0,
            streamed_bytes=sum(profile.blocks[i].slab_bytes for i in inside),
            predicted=None,
            over_ceiling=False,
            reasons=(),
        )

    return planner


class Simulation:
    """A simulated device, its registrar and its backend."""

    def __init__(
        self,
        *,
        streams: int = 1,
        lateness: float = 0.5,
        seed: int = 0,
        refuse_after: int | None = None,
        pin_bytes: int = 1 << 40,
        hardware: SimulatedHardware | None = None,
    ) -> None:
        self.streams = SimulatedStreams(hardware or SimulatedHardware(lateness=lateness, seed=seed), count=streams)
        self.registrar = SimulatedRegistrar(refuse_after=refuse_after, streams=self.streams)
        self.pin_budget = PinBudget(pin_bytes)
        self.backend: Backend = simulated_backend(self.streams, pin_budget=self.pin_budget, registrar=self.registrar)

    def session(self, model: Model, planner: Callable[..., SwapPlan], **options: bool) -> SwapSession:
        """A session of the model's blocks on this device."""
        return SwapSession(model.named, planner, self.backend, root=model, **options)


def replan(session: SwapSession, planner: Callable[[ModelProfile], SwapPlan]) -> SwapPlan:
    """The session with another plan, as a planner that has changed its mind makes it."""
    session.release()
    session._planner = planner
    return session.adopt()


def window_of(session: SwapSession) -> tuple[torch.Tensor, ...]:
    """The device memory of each slot."""
    transfer = session._holds.transfer
    return () if transfer is None else transfer.window


def small_bytes(block: BlockProfile) -> int:
    """Bytes that stay on the device even when the block is swapped."""
    return sum(t.nbytes for t in block.tensors if t.placement in (Placement.SMALL, Placement.FIXED))


def alternating(count: int) -> list[bool]:
    """Every second block swapped."""
    return [i % 2 == 1 for i in range(count)]
