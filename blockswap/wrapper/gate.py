"""Gate: starts and ends our runs together with the wrapper's, for transformers that carry our arguments.

Three functions of the wrapper mark a run: one loads the weights, one starts the run, one ends it. The gate wraps them
in every module that holds them. Between start and end, the transformer's own attribute `forward` is ours, on that
object alone: a model without our arguments, compiled or not, executes no line of this package.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ...hardware import is_driver_refusal, is_out_of_memory
from ..engine.session import SessionState, SwapSession
from ..errors import BlockSwapError, DeviceMemoryError, WrapperError
from ..run.history import Workload
from ..run.run import OutOfVramError, SwapRun
from ..run.text import not_again
from ..settings import SwapSettings, is_ours
from .control import ControlModels
from .find import END, LOAD, LOADER, SET, START, Wrapper
from .loader import copied_bytes, offload_state_dict, replace_in
from .parts import PUT, Part, hidden, loaded_to_host, moves_disabled, offload, parts_of, unwrapped
from .patch import Forward, OnModels, Watched
from .wanvideo import (
    MANAGED,
    check_transformer,
    discard_packed_weights,
    entry,
    host_weight_bytes,
    native_swapping_disabled,
    refuse_cuda_graphs,
    refuse_vram_management,
    reset_counters,
    reset_our_count,
    retry_blocker,
    return_unloaded_weights,
    shown_name,
    vace_blocks_entered,
    vace_blocks_of,
)
from .workload import step_of, workload_of

logger = logging.getLogger(__name__)

SCARCE_HOST_SHARE = 0.05
"""Share of the host's memory that is available below which slabs are not kept for the next run: there the system would
begin to swap."""

OnStart = Callable[[SwapRun, Mapping[str, Any]], None]
"""Called with a run and our arguments each time the run starts, before anything is planned."""

OnRefused = Callable[[BlockSwapError, Mapping[str, Any]], None]
"""Called with our arguments and why a model that has them is refused, before its run starts."""

OnSet = Callable[[Any, Any], None]
"""Called with a loaded model and the arguments that WanVideoSetBlockSwap is about to give it."""

MakeRun = Callable[[nn.Module, Any, SwapSettings], "SwapRun | None"]
"""Makes the run of a transformer from the names and modules that are swapped, and from settings; None where its device
cannot be swapped on.
"""


class Gate:
    """Wraps the wrapper's functions, and keeps the run of each transformer that carries our arguments.

    Args:
        wrapper: The wrapper, found and checked.
        make_run: Makes the run of a transformer.
        on_start: Called when a run starts.
        on_set: Called when a loaded model gets other arguments.
        on_refused: Called when a model with our arguments is refused.
        keeps_slabs: Whether the user wants slabs kept for the next run.
    """

    def __init__(
        self,
        wrapper: Wrapper,
        make_run: MakeRun,
        *,
        on_start: OnStart | None = None,
        on_set: OnSet | None = None,
        on_refused: OnRefused | None = None,
        keeps_slabs: Callable[[], bool] = lambda: True,
    ) -> None:
        self._wrapper = wrapper
        self._make_run = make_run
        self._on_start = on_start
        self._on_set = on_set
        self._on_refused = on_refused
        self._keeps_slabs = keeps_slabs
        self._gated: OnModels[GatedModel] = OnModels()
        self._watched: list[Watched] = []

    @property
    def is_whole(self) -> bool:
        """Whether every module still holds our functions; false once the wrapper was loaded again."""
        return bool(self._watched) and all(watched.is_whole for watched in self._watched)

    def install(self) -> None:
        """Wraps the wrapper's functions wherever they are held; idempotent."""
        if self._watched:
            return
        holders = self._wrapper.holders
        self._watched = [
            Watched(LOAD, holders[LOAD], self._before_load),
            Watched(START, holders[START], self._before_start, self._after),
            # Always run the wrapper's own offload, even if ours fails.
            Watched(END, holders[END], self._before_end, self._after, always=True),
            Watched(SET, holders[SET], self._before_set),
            Watched(SET, holders[LOADER], self._before_loader),
        ]

    def restore(self) -> None:
        """Removes our functions and closes all runs, so that weights are in ordinary host memory."""
        for transformer in list(self._gated):
            self._remove(transformer)
        for watched in self._watched:
            watched.restore()
        self._watched = []

    def run_of(self, transformer: Any) -> SwapRun | None:
        """The run of a transformer, in progress or over; None if the transformer does not carry our arguments."""
        gated = self._gated.get(unwrapped(transformer))
        return None if gated is None else gated.run

    def _before_set(self, _: Any, arguments: Mapping[str, Any]) -> None:
        """Reports arguments that lose their effect: only here does the model still have those that are replaced."""
        if self._on_set is not None:
            self._on_set(arguments.get("model"), arguments.get("block_swap_args"))

    def _before_loader(self, _: Any, arguments: Mapping[str, Any]) -> None:
        """Refuses what cannot run, before the wrapper's own assertion, which does not say what to do."""
        swap_args = arguments.get("block_swap_args")
        if arguments.get("vram_management_args") is not None and is_ours(swap_args):
            with self._refusals_told(swap_args):
                raise WrapperError(MANAGED)

    def _before_load(self, transformer: Any, arguments: Mapping[str, Any]) -> AbstractContextManager[None] | None:
        """Refuses what cannot run, before any weight moves, and frees the device before new weights arrive there."""
        transformer, swap_args = unwrapped(transformer), arguments.get("block_swap_args")
        if swap_args is None or not is_ours(swap_args):
            if self._remove(transformer) and arguments.get("gguf"):
                discard_packed_weights(transformer)
            return None
        with self._refusals_told(swap_args):
            SwapSettings.from_blockswapargs(swap_args)
            refuse_cuda_graphs(arguments.get("compile_args"))
            refuse_vram_management(transformer)
        gated = self._gated.get(transformer)
        if gated is not None:
            gated.end()
        if arguments.get("gguf"):
            self._make_room_for_copies(copied_bytes(arguments.get("reader")))
        return loaded_to_host(self._wrapper.holders[PUT], transformer)

    def _make_room_for_copies(self, need: int) -> None:
        """Models whose run has ended give up slabs that are not in use, where RAM has no room beside them.

        Args:
            need: Bytes of a GGUF model, which the wrapper copies into memory as a whole before the run starts.
        """
        for gated in list(self._gated.values()):
            session, host = gated.run.session, gated.run.planner.machine.host()
            if session.state is SessionState.IDLE and session.slab_bytes and host.room_bytes < need:
                session.give_up_unused()

    def _before_start(self, transformer: Any, arguments: Mapping[str, Any]) -> AbstractContextManager[None] | None:
        """Starts our run; every tensor is at its master before the wrapper moves blocks."""
        swap_args = arguments.get("block_swap_args")
        if not is_ours(swap_args):
            self._remove(unwrapped(transformer))
            return None
        try:
            with self._refusals_told(swap_args):
                return self._start(transformer, swap_args, arguments.get("model"))
        except BaseException:
            reset_counters(unwrapped(transformer))
            raise

    @contextlib.contextmanager
    def _refusals_told(self, swap_args: Any) -> Iterator[None]:
        try:
            yield
        except BlockSwapError as failure:
            if self._on_refused is not None:
                self._on_refused(failure, swap_args)
            raise

    def _start(self, outer: Any, swap_args: Any, model: Any) -> AbstractContextManager[None] | None:
        transformer = unwrapped(outer)
        check_transformer(transformer)
        refuse_cuda_graphs(entry(model, "compile_args"))
        refuse_vram_management(transformer, model)
        settings = SwapSettings.from_blockswapargs(swap_args)
        assert settings is not None, "is_ours has found them"
        parts = parts_of(transformer)
        gated = self._gated.get(transformer)
        if gated is not None and not gated.has_parts(parts):
            self._remove(transformer)  # as with a control model that was added since
            gated = None
        if gated is None:
            run = self._make_run(transformer, [(part.name, part.weights) for part in parts], settings)
            if run is None:
                return None
            gated = self._gated[transformer] = GatedModel(run, self._wrapper.packages, on_last_step=self._read_ahead)
        offload(parts, transformer.offload_device)
        offload_state_dict(transformer, model)
        gated.run.use(settings)
        gated.run.model = shown_name(entry(model, "model_name")) or type(transformer).__name__
        gated.run.session.listeners.on_master = replace_in(model)
        if self._on_start is not None:
            self._on_start(gated.run, swap_args)
        self._make_room(gated, host_weight_bytes(parts))
        hints_to_host = not settings.auto_hardware_tuning and settings.vace_blocks_to_swap > 0
        gated.start(outer, parts, hints_to_host=hints_to_host)
        return hidden(outer, parts)

    def _make_room(self, gated: GatedModel, need: int) -> None:
        """Makes models whose run has ended give up host memory that this one needs: first locks, then slabs.

        Args:
            gated: The model that is about to run.
            need: Bytes of its block weights.
        """
        planner, own = gated.run.planner, gated.run.session
        for session in self._idle_beside(gated):
            fresh = max(0, need - own.slab_bytes)  # its own slabs are there already
            short = planner.pins.left_bytes < fresh or planner.machine.host().room_bytes < fresh
            if short and session.pinned_bytes:
                own.take_over(session)
            if session.pinned_bytes and planner.pins.left_bytes < need:
                session.unlock()
            if session.slab_bytes and planner.machine.host().available_bytes < fresh:
                logger.info("RAM is short: what was kept of a model whose run has ended is freed")
                session.give_up_slabs()

    def _idle_beside(self, gated: GatedModel) -> list[SwapSession]:
        """Sessions of the other models whose run has ended."""
        sessions = [other.run.session for other in self._gated.values() if other is not gated]
        return [session for session in sessions if session.state is SessionState.IDLE]

    def _read_ahead(self, gated: GatedModel) -> None:
        """In a model's last step: the files of the model that may run next, such as the second expert, are read into
        the system's cache as far as memory allows.
        """
        for session in self._idle_beside(gated):
            session.read_ahead(gated.run.planner.machine.host().room_bytes)

    def _after(self, transformer: Any) -> None:
        """Clears the block counts that the wrapper's function has set, since they must not outlive the run."""
        if unwrapped(transformer) in self._gated:
            reset_counters(unwrapped(transformer))

    def _before_end(self, transformer: Any, arguments: Mapping[str, Any]) -> None:
        """Ends our run: every tensor is at its master before the wrapper offloads, so that it copies no block."""
        gated = self._gated.get(unwrapped(transformer))
        if gated is not None:
            gated.end(gated.error_on_its_way())
            self._limit_slabs(gated.run)

    def _limit_slabs(self, run: SwapRun) -> None:
        """Gives up the slabs unless the user wants to keep them and the host's memory allows it."""
        session = run.session
        if not self._keeps_slabs():
            session.give_up_slabs()
            return
        host = run.planner.machine.host()
        if session.slab_bytes and host.available_bytes < SCARCE_HOST_SHARE * host.physical_bytes:
            logger.info("RAM is nearly full: weights are not kept ready for the next run")
            session.give_up_slabs()

    def _remove(self, transformer: nn.Module) -> bool:
        """Leaves the transformer as if it had never carried our arguments. Returns whether it did."""
        reset_our_count(transformer)  # only ours: the sampler may just have set a count for the wrapper's own swapping
        gated = self._gated.pop(transformer, None)
        if gated is None:
            return False
        gated.close()
        return_unloaded_weights(transformer)
        return True


