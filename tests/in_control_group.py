"""A process of its own, in a memory control group that is smaller than its model: loads, runs, and reports its memory.

    python tests/in_control_group.py JOIN FILE LAYERS OUTPUTS planned|locked|slabs

JOIN is the file of the group that takes a process; what the process holds before that is not charged to the group. With
`locked`, page-locks (mlock) stand in for those of a driver; with `slabs`, every block has a slab, whatever room there
is. Device memory is host memory here, so that the group is charged for it as well.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from simulated_machine import CARD
from standin import WanModel
from standin.nodes_model_loading import load_weights
from standin.request import Request, inputs, noise
from wanvideo_enhanced_blockswap.blockswap import PinBudget, SwapRun, SwapSettings, blocks_of
from wanvideo_enhanced_blockswap.blockswap.device.backend import backend_for
from wanvideo_enhanced_blockswap.hardware import GIB, DeviceMemory, DiskSpeed, HostMemory, LinkSpeed, read_host_memory
from wanvideo_enhanced_blockswap.hardware.disk import measure_disk

from benchmarks.page_locks import MlockRegistrar

CPU = torch.device("cpu")
FORWARDS = 3
WIDTH = 1024
BLOCK_BYTES = 16 * WIDTH * WIDTH * 4
"""Of the matrices of one block: eight of the width, and two that are four times as large."""


class LockableHost(HostMemory):
    """A host of which a plan may lock whatever it may take; a real one keeps 4 GB that are never locked."""

    @property
    def pin_budget_bytes(self) -> int:
        return self.room_bytes


@dataclass
class GroupMachine:
    """A card with much memory, and the host as it is, or as `way` pretends."""

    way: str
    spec = CARD

    def memory(self) -> DeviceMemory:
        return DeviceMemory(16 * GIB, 16 * GIB, "made up")

    def unused_cache_bytes(self) -> int:
        return 0

    def allocated_bytes(self) -> int:
        return 0

    def peak_bytes(self) -> int:
        return 0

    def reset_peak(self) -> bool:
        return False

    def host(self) -> HostMemory:
        read = read_host_memory()
        if self.way == "slabs":
            return replace(read, available_bytes=read.physical_bytes, cgroup_limit_bytes=None)
        return LockableHost(**asdict(read)) if self.way == "locked" else read

    def link(self) -> LinkSpeed | None:
        return None

    def disk(self, path: str) -> DiskSpeed | None:
        return measure_disk(path)


class MemorySampler:
    """The most anonymous and locked memory that the process has had while it was watched, in bytes."""

    def __init__(self) -> None:
        self.anonymous_bytes = self.locked_bytes = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.01):
            self.anonymous_bytes = max(self.anonymous_bytes, of_process("smaps_rollup", "Anonymous"))
            self.locked_bytes = max(self.locked_bytes, of_process("status", "VmLck"))


def of_process(file: str, name: str) -> int:
    """A figure of this process in /proc, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self", file).read_text(), re.MULTILINE)
    assert found is not None, name
    return int(found[1]) * 1024


def build(layers: int, device: str = "meta") -> WanModel:
    """The model without its weights."""
    with torch.device(device):
        model = WanModel(dim=WIDTH, ffn_dim=4 * WIDTH, num_heads=8, num_layers=layers, main_device=CPU)
    return model.eval().requires_grad_(False)


def load(model: WanModel, weights: dict[str, torch.Tensor]) -> None:
    """As the wrapper loads them: in the type that the file has, so that each parameter is the file's mapping."""
    types = {"weight_dtype": torch.float32, "base_dtype": torch.float32}
    load_weights(model, weights, transformer_load_device=CPU, **types)


def predict(model: WanModel, seed: int) -> torch.Tensor:
    """One forward."""
    generator, request = torch.Generator().manual_seed(seed), Request()
    given = inputs(request, generator, CPU)
    x, context = [noise(request, generator, CPU)], given["positive"]
    with torch.inference_mode():
        return model(x, torch.tensor([500.0]), context, given["seq_len"])[0][0]


def make_run(model: WanModel, way: str) -> SwapRun:
    """A run of the model that swaps all blocks, with a worker as on a card with streams."""
    backend = backend_for(CPU, pin_budget=PinBudget(1 << 40))
    backend = replace(
        backend,
        registrar=MlockRegistrar() if way == "locked" else None,
        overlap=True,
        host_room=None if way == "slabs" else backend.host_room,
    )
    settings = SwapSettings(auto_hardware_tuning=False, blocks_to_swap=len(model.blocks))
    return SwapRun(blocks_of(model), settings, GroupMachine(way), backend, root=model)


def main(join: str, file: str, layers: str, results: str, way: str) -> None:
    torch.set_num_threads(1)
    first = build(1, "cpu")
    with make_run(first, way).forward():  # imports, and what torch allocates once
        predict(first, 0)
    del first
    before = of_process("smaps_rollup", "Anonymous")
    Path(join).write_text(str(os.getpid()))
    model = build(int(layers))
    load(model, load_file(file))
    run, outputs = make_run(model, way), {}
    with MemorySampler() as most:
        for seed in range(FORWARDS):
            with run.forward():
                outputs[str(seed)] = predict(model, seed)
        tiers = [tier.value for tier in run.session.tiers.values()]
        run.release()
    save_file(outputs, results)
    plan = run.plan
    assert plan is not None
    figures = {
        "anonymous_bytes": most.anonymous_bytes - before,
        "locked_bytes": most.locked_bytes,
        "added_bytes": plan.added_bytes,
        "pinned_bytes": plan.pinned_bytes,
        "device_bytes": plan.device_bytes,
        "file_bytes": plan.file_bytes,
        "tiers": {tier: tiers.count(tier) for tier in sorted(set(tiers))},
        "reasons": plan.reasons,
    }
    sys.stdout.write(json.dumps(figures))
    run.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
