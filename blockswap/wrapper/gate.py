"""Gate: where block swapping enters the wrapper, for transformers whose arguments are ours, and leaves it.

Three functions of the wrapper tell when a run loads its weights, begins and is over; they are wrapped in every module
that holds them. Between the begin and the end the transformer's own `forward` is ours, on that object alone: a model
without our arguments, compiled or not, never meets a line of this package.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...hardware import is_out_of_memory
from ..engine.session import SessionState
from ..errors import DeviceMemoryError
from ..run.run import SwapRun
from ..run.text import not_again
from ..settings import SwapSettings, is_ours
from .loader import offload_state_dict, replace_in
from .patch import Forward, Watched
from .wanvideo import (
    BEGIN,
    END,
    LOAD,
    SET,
    Wrapper,
    blocks_as_they_stand,
    check_transformer,
    entry,
    forget_our_count,
    forget_packed,
    host_bytes,
    named_blocks,
    native_swapping_disabled,
    refuse_cuda_graphs,
    refuse_vram_management,
    reset_counters,
    retry_blocker,
    unwrapped,
    vace_blocks_entered,
    vace_blocks_of,
    workload_of,
)

logger = logging.getLogger(__name__)

SCARCE_HOST_SHARE = 0.05
"""Part of the host's memory below which nothing is kept for a next run: there the system begins to swap."""

OnBegin = Callable[["SwapRun", Mapping[str, Any]], None]
"""Told of a run and of our arguments each time it begins, before anything is planned."""

OnSet = Callable[[Any, Any], None]
"""Told of a loaded model, and of the arguments that WanVideoSetBlockSwap is about to give it."""

MakeRun = Callable[[nn.Module, Any, SwapSettings], "SwapRun | None"]
"""Makes the run of a transformer with its blocks and settings; None where its device cannot be swapped on."""


