"""Interrupts at every call the engine makes: the weights are true afterwards and the next forward is right."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from types import FrameType

import pytest
import torch
import wanvideo_enhanced_blockswap.blockswap as package
from test_swapper import assert_same_state, run, states, x_of
from toys import Simulation, fixed_plan, toy
from wanvideo_enhanced_blockswap.blockswap.engine.transfer import Transfer
from wanvideo_enhanced_blockswap.blockswap.errors import BlockSwapError
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier

COUNT = 4
TIERS = [HostTier.PINNED, HostTier.STAGED, HostTier.PAGEABLE, HostTier.STAGED]


class InterruptedRun:
    """Two forwards of a toy model, with an interrupt somewhere in the second, and one to see that all is well."""

    def __init__(self, *, tiers: Sequence[HostTier] | HostTier = TIERS) -> None:
        self.model, self.x = toy(COUNT), x_of()
        self.state = states(self.model)
        with torch.no_grad():
            self.truth = self.model(self.x)
        self.simulation = Simulation(streams=2, lateness=1.0)
        planner = fixed_plan([True, False, True, True], tiers=tiers, streams=2)
        self.session = self.simulation.session(self.model, planner)

    def forward(self) -> None:
        assert torch.equal(run(self.session, self.model, self.x), self.truth)

    def assert_at_masters(self) -> None:
        """By address: a slot may hold the right bytes, until the next copy."""
        store = self.session._holds.store
        for block, slab in ({} if store is None else store.slabs).items():
            masters = {view.data_ptr() for view in slab.views}
            assert {self.model.blocks[block].up.data_ptr(), self.model.blocks[block].down.data_ptr()} == masters

    def check(self) -> None:
        self.assert_at_masters()
        assert_same_state(self.model, self.state)
        assert not any(block._forward_pre_hooks for block in self.model.blocks)
        self.forward()
        self.forward()
        self.session.close()
        assert self.simulation.registrar.locked == {}
        assert self.simulation.streams.allocated_bytes == 0
        assert_same_state(self.model, self.state)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", ["start", "wait", "release", "follow", "computed"])
@pytest.mark.parametrize("first", [True, False], ids=["in the first forward", "in the second"])
def test_an_interrupt_at_any_call_of_the_transfer_is_survived(
    call: str, when: str, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(Transfer, call)
    struck = 0
    for index in itertools.count():
        case, calls = InterruptedRun(), itertools.count()
        if not first:
            case.forward()

        def interrupted(
            *arguments: object, calls: itertools.count = calls, index: int = index, **named: object
        ) -> None:
            now = next(calls) == index
            if now and when == "before":
                raise KeyboardInterrupt
            original(*arguments, **named)
            if now:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Transfer, call, interrupted)
            try:
                case.forward()
                break
            except KeyboardInterrupt:
                struck += 1
        case.check()
    assert struck > 0


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


class Striking:
    """Raises at the n-th line that runs in the given functions of the package's core.

    A trace function can raise behind the last statement of a `with` block and before its `__exit__`, where no signal
    can. What such a block has switched off in torch is switched on again afterwards, for the tests that follow.
    """

    def __init__(self, n: int, functions: set[str]) -> None:
        self.left = n
        self.functions = functions
        self.where = ""
        self._folder = os.path.dirname(package.__file__)

    def __enter__(self) -> Striking:
        self._torch_functions = torch._C._get_torch_function_state()
        sys.settrace(self._call)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.settrace(None)
        torch._C._set_torch_function_state(self._torch_functions)

    def _call(self, frame: FrameType, event: str, argument: object) -> object:
        code = frame.f_code
        ours = code.co_filename.startswith(self._folder) and code.co_name in self.functions
        return self._line if ours else None

    def _line(self, frame: FrameType, event: str, argument: object) -> object:
        if event == "line" and not self.where:
            if self.left == 0:
                self.where = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
                raise KeyboardInterrupt
            self.left -= 1
        return self._line


@pytest.mark.skipif(sys.gettrace() is not None, reason="another tracer runs")
@pytest.mark.parametrize(
    "functions",
    [
        {"enter", "_finish", "_apply", "bind", "was_edited", "is_unchanged"},
        {"start", "wait", "release", "follow", "_copy_chunks", "_follow", "_await_worker"},
        {"leave", "_release", "_fill", "runs", "ends"},
        {"abort", "reset", "_drain_to_compute"},
    ],
    ids=["swapper", "transfer", "ring", "clean-up"],
)
def test_an_interrupt_at_any_line_of_a_forward_is_survived(functions: set[str]) -> None:
    failed = {}
    struck = 0
    for n in itertools.count():
        case = InterruptedRun(tiers=HostTier.PINNED)
        case.forward()
        if "abort" in functions:  # the clean-up runs only behind an exception
            case.model.blocks[2].register_forward_hook(lambda *_: 1 / 0)
        striking = Striking(n, functions)
        try:
            with striking:
                case.forward()
        except (KeyboardInterrupt, ZeroDivisionError):
            struck += 1
        case.model.blocks[2]._forward_hooks.clear()
        if not striking.where:
            break
        try:
            case.check()
        except (AssertionError, BlockSwapError, RuntimeError) as error:
            failed.setdefault(striking.where, first_line(error))
    assert struck > 0
    assert not failed, failed


def test_an_interrupt_at_any_line_of_adopt_leaves_true_weights_and_a_second_try_works() -> None:
    functions = {"_open", "start", "_place_block", "_fill_slab", "_place_resident", "wait_for", "_binding", "_complete"}
    functions |= {"put", "fill", "prefetch"}
    failed = {}
    for n in itertools.count():
        case, striking = InterruptedRun(tiers=HostTier.PINNED), Striking(n, functions)
        try:
            with striking:
                case.session.adopt()
        except KeyboardInterrupt:
            pass
        if not striking.where:
            case.session.close()
            break
        try:
            assert case.simulation.registrar.locked == {}
            case.check()
        except (AssertionError, BlockSwapError, RuntimeError) as error:
            failed.setdefault(striking.where, first_line(error))
    assert n > 20
    assert not failed, failed


@pytest.mark.parametrize("call", ["close", "open_window"])
def test_an_interrupt_while_replaced_weights_are_placed_again_is_survived(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = InterruptedRun()
    case.forward()
    block = case.model.blocks[2]
    block.up = torch.nn.Parameter(block.up.clone(), requires_grad=False)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Transfer, call, interrupted)
        with pytest.raises(KeyboardInterrupt):
            case.forward()
    if call == "open_window":
        case.check()
    else:  # what was never given up is lost to this session, and no more than that
        assert_same_state(case.model, case.state)
        case.forward()
