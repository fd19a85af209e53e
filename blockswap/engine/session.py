"""SwapSession: one transformer's life with swapped blocks: adopt, run, release; close."""

from __future__ import annotations

import contextlib
import logging
import sys
import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from enum import Enum

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..device.backend import Backend
from ..device.failures import translate_device_errors
from ..errors import BlockSwapError, UnsupportedModelError
from ..host.slabs import HostStore, Slab
from ..host.staging import Staging
from ..model.layout import ModelProfile
from ..model.profile import ProfiledModel, profile_model, refuse_grad
from ..plan.swap_plan import HeldMemory, HostTier, SwapPlan
from ..spans import FORWARD
from .swapper import BlockSwapper, Listeners
from .trace import Trace
from .transfer import Counters, Transfer

logger = logging.getLogger(__name__)

Planner = Callable[[ModelProfile, HeldMemory], SwapPlan]
"""Makes the plan at each adopt, from the blocks of that moment and from what is held of them already."""

EVERY_FORWARD = range(sys.maxsize)
"""For `traced`."""


class SessionState(Enum):
    """Where a session is in its life."""

    IDLE = "idle"
    """From the start, or a release, until the next adopt: the session holds no device memory."""
    ADOPTED = "adopted"
    """From adopt until a forward begins, and between forwards."""
    RUNNING = "running"
    """From the start of a forward until its end."""
    CLOSED = "closed"
    """From close on: nothing is left registered, and the weights are ordinary host memory."""


