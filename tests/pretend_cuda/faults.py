"""Every call of the runtime that a session makes fails once, with each of some codes.

    python -m tests.pretend_cuda.faults [--every N] [--of FUNCTION] [--code CODE]

The result must be right or the error ours, every parameter at its master, nothing page-locked or allocated; the next
session must be right. After an error that stays until the process ends, the message says so, and the next session is
that of a new process. Prints what is wrong; returns 1 if anything is.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from . import runtime  # before torch

sys.path[:0] = [str(Path(__file__).parents[1])]
import torch  # noqa: E402
from toys import Block, Model, fixed_plan  # noqa: E402
from wanvideo_enhanced_blockswap.blockswap import (  # noqa: E402
    PinBudget,
    SwapRun,
    SwapSettings,
    Workload,
    backend_for,
)
from wanvideo_enhanced_blockswap.blockswap.device.backend import Backend  # noqa: E402
from wanvideo_enhanced_blockswap.blockswap.engine.session import SessionState, SwapSession  # noqa: E402
from wanvideo_enhanced_blockswap.blockswap.errors import BlockSwapError  # noqa: E402
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier  # noqa: E402
from wanvideo_enhanced_blockswap.blockswap.run.machine import TorchMachine  # noqa: E402
from wanvideo_enhanced_blockswap.hardware import HardwareUnavailableError  # noqa: E402

from .stress import away_from_masters  # noqa: E402

DEVICE = torch.device("cuda", 0)
CODES = (1, 2, 700, 712, 713, 719, 801, 900)
STICKY = (700, 719)
"""After these every call fails until the process ends."""

SWAPPED = [True, True, False, True, True]
TIERS = [HostTier.PINNED, HostTier.STAGED, HostTier.PINNED, HostTier.PAGEABLE, HostTier.STAGED]
PLANNER = fixed_plan(SWAPPED, tiers=TIERS, streams=2)


class Machine(TorchMachine):
    """This one, whose link is not measured: that would take seconds each time."""

    def link(self) -> None:
        return None


class Case:
    """One model, and what a run of it leaves."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        # Slots of more than a megabyte: for less, torch does not ask the driver each time.
        self.model = Model([Block(64, 2400) for _ in SWAPPED])
        self.kept = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.x = torch.randn(2, 64, device=DEVICE)
        self.model.to(DEVICE)
        self.want = self.model(self.x)
        self.model.to("cpu")
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # so that the run asks the driver for memory
        self.wrong: list[str] = []
        self.failures: list[BaseException] = []
        self.outputs: list[torch.Tensor] = []

    def backend(self) -> Backend:
        return backend_for(DEVICE, pin_budget=PinBudget(1 << 40))

    def run(self) -> None:
        """All that a session does. What fails is kept, and the run goes on as a caller's would."""
        with self.keeping():
            session = SwapSession(self.model.named, PLANNER, self.backend(), root=self.model, traced=(1,))
            self.forward(session)
            self.forward(session)
            with self.keeping():
                session.release()
            if session.state is SessionState.IDLE:
                with self.keeping():
                    session.unlock()
            self.forward(session)
            with self.keeping():
                session.trace.spans() if session.trace else None
            with self.keeping():
                session.close()
            self.expect(session.state is SessionState.CLOSED, "the session is not closed")
        self.planned_run()

    def planned_run(self) -> None:
        """A run, which also reads the machine."""
        settings = SwapSettings(auto_hardware_tuning=False, blocks_to_swap=2)
        with self.keeping():
            run = SwapRun(self.model.named, settings, Machine(DEVICE), self.backend(), root=self.model)
            for _ in range(2):
                with self.keeping(), run.forward(Workload(tokens=64)):
                    y = self.model(self.x)
                    self.outputs.append(y)
            with self.keeping():
                run.release()
            with self.keeping():
                run.close()

    def run_once(self) -> None:
        """A session of one forward."""
        with self.keeping(), SwapSession(self.model.named, PLANNER, self.backend(), root=self.model) as session:
            self.forward(session)

    def forward(self, session: SwapSession) -> None:
        with self.keeping(), session.forward():
            y = self.model(self.x)
            self.outputs.append(y)
        self.wrong += away_from_masters(session)
        self.expect(session.state is not SessionState.RUNNING, "a forward has not ended")

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        try:
            yield
        except Exception as failure:  # noqa: BLE001 - judged by `judge_failures`
            self.failures.append(failure)

    def expect(self, is_so: bool, otherwise: str) -> None:
        if not is_so:
            self.wrong.append(otherwise)

    def judge(self, code: int) -> None:
        """What the run gave and left of the model."""
        for failure in self.failures:
            if not isinstance(failure, BlockSwapError | HardwareUnavailableError):
                self.expect(is_the_models(failure), f"not our error: {type(failure).__name__} {place(failure)}")
            elif code in STICKY and isinstance(failure, BlockSwapError) and is_driver_error(failure):
                self.expect(
                    "until" in str(failure) and "restart" in str(failure), f"does not tell that it stays: {failure}"
                )
        for y in self.outputs if code not in STICKY else []:
            self.expect(torch.equal(y, self.want), "an output differs")
        for name, tensor in self.model.state_dict().items():
            self.expect(
                tensor.device.type == "cpu" and torch.equal(tensor.cpu(), self.kept[name]), f"{name} is not as it was"
            )


