"""From a checkpoint file to blocks that are ready, and reading blocks from their file at each forward; cold and warm.

    python -m benchmarks.adopt [--model 14b] [--blocks N] [--device cuda] [--lock driver|mlock|none] [--json]

All blocks of a Wan transformer with random weights are swapped through two slots, and compute nothing. Cold files are
dropped from the system's cache before each figure, warm ones are in it. Other load on a machine only adds time: of
several adopts, the fastest is reported, and of the forwards of the file tier. Without a GPU, `mlock` locks the pages,
which pins them as the driver does but maps nothing into a device, and nothing is copied to a device.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from tqdm import tqdm
from wanvideo_enhanced_blockswap.blockswap import PinBudget, backend_for, blocks_of
from wanvideo_enhanced_blockswap.blockswap.device.backend import Backend
from wanvideo_enhanced_blockswap.blockswap.device.streams import InlineStreams
from wanvideo_enhanced_blockswap.blockswap.engine.placer import Listeners
from wanvideo_enhanced_blockswap.blockswap.engine.session import SwapSession
from wanvideo_enhanced_blockswap.blockswap.engine.transfer import Transfer
from wanvideo_enhanced_blockswap.blockswap.errors import SettingsError
from wanvideo_enhanced_blockswap.blockswap.host.pages import PageMemory
from wanvideo_enhanced_blockswap.blockswap.model.layout import ModelProfile
from wanvideo_enhanced_blockswap.blockswap.plan.make_plan import make_plan
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HeldMemory, SwapPlan
from wanvideo_enhanced_blockswap.commands.options import card_inputs, choose_device
from wanvideo_enhanced_blockswap.commands.wan_model import PRESETS, Preset, build, complete, expected_bytes, skeleton
from wanvideo_enhanced_blockswap.hardware import MIB, format_bytes, read_host_memory

from .compare.limits import EXACT_PINS
from .machine import dated, host, machine
from .page_locks import MlockRegistrar, NoDevice, TimedRegistrar

COPIED_BYTES = 512 * MIB
READ_BYTES = 16 * MIB
REPEATS = 5
FORWARDS = 3
"""Of the file tier, for each repeat."""
SHARE = 0.80
"""Share of the speed of plain reads (cold) and of a copy in memory (warm) that the file tier should reach."""
ASKED = {
    "file_over_reads": "file tier over plain reads, cold",
    "file_over_copy": "file tier over a copy in memory, warm",
    "pinned_over_swapped": "page-locked over swapped bytes",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """With cold or with warm files.

    Attributes:
        swapped_bytes: Bytes of the slabs.
        pinned_bytes: Host memory that is page-locked.
        refusals: Why not all of it is.
        first_copy_s: From the call of the first forward until the first block's copy to the device is queued.
        placed_s: … until the last block is in its slab, and locked.
        lock_s: The part of it in which pages were being locked.
        adopt_gbytes_per_s: Slab bytes over `placed_s`.
        file_gbytes_per_s: What a forward of the file tier reads, over its duration.
        read_gbytes_per_s: The same files, read from start to end by one thread, as `dd` does.
    """

    swapped_bytes: int
    pinned_bytes: int
    refusals: tuple[str, ...]
    first_copy_s: float
    placed_s: float
    lock_s: float
    adopt_gbytes_per_s: float
    file_gbytes_per_s: float
    read_gbytes_per_s: float


def write_files(preset: Preset, folder: Path) -> None:
    """Writes a file for each block, and one for the rest of the model."""
    from safetensors.torch import save_file

    model = build(preset, seed=0)
    parts = {name: block.state_dict(prefix=f"{name}.") for name, block in blocks_of(model)}
    inside = {key for part in parts.values() for key in part}
    parts["rest"] = {key: value for key, value in model.state_dict().items() if key not in inside}
    for name, part in tqdm(parts.items(), desc="writing", unit="file", disable=None):
        save_file(part, folder / f"{name}.safetensors")
        with (folder / f"{name}.safetensors").open("rb") as file:
            os.fsync(file.fileno())  # only bytes that are on the disk can be dropped from memory


def load(preset: Preset, folder: Path) -> nn.Module:
    """The model over its mapped files."""
    from safetensors.torch import load_file

    model = skeleton(preset, dtype=torch.bfloat16)
    weights = {key: value for path in sorted(folder.iterdir()) for key, value in load_file(path).items()}
    model.load_state_dict(weights, assign=True)
    return complete(model, preset)


def forget(folder: Path) -> None:
    """Drops the files from the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read(folder: Path) -> float:
    """Reads the files, which are in the page cache then; returns the speed in GB/s."""
    buffer, nbytes, begin = memoryview(bytearray(READ_BYTES)), 0, time.perf_counter()
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                nbytes += count
    return nbytes / (time.perf_counter() - begin) / 1e9