class SwapSession:
    """Runs a list of blocks that is larger than its device.

        with SwapSession(blocks, planner, backend) as session:
            for step in steps:
                with session.forward():
                    model(...)

    Inside `forward()` the blocks may be called in any order, some, several times or not at all. Between forwards every
    parameter points at its true bytes, on the host or at its resident copy. The session leaves the rest of the model
    alone.

    Args:
        blocks: Name and module of each block, in execution order.
        planner: Makes the plan.
        backend: The device and what it offers.
        root: The whole model, for the bytes outside the blocks; held weakly. None if there is nothing else.
        traced: Numbers of the forwards, from 0 at each adopt and without those that ran no block, of which compute,
            stall and copies are recorded; of the others only how long they take. None records nothing.
        listeners: Called during an adopt.

    Attributes:
        state: Where the session is in its life.
        plan: The plan of the last adopt; None before the first.
        log: Counts and times the forwards.
        counters: What has been copied since the session was made.
        adoptions: How often blocks were placed.
        listeners: Notified while blocks are placed.
        checks: Each slot is compared with its slab before a block uses it; read at the start of each forward.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[str, nn.Module]],
        planner: Planner,
        backend: Backend,
        *,
        root: nn.Module | None = None,
        traced: Container[int] | None = None,
        listeners: Listeners | None = None,
    ) -> None:
        self._named = tuple(blocks)
        self._root = None if root is None else weakref.ref(root)
        self._planner = planner
        self._backend = backend
        self._holds = Holdings()
        weakref.finalize(self, self._holds.drop)
        self._handles: list[RemovableHandle] = []
        enter = weakref.WeakMethod(self.enter)
        self._hooks = [block_hook(self._holds, enter, index) for index in range(len(self._named))]
        self.state = SessionState.IDLE
        self.plan: SwapPlan | None = None
        self.log = ForwardLog(traced)
        self.counters = Counters()
        self.adoptions = 0
        self.listeners = listeners or Listeners()
        self.checks = False

    def __enter__(self) -> SwapSession:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def trace(self) -> Trace | None:
        """What happened when, since the last adopt; None if nothing is traced, or before the first."""
        return self.log.trace

    @property
    def device_bytes(self) -> int:
        """Device memory of residents, small tensors and window now."""
        return 0 if self._holds.swapper is None or self.plan is None else self.plan.device_bytes

    @property
    def slab_bytes(self) -> int:
        """Host memory that holds the streamed tensors of the swapped blocks now."""
        return sum(slab.pages.size for slab in self._holds.slabs.values())

    @property
    def staging_bytes(self) -> int:
        """Host memory of the staging slabs now."""
        return self._holds.staging_bytes

    @property
    def pinned_bytes(self) -> int:
        """Host memory that this session has page-locked now: slabs, and staging, which exists only page-locked."""
        locked = [slab.pages.size for slab in self._holds.slabs.values() if slab.pages.is_pinned]
        return sum(locked) + self._holds.staging_bytes

    @property
    def held(self) -> HeldMemory:
        """What the session holds now."""
        return HeldMemory(self.device_bytes, self.slab_bytes, self.staging_bytes, self.pinned_bytes)

    @property
    def tiers(self) -> dict[int, HostTier]:
        """The tier of each swapped block's slab now; below the planned one where page-locking was refused."""
        return {block: slab.tier for block, slab in self._holds.slabs.items()}

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why slabs could not be page-locked as planned."""
        return () if self._holds.store is None else tuple(self._holds.store.refusals)

    # ------------------------------------------------------------------------------------------------- adopt, release

    @translate_device_errors("blocks were being placed")
    def adopt(self) -> SwapPlan:
        """Profiles, plans, and places the blocks.

        Raises:
            UnsupportedModelError: The blocks cannot be swapped.
            PlanError: No plan fits.
            HostMemoryError: The host refused memory.
            DeviceMemoryError: The device refused memory. In each case the weights are where they were, or in ordinary
                host memory, and nothing is left registered.
        """
        self._expect("adopt", SessionState.IDLE)
        model = profile_model(self._named, root=None if self._root is None else self._root())
        plan = self._planner(model.profile, self.held)
        try:
            self._open(model, plan)
            self.plan = plan
            self.adoptions += 1
            self.state = SessionState.ADOPTED
        except BaseException:
            self.state = SessionState.IDLE
            self._holds.drop()
            raise
        logger.info("swapping %d of %d blocks: %s", plan.swapped_count, len(plan.swapped), "; ".join(plan.reasons))
        return plan

    def _open(self, model: ProfiledModel, plan: SwapPlan) -> None:
        holds, backend = self._holds, self._backend
        streams = backend.open_streams(plan.streams, plan.overlap)
        if holds.store is None:
            holds.store = HostStore(streams, backend.registrar, backend.pin_budget)
        holds.store.use(streams)
        transfer = holds.transfer = Transfer(streams, self.counters)
        swapper = holds.swapper = BlockSwapper(model, plan, holds.store, transfer, self.listeners)
        staging = holds.store.make_staging()
        if staging:
            transfer.staging = Staging(streams, staging, backend.make_worker(streams))
        self.log.start(transfer)
        swapper.prefetch()

    @translate_device_errors("device memory was being given back")
    def release(self) -> None:
        """Every tensor points at its master, and the device memory is free at once. Slabs stay for the next adopt."""
        self._expect("release", SessionState.IDLE, SessionState.ADOPTED)
        try:
            self._holds.drop_device()
        finally:
            self.state = SessionState.IDLE

    @translate_device_errors("host memory was being unlocked")
    def unlock(self) -> None:
        """No slab is page-locked any more; they stay, and are locked again at the next adopt."""
        self._expect("unlock", SessionState.IDLE)
        if self._holds.store is not None:
            self._holds.store.unlock()

    @translate_device_errors("host memory was being given up")
    def give_up_slabs(self) -> None:
        """No slab is kept for the next run; weights that are nowhere else stay, in ordinary memory."""
        self._expect("give_up_slabs", SessionState.IDLE)
        self._holds.drop()

    @translate_device_errors("a session was being closed")
    def close(self) -> None:
        """Releases, unlocks the slabs and ends; idempotent. Weights stay in ordinary host memory."""
        try:
            self._end(finished=False)
        finally:
            try:
                self._holds.drop()
            finally:
                self.state = SessionState.CLOSED

    def _expect(self, what: str, *states: SessionState) -> None:
        if self.state not in states:
            expected = " or ".join(state.value for state in states)
            raise BlockSwapError(f"{what} needs a session that is {expected}, this one is {self.state.value}")

    # -------------------------------------------------------------------------------------------------------- forward

    @contextlib.contextmanager
    def forward(self, blocks: Sequence[nn.Module] | None = None) -> Iterator[None]:
        """One forward of the model; adopts before the first.

        Args:
            blocks: The modules that will be called, where they are others than the session was made with (compiling
                wraps each block anew). They are hooked for this forward only.
        """
        modules = [module for _, module in self._named] if blocks is None else blocks
        if len(modules) != len(self._named):
            raise UnsupportedModelError(
                f"the session was made with {len(self._named)} blocks, the forward has {len(modules)}; "
                "make a new session for another model"
            )
        self._expect("forward", SessionState.IDLE, SessionState.ADOPTED)
        if torch.is_grad_enabled():
            refuse_grad(self._named)
        if self.state is SessionState.IDLE:
            self.adopt()
        finished = False
        try:
            self._begin(modules)
            yield
            finished = True
        finally:
            self._end(finished=finished)

    def enter(self, block: int) -> None:
        """Block `block` is about to run. The hooks call it; a caller of a block's `forward` itself must do so too."""
        self._expect("enter", SessionState.RUNNING)
        assert self._holds.swapper is not None
        if not self._holds.swapper.enter(block):
            self._adopt_again()
            self._holds.swapper.enter(block)

    @translate_device_errors("a forward was beginning")
    def _begin(self, modules: Sequence[nn.Module]) -> None:
        self.state = SessionState.RUNNING
        swapper, transfer = self._holds.swapper, self._holds.transfer
        assert swapper is not None
        assert transfer is not None
        self.log.begin(swapper, transfer)
        swapper.begin(checks=self.checks)
        for module, hook in zip(modules, self._hooks, strict=True):
            self._handles.append(module.register_forward_pre_hook(hook, prepend=True))

    def _end(self, *, finished: bool) -> None:
        handles, self._handles = self._handles, []
        try:
            for handle in handles:
                handle.remove()
        finally:
            # Closed inside the forward, or failed to adopt inside it, there is nothing to end.
            if self.state is SessionState.RUNNING:
                self.state = SessionState.ADOPTED
                self._leave(finished=finished)

    @translate_device_errors("a forward was ending")
    def _leave(self, *, finished: bool) -> None:
        swapper, transfer = self._holds.swapper, self._holds.transfer
        assert swapper is not None
        assert transfer is not None
        try:
            if finished:
                swapper.leave()
                self.log.end(swapper, transfer)
        except BaseException:
            finished = False
            raise
        finally:
            if not finished:
                try:
                    swapper.abort()
                except BaseException:
                    swapper.abort()  # a second interrupt has ended it half way
                    raise

    def _adopt_again(self) -> None:
        """A tensor of a block was replaced or moved: all weights are read and placed anew."""
        logger.info("a block's weights were replaced: adopting again")
        self.state = SessionState.IDLE  # first: where dropping fails, no forward is left to end
        self._holds.drop_device()
        self.adopt()
        self.state = SessionState.RUNNING


