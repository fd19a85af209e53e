"""Random sessions on the pretend CUDA runtime, each compared with the unswapped model.

    python -m tests.pretend_cuda.stress FIRST LAST [--until-wrong]

A session is made from its number: sizes, tiers, slots, streams, an order of blocks, whether the weights are in a file,
how much RAM there is room for, when copies and kernels are late, and a trouble. Afterwards outputs must be equal, every
parameter at its master, nothing page-locked or allocated, and nothing may have been out of order. Prints what is wrong;
returns 1 if anything is.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from . import runtime  # before torch

sys.path[:0] = [str(Path(__file__).parents[1])]
import torch  # noqa: E402
from on_disk import stored  # noqa: E402
from torch import nn  # noqa: E402
from toys import Block, Model, fixed_plan  # noqa: E402
from wanvideo_enhanced_blockswap.blockswap import PinBudget, backend_for  # noqa: E402
from wanvideo_enhanced_blockswap.blockswap.device import worker  # noqa: E402
from wanvideo_enhanced_blockswap.blockswap.device.streams import CudaStreams  # noqa: E402
from wanvideo_enhanced_blockswap.blockswap.engine.session import SessionState, SwapSession  # noqa: E402
from wanvideo_enhanced_blockswap.blockswap.engine.trace import EVERY_FORWARD  # noqa: E402
from wanvideo_enhanced_blockswap.blockswap.errors import BlockSwapError  # noqa: E402
from wanvideo_enhanced_blockswap.blockswap.model.tensors import has_own_storage  # noqa: E402
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier  # noqa: E402

CudaStreams.least_chunk_bytes = 4096  # the small slabs of these models are cut for several streams too
DEVICE = torch.device("cuda", 0)
TROUBLES = ("none", "none", "exception", "interrupt", "close inside", "replaced", "no lock", "few locks", "no memory")
BARE_MODELS = 0.25
ON_DISK = 0.5
SHORT_OF_RAM = 0.2
OTHER_STREAM = 0.3
"""Share of forwards, and of releases, that change the stream."""


class Large(nn.Module):
    """A block with buffers, biases and a norm: many tensors, of which some are small."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.register_buffer("table", torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x)))) * torch.sigmoid(self.table)


class Bare(nn.Module):
    """A block of one matrix: nothing of it is copied at the adopt, so that the host waits for nothing there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(width, 20 * width) / width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (x @ self.matrix).view(len(x), x.shape[1], 20).sum(dim=2)


class StruckError(Exception):
    """What a block of a foreign model raises."""


def held() -> tuple[int, int, int]:
    """Device bytes, page-locked bytes, threads."""
    gc.collect()
    gc.collect()  # a tensor in a cycle may take two
    torch.cuda.synchronize()
    return (
        torch.cuda.memory_allocated(),
        runtime.locked_bytes(),
        threading.active_count() + len(worker.running & sys._current_frames().keys()),
    )


def away_from_masters(session: SwapSession) -> list[str]:
    """Blocks with a tensor that points elsewhere than at its master, by address: a slot may hold the right bytes."""
    swapper = session._holds.swapper
    bindings = {} if swapper is None else swapper._blocks
    return [
        f"block {block} is not at its masters"
        for block, binding in bindings.items()
        for tensor, master in zip(binding.streamed, binding.masters, strict=True)
        if has_own_storage(tensor) and tensor.data_ptr() != master.data_ptr()
    ]


def on_unswapped(model: Model, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What the model computes on the device, which it leaves again."""
    model.to(DEVICE)
    y = run()
    model.to("cpu")
    torch.cuda.synchronize()
    return y