class GatedModel:
    """A transformer that carries our arguments: its run, and our `forward` on it while a run is in progress.

    Holds no reference to the transformer, whose lifetime belongs to the wrapper.

    Args:
        run: Its run.
        packages: The wrapper's, and those of its copies.
        on_last_step: A method, held weakly, that is called once in a run, when its last step begins.

    Attributes:
        hints_to_host: Whether VACE hints go to the host.
    """

    def __init__(self, run: SwapRun, packages: Sequence[str], *, on_last_step: Callable[[GatedModel], None]) -> None:
        self.run = run
        self.hints_to_host = False
        self._handled_at_start = id(None)
        self._parts: Sequence[Part] = ()
        self._packages = packages
        self._control: ControlModels | None = None
        self._on_last_step = weakref.WeakMethod(on_last_step)
        self._is_last_step = False
        # Weak, since a Forward may hold the module's former `forward`, and with it the module.
        self._armed: list[weakref.ref[Forward]] = []

    def has_parts(self, parts: Sequence[Part]) -> bool:
        """Whether these are the modules that it swaps, however they are compiled now."""
        return list(map(_unchanging, self._parts)) == list(map(_unchanging, parts))

    def start(self, outer: Any, parts: Sequence[Part], *, hints_to_host: bool) -> None:
        """Puts our `forward` in place.

        Args:
            outer: The transformer, or the module that torch.compile made of it.
            parts: The modules that are swapped.
            hints_to_host: Whether VACE hints go to the host from the first forward on.
        """
        self.end()
        self.hints_to_host, self._is_last_step, self._parts = hints_to_host, False, parts
        self._handled_at_start = id(sys.exc_info()[1])  # which lives at least as long as the call of the sampler
        transformer = unwrapped(outer)
        self._control = ControlModels(self._packages, self.run, transformer.offload_device)
        ours = Forward.on(transformer, self._forward), Forward.on(transformer, self._move, "_apply")
        self._armed = list(map(weakref.ref, ours))
        if outer is not transformer:
            logger.info("a model compiled as a whole runs uncompiled while blocks are swapped; compile only the blocks")
            self._armed.append(weakref.ref(Forward.on(outer, _call_uncompiled)))

    def error_on_its_way(self) -> BaseException | None:
        """What ends the run, where the wrapper offloads in a `finally`; not what a caller of the sampler handles."""
        failure = sys.exc_info()[1]
        return None if id(failure) == self._handled_at_start else failure

    def end(self, failure: BaseException | None = None) -> None:
        """Puts every `forward` back and ends the run, which `failure` may have ended."""
        self._disarm()
        try:
            self._end_control()
        finally:
            is_in_run = self.run.session.state is SessionState.ADOPTED
            self._release(failure if is_in_run else None)

    def close(self) -> None:
        """Leaves everything as it was before the first start."""
        self._disarm()
        try:
            self._end_control()
        finally:
            self.run.close()

    def _disarm(self) -> None:
        """Puts every `forward` back."""
        armed, self._armed = self._armed, []
        for reference in armed:
            forward = reference()
            if forward is not None:
                forward.disarm()

    def _end_control(self) -> None:
        control, self._control = self._control, None
        if control is not None:
            control.end()

    def _release(self, failure: BaseException | None = None) -> None:
        if self.run.session.state in (SessionState.IDLE, SessionState.ADOPTED):
            self.run.release(failure)

    def _forward(self, transformer: Any, original: Callable[..., Any], arguments: Any, keywords: Any) -> Any:
        try:
            return self._forward_or_retry(transformer, original, arguments, keywords)
        except BaseException as failure:  # since not every caller offloads after a failure
            try:
                self._end_control()
            finally:
                self._release(failure)
            raise

    def _move(self, transformer: Any, original: Callable[..., Any], arguments: Any, keywords: Any) -> Any:
        """`to` and the like on the whole model. Before it leaves the device between two forwards, as the text encoder
        asks for after a run without force_offload, all our memory there is freed, and no resident is copied back.
        """
        probe = torch.empty(0, device=transformer.main_device)
        if self.run.session.state is SessionState.ADOPTED and arguments[0](probe).device != probe.device:
            self._release()
        return original(*arguments, **keywords)

    def _forward_or_retry(self, transformer: Any, original: Callable[..., Any], arguments: Any, keywords: Any) -> Any:
        """One forward. If device memory runs out, it is called again with a smaller plan, unless that could change the
        result.
        """
        if keywords.get("last_step") and not self._is_last_step:
            self._is_last_step = True
            read_ahead = self._on_last_step()
            if read_ahead is not None:
                read_ahead(self)
        while True:
            has_started = False
            try:
                workload = self._prepare(transformer, arguments, keywords)
                has_started = True
                parts = self._current_parts(transformer)
                with (
                    native_swapping_disabled(transformer, hints_to_host=self.hints_to_host),
                    # The wrapper moves what is beside the blocks in the middle of a forward.
                    moves_disabled(part.module for part in parts if part.is_beside),
                    self.run.forward(workload, [part.module for part in parts], step=step_of(keywords)),
                    vace_blocks_entered(parts, self.run.session.enter),
                ):
                    return original(*arguments, **keywords)
            except RuntimeError as failure:
                if not (isinstance(failure, DeviceMemoryError) or is_out_of_memory(failure)):
                    raise
                reason, by_driver = str(failure).partition("\n")[0], is_driver_refusal(failure)
            # Outside the handler, since the failure's traceback holds what the forward had allocated.
            self.run.shrink(reason, by_driver=by_driver)
            step = keywords.get("current_step", 0)
            blocker = retry_blocker(transformer, original, step=step) if has_started else None
            if blocker is not None:
                raise OutOfVramError(not_again(blocker, reported=reason))
            logger.warning("%s; trying a smaller plan", reason)

    def _current_parts(self, transformer: Any) -> Sequence[Part]:
        """The parts with the modules that the forward will call, if the blocks have been compiled since the start."""
        if list(transformer.blocks) == [part.module for part in self._parts if part.name.startswith("blocks.")]:
            return self._parts
        parts = parts_of(transformer)
        if self.has_parts(parts):  # what another node has put there is not what the run began with
            self._parts = parts
        return parts

    def _prepare(self, transformer: Any, arguments: Any, keywords: Any) -> Workload | None:
        """Plans the forward and returns its workload. VACE hints go to the host if the plan has no room for them."""
        workload = workload_of(transformer, arguments, keywords, hints_to_host=self.hints_to_host)
        plan = self.run.prepare(workload)
        vace = len(vace_blocks_of(transformer))
        if self.hints_to_host or not vace or not plan.over_ceiling:
            return workload
        self.hints_to_host = True
        self.run.withdraw(workload)
        workload = workload_of(transformer, arguments, keywords, hints_to_host=True)
        self.run.prepare(workload)
        logger.info("the hints of %d VACE blocks go to RAM, since VRAM has no room for them", vace)
        return workload


def _unchanging(part: Part) -> tuple[str, nn.Module, list[nn.Module | None]]:
    """What of a part stays from run to run of the same model."""
    inside = [] if part.weights is unwrapped(part.module) else list(part.weights._modules.values())
    return part.name, unwrapped(part.module), inside


def _call_uncompiled(outer: Any, original: Callable[..., Any], arguments: Any, keywords: Any) -> Any:
    """Calls the transformer inside the module that torch.compile made of it."""
    return unwrapped(outer)(*arguments, **keywords)