class Holdings:
    """What a session holds on the device and in page-locked memory. It has no reference to the session, so that a
    finalizer can give it up when a session is dropped without `close`.
    """

    def __init__(self) -> None:
        self.store: HostStore | None = None
        self.transfer: Transfer | None = None
        self.swapper: BlockSwapper | None = None

    @property
    def slabs(self) -> dict[int, Slab]:
        """The slab of each swapped block."""
        return {} if self.store is None else self.store.slabs

    @property
    def staging_bytes(self) -> int:
        """Host memory of the staging slabs."""
        transfer = self.transfer
        return 0 if transfer is None or transfer.staging is None else sum(p.size for p in transfer.staging.slabs)

    def drop_device(self) -> None:
        """Masters back; window, residents and staging freed, even if a step fails."""
        swapper, transfer = self.swapper, self.transfer
        self.swapper = self.transfer = None
        try:
            if swapper is not None:
                swapper.release()
        finally:
            if transfer is not None:
                transfer.close()

    def drop(self) -> None:
        """The same, and no slab stays locked. The host waits for all copies, also for those an exception cut short."""
        store, self.store = self.store, None
        try:
            if self.transfer is not None:
                self.transfer.reset()
        finally:
            try:
                self.drop_device()
            finally:
                if store is not None:
                    store.release()


def block_hook(
    holds: Holdings, enter: Callable[[], Callable[[int], None] | None], block: int
) -> Callable[[nn.Module, object], None]:
    """The hook in front of a block.

    Args:
        holds: What runs the blocks.
        enter: Gives the session's method, None once the session is gone: a hook that held the session would keep a
            dropped one alive until the garbage collector runs.
        block: Index of the block.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before_block(module: nn.Module, arguments: object) -> None:
        swapper = holds.swapper
        if swapper is not None and swapper.enter(block):
            return
        alive = enter()
        assert alive is not None, "hooks are registered only inside a session's forward"
        alive(block)

    return before_block


class ForwardLog:
    """Counts forwards and records when they ran, from each adopt on.

    Args:
        traced: As for `SwapSession`.

    Attributes:
        traced: The same; may be set between forwards.
        trace: What was recorded; None if nothing is.
        forwards: Forwards that ended well and ran a block.
        empty_forwards: Forwards that ended well and ran none.
        all_forwards: `forwards` of all adopts together.
        all_empty_forwards: `empty_forwards` of all adopts together.
    """

    def __init__(self, traced: Container[int] | None) -> None:
        self.traced = traced
        self._began: object = None
        self.trace: Trace | None = None
        self.forwards = self.all_forwards = 0
        self.empty_forwards = self.all_empty_forwards = 0

    def start(self, transfer: Transfer) -> None:
        """An adopt: everything counts from here; what it prefetches belongs to the first forward."""
        self.forwards = self.empty_forwards = 0
        if self.traced is not None:
            self.trace = Trace(transfer.streams)
            self.trace.start()
            transfer.trace = self.trace if 0 in self.traced else None

    def begin(self, swapper: BlockSwapper, transfer: Transfer) -> None:
        """A forward begins: its time is taken, and its blocks are recorded if it is one of those that are traced."""
        if self.trace is not None and self.traced is not None:
            swapper.trace = transfer.trace = self.trace if self.forwards in self.traced else None
            self._began = transfer.mark()

    def end(self, swapper: BlockSwapper, transfer: Transfer) -> None:
        """A forward has ended well."""
        if not swapper.entered:
            self.empty_forwards += 1
            self.all_empty_forwards += 1
            return
        if self.trace is not None:
            self.trace.add(FORWARD, self.forwards, self._began, transfer.mark())
            self.trace.read_reached()  # or the events of a long run would pile up
        self.forwards += 1
        self.all_forwards += 1
