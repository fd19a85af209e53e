"""What this package reads from ComfyUI: the user's settings, flags, folders, the device, and the loaded wrapper."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .blockswap.device.backend import backend_for
from .blockswap.errors import BlockSwapError, SettingsError, WrapperError
from .blockswap.model.activations import activation_bytes
from .blockswap.model.recognise import profile_tensors
from .blockswap.model.wan import tokens_for
from .blockswap.plan.make_plan import Limits, Readings, make_plan, plan_inputs
from .blockswap.plan.swap_plan import Activations, SwapPlan
from .blockswap.run.machine import TorchMachine
from .blockswap.run.planner import limits_within
from .blockswap.run.progress import Phase, Progress, failed
from .blockswap.run.run import SwapRun
from .blockswap.settings import SwapSettings, node_of
from .blockswap.wrapper.find import find_wrapper
from .blockswap.wrapper.gate import Gate
from .blockswap.wrapper.loader import stored_tensors
from .blockswap.wrapper.wiring import wrong_with_setting
from .hardware import (
    GIB,
    READING_FAILURES,
    DeviceMemory,
    HardwareUnavailableError,
    HostMemory,
    Sampler,
    probe_device,
    read_host_memory,
)
from .hardware.pinning import PinBudget
from .node_progress import NodeProgress

logger = logging.getLogger(__name__)

FOLDER = "wanvideo-enhanced-blockswap"

WEB = Path(__file__).absolute().parent / "web"

NO_SWAPPING = {
    "cpu": "the CPU computes from host memory",
    "mps": "Apple's GPUs share the host's memory",
    "privateuseone": "DirectML's tensors cannot be pointed at other memory",
    "xpu": "Intel GPUs have not been tried",
}
"""Devices on which nothing is swapped, and why."""

MOST_GIB = 1024
"""The largest pin budget that the dialog accepts."""

KEEP_HOST_SLABS = "WanVideoEnhancedBlockSwap.KeepHostSlabs"
PIN_BUDGET_GIB = "WanVideoEnhancedBlockSwap.PinBudgetGiB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """The user's settings in ComfyUI's dialog, with defaults for those that the user never set.

    Attributes:
        keep_host_slabs: Keep the page-locked copies from one run to the next, while memory allows.
        pin_budget_bytes: The most host memory to page-lock; None for the host's own limit.
    """

    keep_host_slabs: bool = True
    pin_budget_bytes: int | None = None

    @classmethod
    def read(cls, path: Path) -> Preferences:
        """Reads ComfyUI's file of settings; without a file, gives the defaults.

        Raises:
            SettingsError: The file cannot be read, or has a value of ours that the dialog never writes.
        """
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, RecursionError) as exc:
            raise SettingsError(f"{path.name} cannot be read as JSON: {exc}") from exc
        if not isinstance(stored, Mapping):
            raise SettingsError(f"{path.name}: expected a JSON object, got {type(stored).__name__}")
        keep, budget = stored.get(KEEP_HOST_SLABS, True), stored.get(PIN_BUDGET_GIB, 0)
        if not isinstance(keep, bool):
            raise SettingsError(f"{KEEP_HOST_SLABS}: expected true or false, got {keep!r}; set it again")
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 <= budget <= MOST_GIB:
            raise SettingsError(f"{PIN_BUDGET_GIB}: expected 0 to {MOST_GIB} GB, got {budget!r}; set it again")
        return cls(keep_host_slabs=keep, pin_budget_bytes=int(budget * GIB) or None)


class ComfyMachine(TorchMachine):
    """The machine, with ComfyUI's own figures where a device's torch module does not report its memory."""

    def memory(self) -> DeviceMemory:
        try:
            return super().memory()
        except HardwareUnavailableError:
            import comfy.model_management

            device = torch.device(self.spec.torch_device)
            total = int(comfy.model_management.get_total_memory(device))
            free = int(comfy.model_management.get_free_memory(device))
            return DeviceMemory(total, max(0, min(free, total)), "ComfyUI")

    def host(self) -> HostMemory:
        """Less what --cache-ram keeps available beyond our own floor: with less, ComfyUI drops the loaded model."""
        host = super().host()
        beyond = max(0, _kept_by_cache(host.physical_bytes) - (host.available_bytes - host.room_bytes))
        return replace(host, available_bytes=max(0, host.available_bytes - beyond))


class ComfyUI:
    """The ComfyUI of this process, with what all nodes share: the gate, and the limit of page-locked memory.

    Attributes:
        gate: None until a node has run.
    """

    def __init__(self) -> None:
        self.gate: Gate | None = None
        self._pins = PinBudget(0)
        self._warned: set[str] = set()

    def install_gate(self) -> Gate:
        """Installs the gate, unless it is installed and whole, and returns it.

        Raises:
            WrapperMissingError: The wrapper is absent.
            WrapperError: It has changed, or is too old.
        """
        if self.gate is not None and not self.gate.is_whole:
            self.gate.restore()
            self.gate = None
        if self.gate is None:
            import nodes

            wrapper = find_wrapper(nodes.NODE_CLASS_MAPPINGS)
            for refused in wrapper.refused:
                self.warn_once(f"{refused}; its models keep its own, slower swapping, of every block")
            self.gate = Gate(
                wrapper,
                self._make_run,
                on_start=self._on_start,
                on_set=self._on_set,
                on_refused=self._on_refused,
                keeps_slabs=lambda: self._preferences().keep_host_slabs,
            )
        self.gate.install()
        return self.gate

    def check_at_start(self, name: str, node: type) -> None:
        """Checks, once ComfyUI has loaded all packs and starts its server, what `check` does; without one, nothing."""
        server = _server()
        starting = getattr(getattr(server, "app", None), "on_startup", None)
        if starting is None or getattr(starting, "frozen", True):  # it runs already, or is not ComfyUI's
            return
        import nodes

        earlier = nodes.NODE_CLASS_MAPPINGS.get(name)

        async def on_startup(_: Any) -> None:
            # Called by the loop, since an exception here would end ComfyUI's start.
            server.loop.call_soon(self.check, name, node, earlier)

        starting.append(on_startup)

    def check(self, name: str, node: type, earlier: type | None) -> None:
        """Logs which folder has the node, if another has one of the same name; else why there is no wrapper, if so.

        Args:
            name: Under which both are in ComfyUI's NODE_CLASS_MAPPINGS, where the pack that is loaded last wins.
            node: Ours.
            earlier: The node that ours has replaced; None without.
        """
        import nodes

        used = nodes.NODE_CLASS_MAPPINGS.get(name, node)
        if used is not node and hasattr(getattr(sys.modules.get(used.__module__), "COMFYUI", None), "check"):
            # Of another copy of this package, which logs it. The browser must load the scripts of one copy alone.
            for folder in [folder for folder, web in nodes.EXTENSION_WEB_DIRS.items() if Path(web) == WEB]:
                del nodes.EXTENSION_WEB_DIRS[folder]
            return
        unused = node if used is not node else earlier
        if unused is not None and unused.__module__ != used.__module__:
            last, first = (f"{_folder(one)}{' (this package)' if one is node else ''}" for one in (used, unused))
            self.warn_once(
                f"two folders have the node {name}: ComfyUI uses that of {last}, which is loaded last, and not that of "
                f"{first}; remove one of the two folders and restart ComfyUI"
            )
        try:
            find_wrapper(nodes.NODE_CLASS_MAPPINGS)
        except WrapperError as failure:
            self.warn_once(str(failure))

    def why_not_swapped(self, settings: SwapSettings) -> str | None:
        """Why the device or ComfyUI's flags rule out swapping; None where swapping is on."""
        import comfy.model_management
        from comfy.cli_args import args

        device = comfy.model_management.get_torch_device()
        kind = getattr(device, "type", "privateuseone")  # DirectML gives an object of its own
        if kind in NO_SWAPPING:
            return f"{device}: {NO_SWAPPING[kind]}"
        if not settings.auto_hardware_tuning:
            return None
        if probe_device(device).is_integrated:
            return f"{device} shares the host's memory, so swapping frees nothing; a manual blocks_to_swap still works"
        if args.gpu_only or args.highvram:
            return f"ComfyUI runs with {'--gpu-only' if args.gpu_only else '--highvram'}, which keeps models on the GPU"
        return None

    def preview(self, patcher: Any, settings: SwapSettings, shape: tuple[int, int, int]) -> tuple[SwapPlan, str]:
        """The plan for a sampler that runs now, of a video of (width, height, frames), and the name of the device.

        Raises:
            BlockSwapError: The model or the shape is not valid, or no plan fits.
            HardwareUnavailableError: The device does not report its memory.
        """
        import comfy.model_management

        model = patcher.model
        found = profile_tensors("the loaded model", stored_tensors(model, patcher.patches))
        tokens = tokens_for(found.architecture, *shape)
        device = comfy.model_management.get_torch_device()
        machine = ComfyMachine(device, cache_dir=_user_folder())
        backend = backend_for(device, pin_budget=self._pin_budget())
        memory, limits = machine.memory(), limits_within(_limits(), backend)
        # The sampler makes ComfyUI unload its models first, and loads the weights outside the blocks.
        unloaded = sum(loaded.model_loaded_memory() for loaded in comfy.model_management.current_loaded_models)
        free = min(memory.total_bytes, memory.free_bytes + unloaded + machine.unused_cache_bytes())
        free_bytes = max(0, free - found.model.other_bytes)
        readings = Readings(spec=machine.spec, memory=replace(memory, free_bytes=free_bytes), host=machine.host())
        inputs = plan_inputs(found.model, settings, readings, limits)
        inputs = replace(
            inputs,
            pin_budget_bytes=min(inputs.pin_budget_bytes, self._pin_budget().limit_bytes),
            activations=Activations(
                nbytes=activation_bytes(found.architecture, tokens, found.forward_options), is_measured=False
            ),
        )
        return make_plan(found.model, inputs), machine.spec.name

    def warn_once(self, message: str) -> None:
        """Logs a warning, once for each text."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("%s", message)

    def report_off(self, why: str, *, node: str | None) -> None:
        """Reports why we swap nothing, in the log and on the node with this id."""
        self.warn_once(why)
        self._show(node, Progress(phase=Phase.OFF, why=why))

    def _show(self, node: str | None, progress: Progress) -> None:
        display = self.progress_on(node)
        if display is not None:
            display(progress)

    def progress_on(self, node: str | None, *, model: str = "") -> NodeProgress | None:
        """The display of a model's progress on the node with this id; None without one, or without a server, as in a
        script.
        """
        server = _server()
        if server is None or node is None:
            return None
        return NodeProgress(
            node,
            lambda event, data: server.send_sync(event, data, server.client_id),
            lambda text, of_node: server.send_progress_text(text, of_node, server.client_id),
            model=model,
            workflow=_running_workflow(server),
        )

    def _on_start(self, run: SwapRun, arguments: Mapping[str, Any]) -> None:
        self._pin_budget()
        run.watcher = self.progress_on(node_of(arguments), model=run.model)

    def _on_refused(self, why: BlockSwapError, arguments: Mapping[str, Any]) -> None:
        self._show(node_of(arguments), failed(why))

    def _on_set(self, patcher: Any, arguments: Any) -> None:
        wrong = wrong_with_setting(patcher, arguments)
        if wrong is not None:
            self.report_off(wrong.why, node=None if wrong.lost is None else node_of(wrong.lost))

    def _pin_budget(self) -> PinBudget:
        """The limit of page-locked memory under the user's present settings, less what ComfyUI has locked itself."""
        try:
            limit = read_host_memory().pin_budget_bytes
        except READING_FAILURES as failure:
            self.warn_once(f"host memory cannot be read: {failure}; the limit of locked RAM stays as it is")
            return self._pins
        asked = self._preferences().pin_budget_bytes
        limit = limit if asked is None else min(limit, asked)
        self._pins.limit_bytes = max(0, limit - self._comfyui_locks(limit))
        return self._pins

    def _comfyui_locks(self, limit: int) -> int:
        """Host memory that ComfyUI has page-locked for its own models. It gives up that of idle models where it leaves
        less than half of `limit`: two limits of 40 % of RAM are more than Windows locks.
        """
        import comfy.model_management as management

        locked = int(getattr(management, "TOTAL_PINNED_MEMORY", 0))  # ComfyUI from 2025-10 on
        free_registrations = getattr(management, "free_registrations", None)
        if free_registrations is not None and locked > limit // 2:
            free_registrations(locked - limit // 2, evict_active=False)
            locked = int(management.TOTAL_PINNED_MEMORY)
        return locked

    def _preferences(self) -> Preferences:
        """The user's settings; defaults with --multi-user, where each user has a file but memory is shared."""
        import folder_paths
        from comfy.cli_args import args

        if getattr(args, "multi_user", False):
            return Preferences()
        path = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
        try:
            return Preferences.read(path)
        except SettingsError as failure:
            self.warn_once(f"{failure}; the settings of block swapping are at their defaults until then")
            return Preferences()

    def _make_run(self, transformer: Any, blocks: Sequence[tuple[str, Any]], settings: SwapSettings) -> SwapRun | None:
        try:
            machine = ComfyMachine(transformer.main_device, cache_dir=_user_folder())
        except HardwareUnavailableError as failure:
            self.warn_once(f"blocks are not swapped by us: {failure}")
            return None
        return SwapRun(
            blocks,
            settings,
            machine,
            backend_for(transformer.main_device, pin_budget=self._pin_budget()),
            root=transformer,
            limits=_limits(),
            sampler=Sampler(machine.spec),
            trace_dir=_temp_folder(),
        )


def _server() -> Any:
    """ComfyUI's server; None in a script."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def _running_workflow(server: Any) -> str | None:
    """The id of the workflow that ComfyUI executes now; None for prompts without a workflow, as through the API."""
    running = getattr(getattr(server, "prompt_queue", None), "currently_running", None) or {}
    for item in list(running.values()):  # of one executor, at most one: number, id, prompt, extra data, outputs
        extra = item[3] if len(item) > 3 and isinstance(item[3], dict) else {}  # noqa: PLR2004 - as listed above
        found = (extra.get("extra_pnginfo") or {}).get("workflow") or {}
        return found.get("id") if isinstance(found.get("id"), str) else None
    return None


def _folder(node: type) -> str:
    """The folder of a node's pack, as in ComfyUI's own name for it."""
    return str(getattr(node, "RELATIVE_PYTHON_MODULE", node.__module__)).replace(".", "/", 1)


def _limits() -> Limits:
    """The limits that ComfyUI's flags set."""
    from comfy.cli_args import args

    reserve = getattr(args, "reserve_vram", None)
    return Limits(
        pin=not getattr(args, "disable_pinned_memory", False),
        overlap=not getattr(args, "disable_async_offload", False),
        reserve_bytes=0 if reserve is None else int(reserve * GIB),
        must_swap_all=bool(getattr(args, "novram", False)),
    )


def _kept_by_cache(ram_bytes: int) -> int:
    """Host memory that --cache-ram keeps available."""
    from comfy.cli_args import args

    # ComfyUI 0.24 made it a list, empty by default: its cache then keeps no more than our floor.
    asked = getattr(args, "cache_ram", None) or 0.0
    kept = float(asked[0] if isinstance(asked, list) else asked)
    # Before, the flag without a number was -1: a quarter of RAM.
    nbytes = int(kept * GIB) if kept >= 0 else min(max(ram_bytes // 4, 4 * GIB), 32 * GIB)
    return nbytes if nbytes < ram_bytes else 0  # ComfyUI drops every model, whatever is left to it


def _user_folder() -> Path:
    import folder_paths

    return Path(folder_paths.get_user_directory()) / FOLDER


def _temp_folder() -> Path:
    import folder_paths

    return Path(folder_paths.get_temp_directory()) / FOLDER