def is_driver_error(failure: BaseException) -> bool:
    return any(hasattr(one, "error_code") for one in (failure, failure.__cause__))


def is_the_models(failure: BaseException) -> bool:
    """Whether it comes from a kernel that the model itself queued: it passes through as it is."""
    files = [frame.filename for frame in traceback.extract_tb(failure.__traceback__)]
    return Path([file for file in files if "/torch/" not in file][-1]).stem == "toys"


def place(failure: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(failure.__traceback__) if "/torch/" not in frame.filename]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-4:]))


def held() -> tuple[int, int]:
    gc.collect()
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(), threading.active_count()


def strike(function: str, at: int, code: int) -> list[str]:
    """One run in which a call fails, and one after it; what is wrong."""
    runtime.set_to("LATE", "")
    before, locked = held(), runtime.locked_bytes()
    case = Case()
    runtime.fail(function, code, calls=at)
    case.run()
    runtime.fail(function, -1)
    left = runtime.locked_bytes() - locked
    if code in STICKY:
        runtime.restart()
    elif function != "cudaHostUnregister":  # where the driver does not unlock, nobody can
        case.expect(left == 0, f"{left} bytes stay page-locked")
    with case.keeping():
        torch.zeros(1, device=DEVICE)
        torch.cuda.synchronize()
    case.judge(code)
    told = " | ".join(dict.fromkeys(f"{type(one).__name__}: {str(one).splitlines()[0][:110]}" for one in case.failures))
    wrong = case.wrong
    case.failures, case.wrong, case.outputs = [], [], []
    runtime.restart()
    case.run_once()
    case.judge(0)
    wrong += [f"in the next session: {what}" for what in [*case.wrong, *map(repr, case.failures)]]
    wrong += runtime.violations()[:2]
    del case
    after = held()
    if after != before:
        wrong.append(f"device bytes and threads were {before} and are {after}")
    return [f"{function} #{at} with {code}: {what} [{told}]" for what in dict.fromkeys(wrong)]


def calls_of_a_run() -> dict[str, int]:
    """How often a run calls each function of the runtime."""
    case = Case()
    before = runtime.calls()
    case.run()
    after = runtime.calls()
    case.judge(0)
    assert not case.wrong, case.wrong
    assert not case.failures, case.failures
    counts = {name: count - before.get(name, 0) for name, count in after.items() if not name.startswith("kernel ")}
    return {name: count for name, count in counts.items() if count}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tests.pretend_cuda.faults", description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="every Nth of all faults only")
    parser.add_argument("--of", help="a function of the runtime, instead of all")
    parser.add_argument("--code", type=int, help="a code, instead of all")
    options = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    runtime.set_to("POISON", 1)
    with torch.inference_mode():
        Case().run()  # what torch does once
        gc.collect()
        gc.freeze()  # or each collection would look through all that torch has imported
        counts = calls_of_a_run()
        functions = [options.of] if options.of else sorted(counts)
        codes = [options.code] if options.code else CODES
        faults = [(name, at, code) for name in functions for at in range(counts[name]) for code in codes]
        faults = faults[:: options.every]
        bad: Counter[str] = Counter()
        for fault in faults:
            wrong = strike(*fault)
            bad[fault[0]] += bool(wrong)
            for line in wrong[:3]:
                print(line, flush=True)  # noqa: T201
    print(f"{len(faults)} faults at {counts}; wrong: {dict(+bad) or 'nothing'}")  # noqa: T201
    return int(bool(+bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
