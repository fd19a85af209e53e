"""Hosting: where the bytes of swapped blocks are on the host, and what that adds to its memory; pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...hardware.units import format_bytes
from ..model.layout import ModelProfile
from .schedule import spread
from .swap_plan import STAGING_SLABS, HostTier, PlanInputs, Timing

FATES = {
    HostTier.FILE: "are read from the model's file",
    HostTier.STAGED: "are copied in two steps",
    HostTier.PAGEABLE: "are copied more slowly",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosting:
    """Host memory of a plan, in bytes.

    Attributes:
        tiers: Host tier of each block; None for resident blocks.
        slab_bytes: The slabs.
        staging_bytes: The staging slabs.
        pinned_bytes: The page-locked part of both. Staging slabs are page-locked unless this is 0.
        added_bytes: What slabs and staging slabs add to memory that the system cannot drop. A slab of bytes in a file
            adds them; a slab of other bytes takes their place.
        file_bytes: What every forward reads from a file.
        reasons: Why not all blocks are page-locked, as sentences.
    """

    tiers: tuple[HostTier | None, ...]
    slab_bytes: int
    staging_bytes: int
    pinned_bytes: int
    added_bytes: int
    file_bytes: int
    reasons: tuple[str, ...] = ()

    def timing(self, inputs: PlanInputs, room_bytes: int) -> Timing:
        """The speeds of `inputs`, with that of reads. If what every forward reads fits beside the plan's additions, the
        system's cache keeps it; otherwise each forward finds little of it there, because the next byte to be read is
        the one that was read longest ago.
        """
        if inputs.disk is None:
            return inputs.timing
        is_kept = self.added_bytes + self.file_bytes <= room_bytes
        speed = inputs.disk.warm if is_kept else inputs.disk.cold
        return replace(inputs.timing, file_bytes_per_s=speed, is_staging_pinned=self.pinned_bytes > 0)


class _Block(NamedTuple):
    """What a swapped block takes: its slab, what that adds to host memory, and its bytes in a file if all are there."""

    slab_bytes: int
    added_bytes: int
    file_bytes: int | None


def choose_hosting(profile: ModelProfile, swapped: Sequence[bool], inputs: PlanInputs, *, room_bytes: int) -> Hosting:
    """As many page-locked slabs as the pin budget and `room_bytes` hold, else ordinary ones; the other blocks are read
    from their file, or go through staging slabs if they are in none. If nothing fits, the least that the blocks need.

    Blocks with a slab are spread among the swapped ones, so that the worker has time between two of the others.
    """
    blocks = {}
    for i, is_swapped in enumerate(swapped):
        if is_swapped:
            block = profile.blocks[i]
            if inputs.is_unified:  # the weights exist once, and the device's limit counts them
                blocks[i] = _Block(block.slab_host_bytes, 0, None)
            else:
                file_bytes = block.file_bytes if block.is_in_file else None
                blocks[i] = _Block(block.slab_host_bytes, block.added_host_bytes, file_bytes)
    chosen = None
    for tiers, locks in _ways(blocks, inputs):
        hosting = _hosting(swapped, blocks, tiers, locks=locks)
        if hosting.pinned_bytes <= inputs.pin_budget_bytes:
            chosen = hosting
            if hosting.added_bytes <= room_bytes:
                break
    assert chosen is not None, "one way locks nothing"
    return replace(chosen, reasons=_reasons(chosen, blocks, inputs, room_bytes))


def _ways(blocks: Mapping[int, _Block], inputs: PlanInputs) -> Iterator[tuple[dict[int, HostTier], bool]]:
    """Tiers of the swapped blocks, and whether staging slabs are page-locked: the fastest first, last the one that adds
    least to host memory.
    """
    some = [_chosen(blocks, count) for count in range(len(blocks), -1, -1)]
    may_lock = inputs.pin and inputs.overlap
    if may_lock:
        for held in some:
            yield _tiers(blocks, held, HostTier.PINNED, HostTier.STAGED), True
        # Locked staging slabs do not fit. Of slabs of all blocks, some may still be locked.
        for held in some:
            yield {i: HostTier.PINNED if i in held else HostTier.PAGEABLE for i in blocks}, True
    for held in some:
        yield _tiers(blocks, held, HostTier.PAGEABLE, HostTier.PAGEABLE), False
    if may_lock:
        yield _tiers(blocks, (), HostTier.PAGEABLE, HostTier.PAGEABLE), True


def _chosen(blocks: Mapping[int, _Block], count: int) -> set[int]:
    return {i for i, is_chosen in zip(blocks, spread(len(blocks), count), strict=True) if is_chosen}


def _tiers(
    blocks: Mapping[int, _Block], held: Collection[int], tier: HostTier, others: HostTier
) -> dict[int, HostTier]:
    """`tier` for the blocks `held`; the rest are read from their file, or get `others` if they are in none."""
    rest = {i: others if block.file_bytes is None else HostTier.FILE for i, block in blocks.items()}
    return rest | dict.fromkeys(held, tier)


def _hosting(
    swapped: Sequence[bool], blocks: Mapping[int, _Block], tiers: Mapping[int, HostTier], *, locks: bool = False
) -> Hosting:
    through = [blocks[i].slab_bytes for i, tier in tiers.items() if tier in (HostTier.FILE, HostTier.STAGED)]
    slabs = [(blocks[i], tier) for i, tier in tiers.items() if tier is not HostTier.FILE]
    staging = STAGING_SLABS * max(through, default=0)
    pinned = sum(block.slab_bytes for block, tier in slabs if tier is HostTier.PINNED)
    return Hosting(
        tiers=tuple(tiers.get(i) for i in range(len(swapped))),
        slab_bytes=sum(block.slab_bytes for block, _ in slabs),
        staging_bytes=staging,
        pinned_bytes=pinned + (staging if locks else 0),
        added_bytes=sum(block.added_bytes for block, _ in slabs) + staging,
        file_bytes=sum(blocks[i].file_bytes or 0 for i, tier in tiers.items() if tier is HostTier.FILE),
    )


def _reasons(chosen: Hosting, blocks: Mapping[int, _Block], inputs: PlanInputs, room_bytes: int) -> tuple[str, ...]:
    counts = {tier: chosen.tiers.count(tier) for tier in FATES if tier in chosen.tiers}
    if not counts:
        return ()
    reasons, short = [], []
    wanted = sum(block.slab_bytes for block in blocks.values())
    added = sum(block.added_bytes for block in blocks.values())
    if not inputs.pin:
        why = "it is not possible here" if inputs.wants_pin else "enable_dram_optimization is off"
        reasons.append(f"RAM is not locked, since {why}: copies are slower")
    elif not inputs.overlap:
        reasons.append("copying and computing take turns, so RAM is not locked")
    elif wanted > inputs.pin_budget_bytes:
        allowed = format_bytes(inputs.pin_budget_bytes)
        short.append(f"{format_bytes(wanted)} of locked RAM needed, {allowed} allowed")
    if added > room_bytes:
        available = format_bytes(inputs.host_available_bytes)
        short.append(
            f"{format_bytes(added)} of RAM needed, {format_bytes(room_bytes)} of {available} available may be taken"
        )
    if short:
        fates = (f"{count} of {len(blocks)} streaming blocks {FATES[tier]}" for tier, count in counts.items())
        reasons.append(f"{', '.join(short)}: {', '.join(fates)}")
    return tuple(reasons)