def measure(preset: Preset, folder: Path, options: argparse.Namespace, prepare: Callable[[Path], object]) -> Figures:
    """One adopt of all blocks, forwards of the file tier, and plain reads, each after `prepare`."""
    device = options.chosen
    backend: Backend = backend_for(device, pin_budget=PinBudget(1 << 50))
    registrar = MlockRegistrar() if options.lock == "mlock" else backend.registrar
    locks = None if options.lock == "none" or registrar is None else TimedRegistrar(registrar)
    backend = replace(backend, registrar=locks, overlap=True, host_room=None)
    if device.type == "cpu":
        backend = replace(backend, open_streams=lambda count, overlap: NoDevice(device))
    copied_at: list[float] = []
    placed_at: list[float] = []
    listeners = Listeners(on_placed=lambda *_: placed_at.append(time.perf_counter()))
    copy_chunks = Transfer._copy_chunks

    def note_and_copy(*arguments: Any) -> tuple[Any, ...]:
        events = copy_chunks(*arguments)
        copied_at.append(time.perf_counter())
        return events

    with (
        closing(_session(preset, folder, backend, listeners)) as session,
        mock.patch.object(Transfer, "_copy_chunks", note_and_copy),
    ):
        prepare(folder)
        begin = time.perf_counter()
        _forward(session, preset.layers)
        placed_s, lock_s = placed_at[-1] - begin, 0.0 if locks is None else locks.seconds
        swapped_bytes, pinned_bytes, refusals = session.slab_bytes, session.pinned_bytes, session.refusals
    with closing(_session(preset, folder, replace(backend, host_room=lambda: 0))) as session:
        _forward(session, preset.layers)
        seconds = []
        for _ in range(FORWARDS):
            prepare(folder)
            seconds.append(_forward(session, preset.layers))
    prepare(folder)
    return Figures(
        swapped_bytes=swapped_bytes,
        pinned_bytes=pinned_bytes,
        refusals=refusals,
        first_copy_s=copied_at[0] - begin,
        placed_s=placed_s,
        lock_s=lock_s,
        adopt_gbytes_per_s=swapped_bytes / placed_s / 1e9,
        file_gbytes_per_s=swapped_bytes / min(seconds) / 1e9,
        read_gbytes_per_s=read(folder),
    )


def _forward(session: SwapSession, blocks: int) -> float:
    """Seconds of a forward that computes nothing, until the next one's first copies are done: a copy for each block."""
    begin = time.perf_counter()
    with session.forward():
        for block in range(blocks):
            session.enter(block)
    transfer = session._holds.transfer
    assert transfer is not None
    assert transfer.unlocked is not None
    transfer.unlocked.drain()
    if transfer.streams.device.type == "cuda":
        torch.cuda.synchronize(transfer.streams.device)
    return time.perf_counter() - begin


def _session(preset: Preset, folder: Path, backend: Backend, listeners: Listeners | None = None) -> SwapSession:
    """Of a model that has just been loaded. Its blocks are read from their files if the host has no room."""
    room_bytes = 1 << 50 if backend.host_room is None else backend.host_room()

    def plan(profile: ModelProfile, _: HeldMemory) -> SwapPlan:
        inputs = card_inputs(profile, 1 << 50, read_host_memory())
        inputs = replace(inputs, blocks_to_swap=len(profile.blocks), slots=2, pin=backend.registrar is not None)
        return make_plan(profile, replace(inputs, host_room_bytes=room_bytes, pin_budget_bytes=1 << 50))

    return SwapSession(blocks_of(load(preset, folder)), plan, backend, listeners=listeners)


