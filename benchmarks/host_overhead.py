"""Host time that swapping adds to a block of 25 tensors: hooks, ring, activation, copy calls and release together.

    python -m benchmarks.host_overhead [--turns N] [--json]

The same model runs unswapped and swapped in turn, and the difference per swapped block is reported: CPU time of the
host thread, the median over the forwards of a round, in the fastest of several rounds, because other programs and a
virtual machine's host only add time (as in timeit). Tensors are tiny, so the copies take no time: on a GPU the figure
is the time until everything is queued, elsewhere that of the same Python code with copies in place. A block does no
arithmetic.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from torch import nn
from wanvideo_enhanced_blockswap.blockswap import PinBudget, backend_for
from wanvideo_enhanced_blockswap.blockswap.engine.session import SwapSession
from wanvideo_enhanced_blockswap.blockswap.model.layout import ModelProfile
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier, SwapPlan
from wanvideo_enhanced_blockswap.hardware import probe_device

BLOCKS = 40
TENSORS = 25
TURNS = 6
ROUNDS = 10
FORWARDS = 40


class PackedParameter(nn.Parameter):
    """A parameter whose subclass intercepts every torch function, as GGUF loaders make them."""

    def __new__(cls, data: torch.Tensor) -> PackedParameter:
        packed = torch.Tensor._make_subclass(cls, data, require_grad=False)
        packed.quant_type = 2  # type: ignore[attr-defined]
        return packed

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN206
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


class Block(nn.Module):
    """25 streamed tensors and a forward that reads none of them."""

    def __init__(self, *, packed: bool) -> None:
        super().__init__()
        for i in range(TENSORS):
            data = torch.zeros(64)
            parameter = PackedParameter(data) if packed else nn.Parameter(data, requires_grad=False)
            self.register_parameter(f"weight{i}", parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Nothing."""
        return x


def plan_all(profile: ModelProfile, *, overlap: bool) -> SwapPlan:
    """Every block swapped through two slots, on one copy stream."""
    count = len(profile.blocks)
    return SwapPlan(
        swapped=(True,) * count,
        slots=2,
        slot_bytes=profile.slot_bytes(range(count)),
        streams=1,
        overlap=overlap,
        tiers=(HostTier.PINNED if overlap else HostTier.PAGEABLE,) * count,
        device_bytes=0,
        budget_bytes=0,
        activation_bytes=None,
        limit_bytes=0,
        slab_bytes=0,
        pinned_bytes=0,
        staging_bytes=0,
        streamed_bytes=0,
        predicted=None,
        over_ceiling=False,
        reasons=(),
    )


def measure(device: torch.device, *, packed: bool) -> float:
    """Microseconds that swapping adds per block and forward."""
    plain = [Block(packed=packed) for _ in range(BLOCKS)]
    swapped = [Block(packed=packed) for _ in range(BLOCKS)]
    named = [(f"blocks.{i}", block) for i, block in enumerate(swapped)]
    backend = backend_for(device, pin_budget=PinBudget(1 << 30))
    x = torch.zeros(1, device=device)
    added = []

    def run(blocks: Sequence[nn.Module]) -> None:
        for block in blocks:
            block(x)

    with (
        torch.inference_mode(),
        SwapSession(named, lambda profile, held: plan_all(profile, overlap=device.type == "cuda"), backend) as session,
    ):
        for _ in range(ROUNDS * FORWARDS):
            begin = time.thread_time()
            run(plain)
            middle = time.thread_time()
            with session.forward():
                run(swapped)
            added.append((time.thread_time() - middle) - (middle - begin))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        moved = session.counters.onloads
    assert moved >= BLOCKS * (ROUNDS * FORWARDS - 1), f"only {moved} onloads: this did not swap"
    rounds = [statistics.median(added[i : i + FORWARDS]) for i in range(0, len(added), FORWARDS)]
    return min(rounds) / BLOCKS * 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the figures."""
    parser = argparse.ArgumentParser(prog="benchmarks.host_overhead", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--turns", type=int, default=TURNS, help="number of measurements; the fastest is reported")
    options = parser.parse_args(arguments)
    if options.turns < 1:
        parser.error(f"--turns: expected 1 or more, got {options.turns}")
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # In turns, so that a busy second of the machine affects both kinds.
    turns = [[measure(device, packed=packed) for packed in (False, True)] for _ in range(options.turns)]
    plain, packed = (min(kind) for kind in zip(*turns, strict=True))
    result = {
        "us_per_block": round(max(plain, packed), 2),
        "us_per_block_plain": round(plain, 2),
        "us_per_block_gguf_like": round(packed, 2),
        "tensors_per_block": TENSORS,
        "device": str(device),
        "machine": probe_device(torch.device("cpu")).name,
        "torch": torch.__version__,
    }
    if options.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name}: {value}" for name, value in result.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
