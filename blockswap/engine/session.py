"""SwapSession: the life of one transformer with swapped blocks: adopt, run, release; close."""

from __future__ import annotations

import _thread
import contextlib
import logging
import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from enum import Enum

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..device.backend import Backend
from ..device.failures import translate_device_errors
from ..device.streams import Streams
from ..device.worker import InlineWorker, run_outside_workers
from ..errors import BlockSwapError, UnsupportedModelError
from ..host.slabs import RegionFinder
from ..host.staging import UnlockedCopies
from ..host.store import HostStore
from ..model.layout import ModelProfile
from ..model.profile import ProfiledModel, named_blocks, profile_model, refuse_grad
from ..plan.swap_plan import STAGING_SLABS, HeldMemory, HostTier, SwapPlan
from .others import OneAtATime, Others
from .placer import Listeners
from .swapper import BlockSwapper, Holdings, block_hook
from .trace import ForwardLog, Trace
from .transfer import Counters, Transfer

logger = logging.getLogger(__name__)

MakePlan = Callable[[ModelProfile, HeldMemory], SwapPlan]
"""Makes the plan at each adopt, from the blocks and from the memory that is held for them already."""


class SessionState(Enum):
    """The state of a session."""

    IDLE = "idle"
    """From the start or a release until the next adopt: the session holds no device memory."""
    ADOPTED = "adopted"
    """From adopt until a forward starts, and between forwards."""
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

    Inside `forward()` the blocks may be called in any order, several times or not at all. Between forwards every
    parameter points at its true bytes: at its master on the host, or at its resident copy. The session does not touch
    the rest of the model.

    Args:
        blocks: Name and module of each block, in execution order.
        planner: Makes the plan.
        backend: The device and what it offers.
        root: The whole model, for the bytes outside the blocks; held weakly. None if there is nothing else.
        traced: Numbers of the forwards of which compute, stall and copies are recorded; of the others only their
            duration is. They count from 0 at each adopt, without forwards that ran no block. None records nothing.
        listeners: Called during an adopt.

    Attributes:
        backend: The device and what it offers.
        state: The state.
        plan: The plan of the last adopt; None before the first.
        log: Counts and times the forwards.
        counters: Copies since the session was made.
        adoptions: How often blocks were placed.
        others: What others did to the weights; a new one may be set between runs.
        checks: Compare each slot with its slab before a block uses it; read at the start of each forward.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[str, nn.Module]],
        planner: MakePlan,
        backend: Backend,
        *,
        root: nn.Module | None = None,
        traced: Container[int] | None = None,
        listeners: Listeners | None = None,
    ) -> None:
        self._named = named_blocks(blocks)
        self._root = None if root is None else weakref.ref(root)
        self._planner = planner
        self.backend = backend
        self._holds = Holdings()
        # Not at exit, where it would unlock gigabytes beside a thread of ComfyUI that still runs: the system does it.
        weakref.finalize(self, run_outside_workers, self._holds.drop).atexit = False
        self._handles: list[RemovableHandle] = []
        enter = weakref.WeakMethod(self.enter)
        self._hooks = [block_hook(self._holds, enter, index, named) for index, named in enumerate(self._named)]
        self.state = SessionState.IDLE
        self.plan: SwapPlan | None = None
        self.log = ForwardLog(traced)
        self.counters = Counters()
        self.adoptions = 0
        self.others = Others()
        self.listeners = listeners or Listeners()
        self.checks = False

    def __enter__(self) -> SwapSession:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def names(self) -> list[str]:
        """The name of each block."""
        return [name for name, _ in self._named]

    @property
    def trace(self) -> Trace | None:
        """The trace since the last adopt; None before the first, or if nothing is traced."""
        return self.log.trace

    @property
    def device_bytes(self) -> int:
        """Device memory of residents, small tensors and window."""
        is_placed = isinstance(self._holds.swapper, BlockSwapper)
        return self.plan.device_bytes if is_placed and self.plan is not None else 0

    @property
    def slab_bytes(self) -> int:
        """Host memory of the slabs, which hold the streamed tensors of swapped blocks."""
        spare = 0 if self._holds.store is None else self._holds.store.spare_bytes
        return sum(slab.size for slab in list(self._holds.slabs.values())) + spare

    @property
    def staging_bytes(self) -> int:
        """Host memory of the staging slabs."""
        return self._holds.staging_bytes

    @property
    def pinned_bytes(self) -> int:
        """Host memory that this session has page-locked: slabs and staging slabs."""
        store = self._holds.store
        return (0 if store is None else store.pinned_bytes) + self._holds.locked_staging_bytes

    @property
    def held(self) -> HeldMemory:
        """All of these."""
        in_place_of_others = sum(slab.size for slab in list(self._holds.slabs.values()) if not slab.originals)
        added = self.slab_bytes - in_place_of_others + self.staging_bytes
        return HeldMemory(self.device_bytes, self.slab_bytes, self.staging_bytes, self.pinned_bytes, added)

    @property
    def tiers(self) -> dict[int, HostTier]:
        """The tier of each swapped block's slab; below the planned one where page-locking was refused."""
        return {block: slab.tier for block, slab in list(self._holds.slabs.items())}

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why slabs could not be page-locked as planned."""
        return () if self._holds.store is None else tuple(self._holds.store.refusals)

    # ------------------------------------------------------------------------------------------------- adopt, release

    @translate_device_errors("blocks were being placed")
    def adopt(self, *, wait: bool = True) -> SwapPlan:
        """Profiles, plans, and places the blocks.

        Args:
            wait: Return when all blocks are placed. Without it, device memory is allocated, and the next forward waits
                for each block as it comes to it.

        Raises:
            UnsupportedModelError: The blocks cannot be swapped.
            PlanError: No plan fits.
            HostMemoryError: The host refused memory.
            DeviceMemoryError: The device refused memory. After each error the weights are where they were, or in
                ordinary host memory, and nothing stays page-locked.
        """
        self._expect("adopt", SessionState.IDLE)
        root = None if self._root is None else self._root()
        files = RegionFinder(self._holds.slabs.values())
        model = profile_model(self._named, root=root, region_of=files.region_of, in_mapping=files.in_mapping)
        plan = self._planner(model.profile, self.held)
        try:
            swapper = self._open(model, plan)
            if wait:
                swapper.settle()
            self.plan, self.others.gave_up = plan, False
            self.adoptions += 1
            self.state = SessionState.ADOPTED
        except BaseException:
            self.state = SessionState.IDLE
            self._holds.drop()
            raise
        logger.debug("swapping %d of %d blocks: %s", plan.swapped_count, len(plan.swapped), "; ".join(plan.reasons))
        return plan

    def _open(self, model: ProfiledModel, plan: SwapPlan) -> BlockSwapper:
        holds, backend = self._holds, self.backend
        streams = backend.open_streams(plan.streams, plan.overlap)
        if holds.store is None:
            holds.store = self._new_store(streams)
        holds.store.use(streams)
        transfer = holds.transfer = Transfer(streams, self.counters)
        transfer.host_copies = not plan.overlap
        worker = backend.make_worker(streams) if plan.overlap else InlineWorker()
        staging_bytes, locked = plan.staging_bytes // STAGING_SLABS, plan.pinned_bytes > 0
        transfer.unlocked = UnlockedCopies(holds.store, worker, staging_bytes=staging_bytes, locked=locked)
        swapper = holds.swapper = BlockSwapper(model, plan, holds.store, transfer, self.listeners)
        self.log.start(transfer)
        swapper.prefetch()
        return swapper

    def _new_store(self, streams: Streams) -> HostStore:
        return HostStore(streams, self.backend.registrar, self.backend.pin_budget, self.backend.host_room)

    @translate_device_errors("device memory was being given back")
    def release(self) -> None:
        """Points every tensor at its master and frees the device memory. Slabs stay for the next adopt."""
        self._expect("release", SessionState.IDLE, SessionState.ADOPTED)
        try:
            self._holds.drop_device()
        finally:
            self.state = SessionState.IDLE

    @translate_device_errors("host memory was being unlocked")
    def unlock(self) -> None:
        """Unlocks the slabs; they stay, and are locked again at the next adopt. Spare memory goes."""
        self._expect("unlock", SessionState.IDLE)
        if self._holds.store is not None:
            self._holds.store.unlock()

    @translate_device_errors("host memory was being given up")
    def give_up_slabs(self) -> None:
        """Keeps no slab for the next run; weights that are nowhere else stay in ordinary memory."""
        self._expect("give_up_slabs", SessionState.IDLE)
        self._holds.drop()

    @translate_device_errors("host memory was being handed over")
    def take_over(self, other: SwapSession) -> None:
        """Takes the page-locked memory of another session's slabs for the next adopt's, without unlocking it.

        Only slabs go that nothing points at, or whose weights are in a file, from which the other session fills new
        ones when it runs again; and memory that the other session took over and has not used, since its run failed.
        """
        self._expect("take_over", SessionState.IDLE)
        other._expect("take_over", SessionState.IDLE, SessionState.CLOSED)
        if other._holds.store is not None:
            holds, backend = self._holds, self.backend
            holds.store = holds.store or self._new_store(backend.open_streams(1, backend.overlap))
            holds.store.take(other._holds.store.hand_over())

    @translate_device_errors("host memory was being given up")
    def give_up_unused(self) -> None:
        """Unlocks and frees what `take_over` would take from this session."""
        self._expect("give_up_unused", SessionState.IDLE)
        for pages in () if self._holds.store is None else self._holds.store.hand_over():
            pages.unpin()

    def read_ahead(self, most_bytes: int) -> None:
        """Lets the system read at most so many bytes of the blocks' files into its cache, in a thread."""
        store = self._holds.store
        if store is not None:
            with contextlib.suppress(RuntimeError):  # no thread is left: the blocks are read when they are needed
                _thread.start_new_thread(store.read_ahead, (most_bytes,))

    @translate_device_errors("a session was being closed")
    def close(self) -> None:
        """Releases, unlocks the slabs and ends the session; idempotent. Weights stay in ordinary host memory."""
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
            raise BlockSwapError(f"{what} needs a session that is {expected}, but this one is {self.state.value}")

    # -------------------------------------------------------------------------------------------------------- forward

    @contextlib.contextmanager
    def forward(self, blocks: Sequence[nn.Module] | None = None) -> Iterator[None]:
        """One forward of the model; adopts before the first.

        Args:
            blocks: The modules that will be called, if they differ from the session's own (compiling wraps each block
                again). They are hooked for this forward only.
        """
        modules = [module for _, module in self._named] if blocks is None else blocks
        if len(modules) != len(self._named):
            raise UnsupportedModelError(
                f"the run began with {len(self._named)} blocks, and now the model has {len(modules)}: another node has "
                "added or removed blocks meanwhile; remove that node, or queue the prompt again, so that the run "
                "begins with these (in Python: make a new session)"
            )
        self._expect("forward", SessionState.IDLE, SessionState.ADOPTED)
        if torch.is_grad_enabled():
            refuse_grad(self._named)
        if self.others.gave_up and self.others.have_stopped():
            logger.info("no weight has been moved, replaced or edited for a while: blocks are streamed again")
            self.release()
        if self.state is SessionState.IDLE:
            self.adopt(wait=False)
        finished = False
        try:
            self._begin(modules)
            yield
            finished = True
        finally:
            self._end(finished=finished)

    def enter(self, block: int, given: object = ()) -> None:
        """Prepares block `block` to run. The hooks call it; code that calls a block's `forward` must call it as well.

        Args:
            block: Index of the block.
            given: What the block is called with, as far as the caller knows it: tensors in tuples, lists and dicts.

        Raises:
            UnsupportedModelError: Grad is enabled, and a tensor in `given` or a parameter of the block requires it.
        """
        self._expect("enter", SessionState.RUNNING)
        if torch.is_grad_enabled():
            refuse_grad((self._named[block],), given)
        swapper = self._holds.swapper
        assert swapper is not None
        while not swapper.enter(block):
            name = swapper.replaced(block)
            if name is None:
                swapper = self.adopt_again(f"{self._named[block][0]} could not be placed before")
                continue
            self.others.undid(name, self._around(block))
            if self.others.gave_up:
                swapper = self._move_one_at_a_time()
            else:
                swapper = self.adopt_again(f"{name} was moved, replaced or edited by another node")

    def _around(self, block: int) -> Sequence[Sequence[nn.Module]]:
        """Where others may have their hooks: in the block, or else on the model."""
        root = None if self._root is None else self._root()
        return list(self._named[block][1].modules()), [] if root is None else [root]

    @translate_device_errors("a step was starting")
    def _begin(self, modules: Sequence[nn.Module]) -> None:
        self.state = SessionState.RUNNING
        self._begin_swapper()
        for module, hook in zip(modules, self._hooks, strict=True):
            self._handles.append(module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))

    def _begin_swapper(self) -> BlockSwapper | OneAtATime:
        swapper, transfer = self._holds.swapper, self._holds.transfer
        assert swapper is not None
        assert transfer is not None
        self.log.begin(swapper, transfer)
        swapper.begin(checks=self.checks)
        return swapper

    def _end(self, *, finished: bool) -> None:
        handles, self._handles = self._handles, []
        try:
            for handle in handles:
                handle.remove()
        finally:
            # If the forward closed the session, or an adopt inside it failed, there is nothing to end.
            if self.state is SessionState.RUNNING:
                self.state = SessionState.ADOPTED
                self._leave(finished=finished)

    @translate_device_errors("a step was ending")
    def _leave(self, *, finished: bool) -> None:
        swapper, transfer = self._holds.swapper, self._holds.transfer
        assert swapper is not None
        assert transfer is not None
        try:
            if finished:
                swapper.leave()
                self.log.end(swapper, transfer)
                for block, name in swapper.moved:
                    self.others.found(name, self._around(block))
                if self.others.moved:
                    self.others.ended_forward()
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

    def adopt_again(self, why: str) -> BlockSwapper | OneAtATime:
        """Places all weights again inside a forward, between two of its blocks."""
        logger.info("placing the blocks again: %s", why)
        self.state = SessionState.IDLE  # first: where dropping fails, no forward is left to end
        self._holds.drop_device()
        self.adopt(wait=False)
        self.state = SessionState.RUNNING
        return self._begin_swapper()

    def _move_one_at_a_time(self) -> BlockSwapper | OneAtATime:
        """Goes on without plan, slabs and window until the release, inside a forward."""
        self.state = SessionState.IDLE  # as above
        self._holds.drop()
        transfer = self._holds.transfer = Transfer(self.backend.open_streams(1, self.backend.overlap), self.counters)
        self._holds.swapper = OneAtATime(self._named, self.backend.device)
        self.log.start(transfer)
        self.state = SessionState.RUNNING
        return self._begin_swapper()