def copies(nbytes: int) -> tuple[float, float]:
    """Speeds in GB/s of copies to untouched pages, as a slab's are, and of more copies to the same pages."""
    source, streams = torch.ones(min(nbytes, COPIED_BYTES), dtype=torch.uint8), InlineStreams(torch.device("cpu"))
    speeds, targets = [], [PageMemory(source.nbytes, streams).tensor for _ in range(nbytes // source.nbytes)]
    for _ in range(REPEATS):
        begin = time.perf_counter()
        for target in targets:
            target[: source.nbytes].copy_(source)
        speeds.append(len(targets) * source.nbytes / (time.perf_counter() - begin) / 1e9)
    return speeds[0], max(speeds)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options; a wrong one ends the process with one line."""
    parser = argparse.ArgumentParser(prog="benchmarks.adopt", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="14b", choices=tuple(PRESETS))
    parser.add_argument("--blocks", type=int, default=5, help="number of blocks")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--lock", choices=("driver", "mlock", "none"), help="how pages are locked")
    parser.add_argument("--repeats", type=int, default=3, help="number of times; the best is reported")
    parser.add_argument("--scratch", type=Path, help="folder for the files (default: a temporary one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args(words)
    try:
        options.chosen = choose_device(options.device)
    except SettingsError as failure:
        parser.error(str(failure))
    options.lock = options.lock or ("mlock" if options.chosen.type == "cpu" else "driver")
    if options.lock == "driver" and options.chosen.type != "cuda":
        parser.error("--lock driver needs a CUDA or HIP device; use mlock or none")
    if options.repeats < 1 or options.blocks < 3:
        parser.error("--repeats must be 1 or more, and --blocks 3 or more, because two slots hold two blocks")
    scratch = options.scratch or Path(tempfile.gettempdir())
    if not scratch.is_dir():
        parser.error(f"--scratch: expected an existing folder, got {str(scratch)!r}")
    options.preset = replace(PRESETS[options.model], layers=options.blocks)
    need, free = expected_bytes(options.preset), shutil.disk_usage(scratch).free
    if 1.1 * need > free:
        parser.error(
            f"not enough disk space in {scratch}: {format_bytes(int(1.1 * need))} needed for {options.preset.layers} "
            f"blocks, {format_bytes(free)} free; lower --blocks, or choose another folder with --scratch"
        )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the figures."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(words)
    preset = options.preset
    ways: dict[str, Callable[[Path], object]] = {"warm": read}
    if hasattr(os, "posix_fadvise"):
        ways["cold"] = forget
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        write_files(preset, folder)
        runs = {
            way: [measure(preset, folder, options, prepare) for _ in range(options.repeats)]
            for way, prepare in ways.items()
        }
    found = {way: min(some, key=lambda run: run.placed_s) for way, some in runs.items()}
    warm, cold = found["warm"], found.get("cold")
    fresh, copy = copies(warm.swapped_bytes)
    ran_on = host() if options.chosen.type == "cpu" else machine(options.chosen)
    result = {
        "heading": f"`{' '.join(['python -m benchmarks.adopt', *words])}`: {dated(ran_on)}",
        "blocks": preset.layers,
        **{way: asdict(figures) for way, figures in found.items()},
        "copy_gbytes_per_s": copy,
        "fresh_copy_gbytes_per_s": fresh,
        "file_over_reads": None if cold is None else cold.file_gbytes_per_s / cold.read_gbytes_per_s,
        "file_over_copy": warm.file_gbytes_per_s / copy,
        "pinned_over_swapped": warm.pinned_bytes / warm.swapped_bytes,
    }
    print(json.dumps(result) if options.json else "\n".join(text(result, found)))
    return 0


def text(result: dict[str, Any], found: dict[str, Figures]) -> Iterator[str]:
    """The figures as a table, and what is asked of them."""
    yield f"{result['heading']}\n\n{result['blocks']} blocks, {format_bytes(found['warm'].swapped_bytes)}\n"
    yield f"| | {' | '.join(found)} |\n| --- |{' --- |' * len(found)}"
    for name in (field.name for field in fields(Figures)[3:]):
        yield f"| {name} | {' | '.join(f'{getattr(figures, name):.2f}' for figures in found.values())} |"
    copy, fresh = result["copy_gbytes_per_s"], result["fresh_copy_gbytes_per_s"]
    yield f"\na copy in memory {copy:.2f} GB/s, to untouched pages {fresh:.2f} GB/s"
    for name, what in ASKED.items():
        if (share := result[name]) is not None:
            is_met = share <= EXACT_PINS if name == "pinned_over_swapped" else share >= SHARE
            yield f"- {'met' if is_met else 'NOT MET'}: {share:.3f} {what}"
    yield from found["warm"].refusals


if __name__ == "__main__":
    sys.exit(main())
