"""Gate: where block swapping enters the wrapper, for transformers whose arguments are ours, and leaves it.

Three functions of the wrapper mark when a run loads its weights, starts and ends; they are wrapped in every module that
holds them. Between start and end the transformer's own `forward` is ours, on that object alone: no code of this package
runs for a model without our arguments, compiled or not.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..engine.session import SessionState
from ..run.history import Workload
from ..run.run import SwapRun
from ..settings import SwapSettings, is_ours
from .loader import offload_state_dict, replace_in
from .patch import Forward, Watched
from .retry import retry_blocker, within_memory
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
    unwrapped,
    vace_blocks_entered,
    vace_blocks_of,
    workload_of,
)

logger = logging.getLogger(__name__)

SCARCE_HOST_SHARE = 0.05
"""Part of the host's memory below which nothing is kept for a next run: there the system begins to swap."""

OnStart = Callable[["SwapRun", Mapping[str, Any]], None]
"""Called with a run and our arguments each time it starts, before anything is planned."""

OnSet = Callable[[Any, Any], None]
"""Called with a loaded model, and the arguments that WanVideoSetBlockSwap is about to give it."""

MakeRun = Callable[[nn.Module, Any, SwapSettings], "SwapRun | None"]
"""Makes the run of a transformer with its blocks and settings; None where its device cannot be swapped on."""