class Gate:
    """Makes runs begin and end with the wrapper's.

    Args:
        wrapper: The wrapper as found and checked.
        make_run: Makes the run of a transformer.
        on_begin: Told when a run begins.
        on_set: Told when a loaded model gets other arguments.
        keeps_slabs: Whether slabs are kept for the next run, as far as memory allows.
    """

    def __init__(
        self,
        wrapper: Wrapper,
        make_run: MakeRun,
        *,
        on_begin: OnBegin | None = None,
        on_set: OnSet | None = None,
        keeps_slabs: Callable[[], bool] = lambda: True,
    ) -> None:
        self._wrapper = wrapper
        self._make_run = make_run
        self._on_begin = on_begin
        self._on_set = on_set
        self._keeps_slabs = keeps_slabs
        self._guests: weakref.WeakKeyDictionary[nn.Module, Guest] = weakref.WeakKeyDictionary()
        self._watched: list[Watched] = []

    @property
    def is_whole(self) -> bool:
        """Whether the wrapper's functions are ours now, in every module: a reload has put others there."""
        return bool(self._watched) and all(watched.is_whole for watched in self._watched)

    def install(self) -> None:
        """Watches the wrapper's functions wherever they are held; idempotent."""
        if self._watched:
            return
        holders = self._wrapper.holders
        self._watched = [
            Watched(LOAD, holders[LOAD], self._before_load),
            Watched(BEGIN, holders[BEGIN], self._before_begin, self._without_counts),
            # The wrapper's own offload is owed to what follows, whatever we make of it.
            Watched(END, holders[END], self._before_end, self._without_counts, always=True),
            Watched(SET, holders[SET], self._before_set),
        ]

    def restore(self) -> None:
        """Everything as if it had never been installed; runs are closed, weights are in ordinary host memory."""
        for transformer in list(self._guests):
            self._dismiss(transformer)
        for watched in self._watched:
            watched.restore()
        self._watched = []

    def run_of(self, transformer: Any) -> SwapRun | None:
        """The run of a transformer, under way or over; None if it has never had our arguments, or no longer has."""
        guest = self._guests.get(unwrapped(transformer))
        return None if guest is None else guest.run

    def _before_set(self, _: Any, arguments: Mapping[str, Any]) -> None:
        """A loaded model gets other arguments: what is in vain by that can be told here alone."""
        if self._on_set is not None:
            self._on_set(arguments.get("model"), arguments.get("block_swap_args"))

    def _before_load(self, transformer: Any, arguments: Mapping[str, Any]) -> None:
        """Old residents and new weights must not stand side by side. What cannot run is refused before any is moved."""
        transformer, swap_args = unwrapped(transformer), arguments.get("block_swap_args")
        guest = self._guests.get(transformer)
        if swap_args is not None and is_ours(swap_args):
            SwapSettings.from_blockswapargs(swap_args)
            refuse_cuda_graphs(arguments.get("compile_args"))
            refuse_vram_management(transformer)
            if guest is not None:
                guest.disarm()
                guest.release()
            return
        forget_our_count(transformer)
        if guest is not None:
            self._dismiss(transformer)
            if arguments.get("gguf"):
                forget_packed(transformer)

    def _before_begin(self, transformer: Any, arguments: Mapping[str, Any]) -> None:
        """The run begins: masters shown before the wrapper moves blocks, settings from its arguments."""
        outer, transformer = transformer, unwrapped(transformer)
        swap_args, model = arguments.get("block_swap_args"), arguments.get("model")
        if not is_ours(swap_args):
            forget_our_count(transformer)
            if transformer in self._guests:
                self._dismiss(transformer)
            return
        try:
            self._begin(outer, transformer, swap_args, model)
        except BaseException:
            reset_counters(transformer)
            raise

    def _begin(self, outer: Any, transformer: Any, swap_args: Any, model: Any) -> None:
        check_transformer(transformer)
        refuse_cuda_graphs(entry(model, "compile_args"))
        refuse_vram_management(transformer, model)
        settings = SwapSettings.from_blockswapargs(swap_args)
        assert settings is not None, "is_ours has found them"
        guest = self._guests.get(transformer)
        if guest is None:
            run = self._make_run(transformer, named_blocks(transformer), settings)
            if run is None:
                return
            guest = self._guests[transformer] = Guest(run, [])
        offload_state_dict(transformer, model)
        guest.run.use(settings)
        guest.run.session.listeners.on_master = replace_in(model)
        if self._on_begin is not None:
            self._on_begin(guest.run, swap_args)
        self._make_room(transformer, guest)
        guest.hints_to_host = not settings.auto_hardware_tuning and settings.vace_blocks_to_swap > 0
        guest.release()
        guest.disarm()
        guest.patched = [weakref.ref(Forward.on(transformer, self._forward))]
        if outer is not transformer:
            logger.info("a model compiled as a whole runs uncompiled with swapped blocks; compile the blocks alone")
            guest.patched.append(weakref.ref(Forward.on(outer, _past_compiling)))

    def _make_room(self, transformer: nn.Module, guest: Guest) -> None:
        """Models whose run is over give up what this one needs: locks first, then slabs."""
        need = host_bytes(transformer)
        others = [other for other in self._guests.values() if other is not guest]
        for other in others:
            session = other.run.session
            if session.state is not SessionState.IDLE:
                continue
            if session.pinned_bytes and guest.run.planner.pins.left_bytes < need:
                session.unlock()
            # What the last run of this model left in slabs needs no room again.
            fresh = max(0, need - guest.run.session.slab_bytes)
            if session.slab_bytes and guest.run.planner.machine.host().available_bytes < fresh:
                logger.info("host memory is short: a model whose run is over gives up its slabs")
                session.give_up_slabs()

    def _without_counts(self, transformer: Any) -> None:
        """What the wrapper's own count has set is not to outlive the run, whoever ends it."""
        if unwrapped(transformer) in self._guests:
            reset_counters(unwrapped(transformer))

    def _before_end(self, transformer: Any, arguments: Mapping[str, Any]) -> None:
        """The run is over: every tensor at its master before the wrapper offloads, so that it copies no block."""
        guest = self._guests.get(unwrapped(transformer))
        if guest is not None:
            guest.disarm()
            guest.release()
            self._relieve(guest)

    def _relieve(self, guest: Guest) -> None:
        """Slabs are kept for the next run while host memory, and the user, allow."""
        if not self._keeps_slabs():
            guest.run.session.give_up_slabs()
            return
        host = guest.run.planner.machine.host()
        if host.available_bytes < SCARCE_HOST_SHARE * host.physical_bytes and guest.run.session.slab_bytes:
            logger.info("host memory is nearly full: slabs are not kept for the next run")
            guest.run.session.give_up_slabs()

    def _dismiss(self, transformer: nn.Module) -> None:
        """Our arguments are gone: the transformer is as if it had never had them."""
        guest = self._guests.pop(transformer)
        guest.disarm()
        guest.run.close()
        forget_our_count(transformer)  # not any other: the sampler may just have set the wrapper's own

    def _forward(self, transformer: Any, original: Callable[..., Any], arguments: Any, keywords: Any) -> Any:
        guest = self._guests.get(transformer)
        if guest is None:
            return original(*arguments, **keywords)
        try:
            return self._with_memory(transformer, guest, original, arguments, keywords)
        except BaseException as failure:
            guest.release(failure)  # not every caller offloads after a failure
            raise

    def _with_memory(self, transformer: Any, guest: Guest, original: Any, arguments: Any, keywords: Any) -> Any:
        """One forward; where device memory runs out, again with a smaller plan, if that cannot change the result."""
        while True:
            has_begun = False
            try:
                workload = self._prepared(transformer, guest, arguments[0] if arguments else keywords.get("x"))
                has_begun = True
                with contextlib.ExitStack() as stack:
                    stack.enter_context(native_swapping_disabled(transformer, hints_to_host=guest.hints_to_host))
                    stack.enter_context(guest.run.forward(workload, blocks_as_they_stand(transformer)))
                    stack.enter_context(vace_blocks_entered(transformer, guest.run.session.enter))
                    return original(*arguments, **keywords)
            except RuntimeError as failure:
                if not (isinstance(failure, DeviceMemoryError) or is_out_of_memory(failure)):
                    raise
                said = str(failure).partition("\n")[0]
            # Not in the handler: the failure's traceback holds what the forward had allocated.
            logger.warning("%s; trying a smaller plan", said)
            guest.run.shrink(said)
            if not has_begun:
                continue
            why_not = retry_blocker(transformer, original, step=keywords.get("current_step", 0))
            if why_not is not None:
                raise DeviceMemoryError(not_again(why_not, said=said))

    def _prepared(self, transformer: Any, guest: Guest, latents: Any) -> Any:
        """What the forward does, and a plan for it; VACE hints go to the host where the plan has no room for them."""
        workload = workload_of(transformer, latents, hints_to_host=guest.hints_to_host)
        plan = guest.run.prepare(workload)
        vace = len(vace_blocks_of(transformer))
        if vace and not guest.hints_to_host and plan.over_ceiling:
            guest.hints_to_host = True
            guest.run.planner.withdraw(workload)
            workload = workload_of(transformer, latents, hints_to_host=True)
            guest.run.prepare(workload)
            logger.info("the hints of %d VACE blocks go to the host: the device has no room for them", vace)
        return workload


def _past_compiling(outer: Any, original: Callable[..., Any], arguments: Any, keywords: Any) -> Any:
    """A call of the module that torch.compile has made of a transformer, as one of the transformer itself."""
    return unwrapped(outer)(*arguments, **keywords)


@dataclass(slots=True)
class Guest:
    """A transformer that has our arguments. Does not know it: its life is the wrapper's.

    Attributes:
        run: Its run.
        patched: What stands as `forward` on its modules now; those hold it themselves.
        hints_to_host: VACE hints go to the host.
    """

    run: SwapRun
    patched: list[weakref.ref[Forward]]
    hints_to_host: bool = False

    def disarm(self) -> None:
        """Every `forward` as it was."""
        patched, self.patched = self.patched, []
        for reference in patched:
            forward = reference()
            if forward is not None:
                forward.disarm()

    def release(self, failure: BaseException | None = None) -> None:
        """The run is over, if one is under way; what has ended it, if it has not ended well."""
        if self.run.session.state in (SessionState.IDLE, SessionState.ADOPTED):
            self.run.release(failure)
