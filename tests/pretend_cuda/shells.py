"""Random sessions of quantised weights on the pretend CUDA runtime, each compared with the unswapped model.

    python -m tests.pretend_cuda.shells FIRST LAST

For each kind of weight and each number a session is made: blocks, slots, streams, tiers, late copies and kernels, on
poisoned memory. Outputs must be equal, and so must the bytes that are copied to the device and those of the slabs; the
peak of device memory must be in the plan, nothing may be copied back or be out of order, and nothing may be left.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable
from typing import Any

from . import runtime, stress  # before torch

# isort: split
import torch
from quantised import KINDS, LAYOUTS, WIDTH, LinearBlock, ShellBlock, as_bytes, eager_alone, tensors
from toys import Model, fixed_plan
from wanvideo_enhanced_blockswap.blockswap import PinBudget, backend_for
from wanvideo_enhanced_blockswap.blockswap.device.streams import CudaStreams
from wanvideo_enhanced_blockswap.blockswap.engine.session import SwapSession
from wanvideo_enhanced_blockswap.blockswap.model.layout import align
from wanvideo_enhanced_blockswap.blockswap.model.profile import profile_model
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier

FORWARDS = 3
MEMORY_SHARE = 1.02
"""Of the planned device memory that the peak may reach, beside what the unswapped model needs for its activations."""


FREES_LATE = torch.cuda.get_allocator_backend() != "native"
"""Memory counts until the kernels before its release are done, which may be late."""


class ShellSession:
    """One session, and what it found wrong."""

    def __init__(self, kind: str, seed: int) -> None:
        self.rng = rng = random.Random(f"{kind} {seed}")
        self.is_linear = kind in LAYOUTS and rng.random() < 0.5
        self.kind, self.seed, self.count = kind, seed, rng.randint(3, 6)
        self.swapped = [True, *(rng.random() < 0.7 for _ in range(self.count - 2)), True]
        tiers = [HostTier.PINNED, HostTier.STAGED, HostTier.PAGEABLE]
        self.plan = {
            "slots": rng.randint(1, 3),
            "streams": rng.choice([1, 2, 3, 4]),
            "overlap": rng.random() < 0.9,
            "tiers": rng.choice([HostTier.PINNED, [rng.choice(tiers) for _ in range(self.count)]]),
        }
        self.late = rng.choice(["copies", "compute", "copies,compute"])
        for name, value in {"SEED": seed, "LATE": self.late, "LATE_MS": rng.choice([0.3, 1, 3]), "POISON": 1}.items():
            runtime.set_to(name, value)
        self.name = (
            f"{kind} {seed}: {'linear' if self.is_linear else 'whole'}, {self.swapped}, {self.plan}, {self.late}"
        )
        self.wrong: list[str] = []

    def model(self) -> Model:
        torch.manual_seed(self.seed)
        kind = LinearBlock if self.is_linear else ShellBlock
        return Model([kind(KINDS[self.kind]) for _ in range(self.count)])

    def check(self, what: str, *, is_so: bool) -> None:
        if not is_so:
            self.wrong.append(f"{self.name}: {what}")

    def run(self) -> None:
        """The forwards, compared with those of the unswapped model."""
        dtype = torch.bfloat16 if self.is_linear else torch.float32
        x = torch.randn(3, WIDTH, dtype=dtype, device=stress.DEVICE) / 8
        whole = self.model().to(stress.DEVICE)
        want, activations, own = measured(lambda: whole(x), above=torch.cuda.memory_allocated())
        model, untouched = self.model(), self.model()
        blocks = profile_model(model.named).profile.blocks
        slabs = sum(block.slab_bytes for block, s in zip(blocks, self.swapped, strict=True) if s)
        stored = sum(t.nbytes for b, s in zip(model.blocks, self.swapped, strict=True) if s for t in tensors(b))
        self.check(f"{slabs} bytes of {stored} stream", is_so=0.95 * stored <= slabs <= 1.2 * stored)
        found = torch.cuda.memory_allocated()
        backend = backend_for(stress.DEVICE, pin_budget=PinBudget(1 << 40))
        with SwapSession(model.named, fixed_plan(self.swapped, **self.plan), backend, root=model) as session:

            def forwards(number: int) -> list[torch.Tensor]:
                outputs = []
                for _ in range(number):
                    with session.forward():
                        outputs.append(model(x))
                session._holds.transfer.unlocked.drain()  # what is prefetched for the next forward
                return outputs

            first, first_peak, _ = measured(lambda: forwards(1), above=found)
            rest, peak, copied = measured(lambda: forwards(FORWARDS), above=found)
            outputs, peak = [*first, *rest], max(first_peak, peak)
            limit = MEMORY_SHARE * session.plan.device_bytes + activations + len(outputs) * align(want.nbytes, 512)
            self.check(f"a peak of {peak} bytes, expected {limit:.0f}", is_so=peak <= limit or FREES_LATE)
            is_copied = self.swapped.count(True) > session.plan.slots
            expected = FORWARDS * (own["h2d_bytes"] + (slabs if is_copied else 0))
            self.check(f"{copied} copied, expected {expected}", is_so=copied["h2d_bytes"] == expected)
            self.check(f"{copied} copied back", is_so=copied["d2h_bytes"] == FORWARDS * own["d2h_bytes"])
            self.check("an output differs", is_so=all(torch.equal(one, want) for one in outputs))
            self.wrong += [f"{self.name}: {what}" for what in stress.away_from_masters(session)]
            _, _, released = measured(session.release, above=found)
            self.check(f"{released} copied back at the release", is_so=released["d2h_bytes"] == 0)
        for one, other in zip(tensors(model), tensors(untouched), strict=True):
            is_as_before = one.device.type == "cpu" and torch.equal(as_bytes(one), as_bytes(other))
            self.check("a weight has changed", is_so=is_as_before)


def measured(work: Callable[[], Any], *, above: int) -> tuple[Any, int, dict[str, int]]:
    """What work returns, the peak of device memory above some bytes, and the bytes that it copies."""
    torch.cuda.synchronize()
    copied = runtime.copied_bytes()
    torch.cuda.reset_peak_memory_stats()
    result = work()
    torch.cuda.synchronize()
    now = {name: nbytes - copied[name] for name, nbytes in runtime.copied_bytes().items()}
    return result, torch.cuda.max_memory_allocated() - above, now


def one(kind: str, seed: int) -> list[str]:
    """Runs a session; returns what is wrong with it."""
    before = stress.held()
    is_inference = seed % 2 == 1 and kind not in ("ours", "nested")  # there these cannot be moved as they are
    with torch.inference_mode(mode=is_inference), torch.no_grad():
        session = ShellSession(kind, seed)
        session.run()
    name, wrong = session.name, session.wrong
    del session
    after = stress.held()
    if after != before:
        wrong.append(f"{name}: device bytes, page-locked bytes and threads were {before} and are {after}")
    return [*wrong, *(f"{name}: {what}" for what in runtime.violations()[:2])]


def warm_up() -> None:
    """Lets the kernels of some layouts bring the tables that they keep."""
    for kind in KINDS:
        for block in [ShellBlock, *([LinearBlock] if kind in LAYOUTS else [])]:
            dtype = torch.bfloat16 if block is LinearBlock else torch.float32
            block(KINDS[kind]).to(stress.DEVICE)(torch.zeros(3, WIDTH, dtype=dtype, device=stress.DEVICE))


def main(first: int, last: int) -> int:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    CudaStreams.least_chunk_bytes = 1024
    eager_alone()
    with torch.no_grad():
        warm_up()
    bad = 0
    for seed in range(first, last):
        for kind in KINDS:
            wrong = one(kind, seed)
            bad += bool(wrong)
            for line in wrong[:4]:
                print(line, flush=True)  # noqa: T201
    print(f"{(last - first) * len(KINDS)} sessions, {bad} with something wrong")  # noqa: T201
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