@dataclass(slots=True)
class GatedModel:
    """The run of a transformer that has our arguments; no reference to it, whose lifetime belongs to the wrapper.

    Attributes:
        run: Its run.
        patched: What is set as `forward` on its modules now; the modules hold it, this only refers to it.
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


class Gate:
    """Starts and ends runs with the wrapper's.

    Args:
        wrapper: The wrapper as found and checked.
        make_run: Makes the run of a transformer.
        on_start: Called when a run starts.
        on_set: Called when a loaded model gets other arguments.
        keeps_slabs: Whether slabs are kept for the next run, as far as memory allows.
    """

    def __init__(
        self,
        wrapper: Wrapper,
        make_run: MakeRun,
        *,
        on_start: OnStart | None = None,
        on_set: OnSet | None = None,
        keeps_slabs: Callable[[], bool] = lambda: True,
    ) -> None:
        self._wrapper = wrapper
        self._make_run = make_run
        self._on_start = on_start
        self._on_set = on_set
        self._keeps_slabs = keeps_slabs
        self._gated: weakref.WeakKeyDictionary[nn.Module, GatedModel] = weakref.WeakKeyDictionary()
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
            Watched(BEGIN, holders[BEGIN], self._before_start, self._without_counts),
            # Always run the wrapper's own offload, even if ours fails.
            Watched(END, holders[END], self._before_end, self._without_counts, always=True),
            Watched(SET, holders[SET], self._before_set),
        ]

    def restore(self) -> None:
        """Everything as if it had never been installed; runs are closed, weights are in ordinary host memory."""
        for transformer in list(self._gated):
            self._dismiss(transformer)
        for watched in self._watched:
            watched.restore()
        self._watched = []

    def run_of(self, transformer: Any) -> SwapRun | None:
        """The run of a transformer, under way or over; None if it has never had our arguments, or no longer has."""
        gated = self._gated.get(unwrapped(transformer))
        return None if gated is None else gated.run

    def _before_set(self, _: Any, arguments: Mapping[str, Any]) -> None:
        """A loaded model gets other arguments: only here can arguments that lose their effect be reported."""
        if self._on_set is not None:
            self._on_set(arguments.get("model"), arguments.get("block_swap_args"))

    def _before_load(self, transformer: Any, arguments: Mapping[str, Any]) -> None:
        """Old residents go before new weights come. What cannot run is refused before any weight is moved."""
        transformer, swap_args = unwrapped(transformer), arguments.get("block_swap_args")
        gated = self._gated.get(transformer)
        if swap_args is not None and is_ours(swap_args):
            SwapSettings.from_blockswapargs(swap_args)
            refuse_cuda_graphs(arguments.get("compile_args"))
            refuse_vram_management(transformer)
            if gated is not None:
                gated.disarm()
                gated.release()
            return
        forget_our_count(transformer)
        if gated is not None:
            self._dismiss(transformer)
            if arguments.get("gguf"):
                forget_packed(transformer)

    def _before_start(self, transformer: Any, arguments: Mapping[str, Any]) -> None:
        """The run starts: every tensor at its master before the wrapper moves blocks; settings from its arguments."""
        outer, transformer = transformer, unwrapped(transformer)
        swap_args, model = arguments.get("block_swap_args"), arguments.get("model")
        if not is_ours(swap_args):
            forget_our_count(transformer)
            if transformer in self._gated:
                self._dismiss(transformer)
            return
        try:
            self._start(outer, transformer, swap_args, model)
        except BaseException:
            reset_counters(transformer)
            raise

    def _start(self, outer: Any, transformer: Any, swap_args: Any, model: Any) -> None:
        check_transformer(transformer)
        refuse_cuda_graphs(entry(model, "compile_args"))
        refuse_vram_management(transformer, model)
        settings = SwapSettings.from_blockswapargs(swap_args)
        assert settings is not None, "is_ours has found them"
        gated = self._gated.get(transformer)
        if gated is None:
            run = self._make_run(transformer, named_blocks(transformer), settings)
            if run is None:
                return
            gated = self._gated[transformer] = GatedModel(run, [])
        offload_state_dict(transformer, model)
        gated.run.use(settings)
        gated.run.session.listeners.on_master = replace_in(model)
        if self._on_start is not None:
            self._on_start(gated.run, swap_args)
        self._make_room(transformer, gated)
        gated.hints_to_host = not settings.auto_hardware_tuning and settings.vace_blocks_to_swap > 0
        gated.release()
        gated.disarm()
        gated.patched = [weakref.ref(Forward.on(transformer, self._forward))]
        if outer is not transformer:
            logger.info("a model compiled as a whole runs uncompiled with swapped blocks; compile the blocks alone")
            gated.patched.append(weakref.ref(Forward.on(outer, _past_compiling)))

    def _make_room(self, transformer: nn.Module, gated: GatedModel) -> None:
        """Models whose run is over give up what this one needs: locks first, then slabs."""
        need = host_bytes(transformer)
        others = [other for other in self._gated.values() if other is not gated]
        for other in others:
            session = other.run.session
            if session.state is not SessionState.IDLE:
                continue
            if session.pinned_bytes and gated.run.planner.pins.left_bytes < need:
                session.unlock()
            # What the last run of this model left in slabs needs no room again.
            fresh = max(0, need - gated.run.session.slab_bytes)
            if session.slab_bytes and gated.run.planner.machine.host().available_bytes < fresh:
                logger.info("host memory is short: a model whose run is over gives up its slabs")
                session.give_up_slabs()

    def _without_counts(self, transformer: Any) -> None:
        """The counters that our arguments have raised do not outlive the run, however it ends."""
        if unwrapped(transformer) in self._gated:
            reset_counters(unwrapped(transformer))

    def _before_end(self, transformer: Any, arguments: Mapping[str, Any]) -> None:
        """The run ends: every tensor is at its master before the wrapper offloads, so that it copies no block."""
        gated = self._gated.get(unwrapped(transformer))
        if gated is not None:
            gated.disarm()
            gated.release()
            self._relieve(gated)

    def _relieve(self, gated: GatedModel) -> None:
        """Slabs are kept for the next run if host memory and the user's settings allow."""
        if not self._keeps_slabs():
            gated.run.session.give_up_slabs()
            return
        host = gated.run.planner.machine.host()
        if host.available_bytes < SCARCE_HOST_SHARE * host.physical_bytes and gated.run.session.slab_bytes:
            logger.info("host memory is nearly full: slabs are not kept for the next run")
            gated.run.session.give_up_slabs()

    def _dismiss(self, transformer: nn.Module) -> None:
        """Our arguments are gone: the transformer is as if it had never had them."""
        gated = self._gated.pop(transformer)
        gated.disarm()
        gated.run.close()
        forget_our_count(transformer)  # not any other: the sampler may just have set the wrapper's own

    def _forward(self, transformer: Any, original: Callable[..., Any], arguments: Any, keywords: Any) -> Any:
        gated = self._gated.get(transformer)
        if gated is None:
            return original(*arguments, **keywords)
        try:
            return self._with_memory(transformer, gated, original, arguments, keywords)
        except BaseException as failure:
            gated.release(failure)  # not every caller offloads after a failure
            raise

    def _with_memory(self, transformer: Any, gated: GatedModel, original: Any, arguments: Any, keywords: Any) -> Any:
        def prepare() -> Workload | None:
            return self._prepared(transformer, gated, arguments[0] if arguments else keywords.get("x"))

        def forward(workload: Workload | None) -> Any:
            with contextlib.ExitStack() as stack:
                stack.enter_context(native_swapping_disabled(transformer, hints_to_host=gated.hints_to_host))
                stack.enter_context(gated.run.forward(workload, blocks_as_they_stand(transformer)))
                stack.enter_context(vace_blocks_entered(transformer, gated.run.session.enter))
                return original(*arguments, **keywords)

        def blocker() -> str | None:
            return retry_blocker(transformer, original, step=keywords.get("current_step", 0))

        return within_memory(prepare, forward, shrink=gated.run.shrink, blocker=blocker)

    def _prepared(self, transformer: Any, gated: GatedModel, latents: Any) -> Workload | None:
        """What the forward does, and a plan for it; VACE hints go to the host where the plan has no room for them."""
        workload = workload_of(transformer, latents, hints_to_host=gated.hints_to_host)
        plan = gated.run.prepare(workload)
        vace = len(vace_blocks_of(transformer))
        if vace and not gated.hints_to_host and plan.over_ceiling:
            gated.hints_to_host = True
            gated.run.planner.withdraw(workload)
            workload = workload_of(transformer, latents, hints_to_host=True)
            gated.run.prepare(workload)
            logger.info("the hints of %d VACE blocks go to the host: the device has no room for them", vace)
        return workload


def _past_compiling(outer: Any, original: Callable[..., Any], arguments: Any, keywords: Any) -> Any:
    """Calls the transformer itself in place of the module that torch.compile has made of it."""
    return unwrapped(outer)(*arguments, **keywords)