@contextlib.contextmanager
def interrupted(seconds: float) -> Iterator[None]:
    """A KeyboardInterrupt after some time, where Python lets a signal in."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class RandomSession:
    """One session, and what it found wrong."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        torch.manual_seed(seed)
        self.trouble = rng.choice(TROUBLES)
        # Where memory is to run out, slots are larger than what torch keeps in hand.
        count, width = rng.randint(1, 8), 256 if self.trouble == "no memory" else rng.choice([32, 64])
        hidden, dtype = [64, 600, 1500], rng.choice([torch.float32, torch.bfloat16])
        is_bare = rng.random() < BARE_MODELS
        blocks: list[nn.Module] = [
            Bare(width) if is_bare else Large(width) if rng.random() < 0.4 else Block(width, rng.choice(hidden), dtype)
            for _ in range(count)
        ]
        self.model = Model(blocks).requires_grad_(False)
        self.kept = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.folder = tempfile.TemporaryDirectory() if rng.random() < ON_DISK else None
        if self.folder is not None:
            stored(self.model, Path(self.folder.name) / "weights.safetensors")
        self.swapped = [is_bare or rng.random() < 0.8 for _ in range(count)]
        tiers = list(HostTier)
        self.plan = {
            "slots": rng.randint(1, 4),
            "streams": rng.choice([1, 1, 2, 3, 4, 8, 16]),
            "overlap": rng.random() < 0.9,
            "tiers": [rng.choice(tiers) for _ in range(count)] if rng.random() < 0.5 else rng.choice(tiers),
        }
        settings = {
            "SEED": seed,
            "LATE": rng.choice(["", "copies", "compute", "copies,compute"]),
            "LATE_MS": rng.choice([0.3, 1, 3]),
            "POISON": int(rng.random() < 0.8),
            "COPY_GBPS": rng.choice([0, 0, 2, 0.5]),
            "PAGEABLE_WAITS": int(rng.random() < 0.3),
        }
        for name, value in settings.items():
            runtime.set_to(name, value)
        self.name = (
            f"session {seed} of {count} blocks, {self.plan}, {settings['LATE'] or 'nothing'} late, {self.trouble}"
        )
        self.runs = [list(range(count))]
        self.runs += [[rng.randrange(count) for _ in range(rng.randint(1, 12))] for _ in range(2)]
        self.x = torch.randn(3, width, device=DEVICE)
        self.wants = [on_unswapped(self.model, lambda run=run: self.model(self.x, run)) for run in self.runs]
        self.wants_alone = [on_unswapped(self.model, lambda b=b: self.model(self.x, [b])) for b in range(count)]
        self.wrong: list[str] = []
        self.outputs: list[tuple[int, torch.Tensor]] = []
        self.alone: list[tuple[int, torch.Tensor]] = []
        self.troubled = 0
        self.seconds = 0.0
        self.other = torch.cuda.Stream()

    def run(self) -> None:
        """Forwards of a session, on the default stream or another; then its end."""
        rng = self.rng
        stream = torch.cuda.Stream() if rng.random() < 0.3 else torch.cuda.current_stream()
        budget = PinBudget(100_000 if self.trouble == "few locks" else 1 << 40)
        traced = EVERY_FORWARD if rng.random() < 0.2 else None
        planner = fixed_plan(self.swapped, **self.plan)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            backend = backend_for(DEVICE, pin_budget=budget)
            if rng.random() < SHORT_OF_RAM:
                rooms = rng.randint(0, len(self.swapped))
                backend = replace(backend, host_room=lambda: (rooms - len(session.tiers)) << 30)
            session = SwapSession(self.model.named, planner, backend, root=self.model, traced=traced)
            session.checks = rng.random() < 0.1
            if self.trouble == "no lock":  # each is tried twice
                calls = rng.randint(0, 2 * len(self.swapped))
                runtime.fail("cudaHostRegister", rng.choice([1, 2, 801]), calls=calls)
            for number in range(rng.randint(2, 5)):
                self.forward(session, number)
                if session.state is SessionState.CLOSED:
                    break
                self.wrong += away_from_masters(session)
                if rng.random() < 0.4:
                    with torch.cuda.stream(self.other if rng.random() < OTHER_STREAM else stream):
                        session.release()
                if rng.random() < 0.1 and session.state is SessionState.IDLE:
                    session.unlock()
            with torch.cuda.stream(self.other if rng.random() < OTHER_STREAM else stream):
                session.close()
        torch.cuda.synchronize()

    def forward(self, session: SwapSession, number: int) -> None:
        """One forward; the second one is in trouble."""
        which = self.rng.randrange(len(self.runs)) if number else 0
        trouble = self.trouble if number == 1 else "none"
        strike = self.rng.randrange(len(self.runs[which]))
        side = self.rng.randrange(len(self.runs[which])) if self.rng.random() < OTHER_STREAM else -1
        if self.rng.random() < 0.5:  # kernels that have memory in hand which the session is given next
            torch.zeros(1 << 18, device=DEVICE).add_(1)
        if trouble == "no memory":
            session.release()
        soon = self.rng.uniform(1e-5, self.seconds / 2) if trouble == "interrupt" else 0
        limits = {"interrupt": lambda: interrupted(soon), "no memory": self.little_memory}
        began = time.perf_counter()
        try:
            with limits.get(trouble, contextlib.nullcontext)(), session.forward():
                y = self.x
                for at, block in enumerate(self.runs[which]):
                    if at == strike:
                        self.strike(trouble, session, block)
                    if at == side:
                        self.beside(self.rng.randrange(len(self.swapped)))
                    y = self.model.blocks[block](y)
            self.outputs.append((which, y))
        except (StruckError, KeyboardInterrupt, BlockSwapError, torch.OutOfMemoryError) as failure:
            self.troubled += 1
            if trouble == "none" or (isinstance(failure, BlockSwapError) and trouble != "no memory"):
                self.wrong.append(f"{type(failure).__name__}: {failure}")
        self.seconds = time.perf_counter() - began

    def strike(self, trouble: str, session: SwapSession, block: int) -> None:
        if trouble == "replaced":
            self.model.blocks[block].to(DEVICE)
        if trouble == "close inside":
            session.close()
        if trouble in ("exception", "close inside"):
            raise StruckError

    def beside(self, block: int) -> None:
        """A block that runs on another stream, which nobody but the engine orders with this one."""
        with torch.cuda.stream(self.other):
            self.alone.append((block, self.model.blocks[block](self.x)))

    @contextlib.contextmanager
    def little_memory(self) -> Iterator[None]:
        """The device has little left."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        runtime.set_to("VRAM", total - free + self.rng.uniform(0, 50e6))
        try:
            yield
        finally:
            runtime.set_to("VRAM", total)

    def judge(self) -> None:
        """Outputs and weights are those of the unswapped model."""
        for which, y in self.outputs:
            if not torch.equal(y, self.wants[which]):
                self.wrong.append(f"an output differs, {int(y.isnan().sum())} of {y.numel()} are NaN")
        for block, y in self.alone:
            if not torch.equal(y, self.wants_alone[block]):
                self.wrong.append(f"the output of block {block} on another stream differs")
        for name, tensor in self.model.state_dict().items():
            if self.trouble != "replaced" and tensor.device.type != "cpu":
                self.wrong.append(f"{name} is on {tensor.device}")
            if not torch.equal(tensor.cpu(), self.kept[name]):
                self.wrong.append(f"{name} has changed")


def one(seed: int) -> tuple[str, list[str]]:
    """Runs a session; returns what cut it short, and what is wrong with it."""
    before = held()
    with torch.inference_mode():
        session = RandomSession(seed)
        session.run()
        runtime.fail("cudaHostRegister", -1)  # a refusal that was not reached
        session.judge()
    name, trouble, troubled, wrong = session.name, session.trouble, session.troubled, session.wrong
    del session
    after = held()
    if after != before:
        wrong.append(f"device bytes, page-locked bytes and threads were {before} and are {after}")
    return (trouble if troubled else "none"), [f"{name}: {what}" for what in [*wrong, *runtime.violations()[:2]]]


def main(first: int, last: int, *, until_wrong: bool = False) -> int:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    struck: Counter[str] = Counter()
    bad = 0
    for seed in range(first, last):
        trouble, wrong = one(seed)
        if seed == first:
            gc.freeze()  # or each collection would look through all that torch has imported
        struck[trouble] += 1
        bad += bool(wrong)
        for line in wrong[:4]:
            print(line, flush=True)  # noqa: T201
        if wrong and until_wrong:
            break
    print(f"{sum(struck.values())} sessions, {bad} with something wrong; cut short by {dict(struck)}")  # noqa: T201
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), until_wrong="--until-wrong" in sys.argv))
