"""From a checkpoint file to blocks that are ready: read, copied into slabs, page-locked, the first ones on the device.

    python -m benchmarks.adopt [--model 14b] [--blocks N] [--device cuda] [--lock driver|mlock|none] [--cold] [--json]

All blocks of a Wan transformer with random weights are swapped through two slots. Their files are mapped, as ComfyUI
loads them; with `--cold` they come from the disk. The report has the speed of the whole adopt, in slab bytes per
second, the speed of plain copies in memory, and page-locked bytes over swapped bytes. Each speed is the best of several
repeats, because other load on a machine only adds time. Without a GPU, `mlock` locks the pages, which pins them as the
driver does but maps nothing into a device, and nothing is copied to a device.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from wanvideo_enhanced_blockswap.blockswap import PinBudget, backend_for, blocks_of
from wanvideo_enhanced_blockswap.blockswap.device.backend import Backend
from wanvideo_enhanced_blockswap.blockswap.device.streams import InlineStreams
from wanvideo_enhanced_blockswap.blockswap.engine.session import SwapSession
from wanvideo_enhanced_blockswap.blockswap.errors import SettingsError
from wanvideo_enhanced_blockswap.blockswap.host.pages import PageMemory
from wanvideo_enhanced_blockswap.blockswap.model.layout import ModelProfile
from wanvideo_enhanced_blockswap.blockswap.plan.make_plan import make_plan
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier, SwapPlan
from wanvideo_enhanced_blockswap.commands.options import card_inputs, choose_device
from wanvideo_enhanced_blockswap.commands.wan_model import PRESETS, Preset, build, complete, expected_bytes, skeleton
from wanvideo_enhanced_blockswap.hardware import MIB, format_bytes, read_host_memory
from wanvideo_enhanced_blockswap.hardware.pinning import Registrar

from .compare.limits import EXACT_PINS
from .machine import dated, host, machine
from .page_locks import MlockRegistrar, NoDevice, TimedRegistrar

MEMORY_SHARE = 3.3
"""Host memory over the blocks' bytes: the model that is written, its files in the page cache, the slabs."""
COPIED_BYTES = 512 * MIB
REPEATS = 5
SHARE = 0.70
"""Share of the speed of a copy in memory that an adopt should reach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted:
    """Figures of one adopt.

    Attributes:
        swapped_bytes: Bytes of the slabs.
        load_s: Time to map the files.
        adopt_s: Time to fill and lock slabs, until the first blocks are on the device.
        lock_s: The part of it in which pages were being locked, while slabs were filled.
        pinned_bytes: Host memory that is page-locked afterwards.
        refusals: Why not all of it is page-locked.
    """

    swapped_bytes: int
    load_s: float
    adopt_s: float
    lock_s: float
    pinned_bytes: int
    refusals: tuple[str, ...]

    @property
    def gbytes_per_s(self) -> float:
        """Slab bytes over the time from file to ready."""
        return self.swapped_bytes / (self.load_s + self.adopt_s) / 1e9


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


def touch(folder: Path) -> None:
    """Reads the files into the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            while file.read(16 * MIB):
                pass


def adopt(preset: Preset, folder: Path, device: torch.device, registrar: Registrar | None) -> Adopted:
    """One adopt of all blocks."""
    timed = None if registrar is None else TimedRegistrar(registrar)
    backend: Backend = replace(backend_for(device, pin_budget=PinBudget(1 << 50)), registrar=timed)
    if device.type == "cpu":
        backend = replace(backend, open_streams=lambda count, overlap: NoDevice(device))
    begin = time.perf_counter()
    model = load(preset, folder)
    loaded = time.perf_counter()
    with closing(SwapSession(blocks_of(model), lambda profile, held: _plan(profile, backend), backend)) as session:
        session.adopt()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ready = time.perf_counter()
        return Adopted(
            swapped_bytes=session.slab_bytes,
            load_s=loaded - begin,
            adopt_s=ready - loaded,
            lock_s=0.0 if timed is None else timed.seconds,
            pinned_bytes=session.pinned_bytes,
            refusals=session.refusals,
        )


def _plan(profile: ModelProfile, backend: Backend) -> SwapPlan:
    inputs = card_inputs(profile, 1 << 50, read_host_memory())
    plan = make_plan(profile, replace(inputs, blocks_to_swap=len(profile.blocks), slots=2))
    tier = HostTier.PAGEABLE if backend.registrar is None else HostTier.PINNED
    return replace(plan, tiers=(tier,) * len(plan.swapped))


def copy_gbytes_per_s() -> float:
    """Speed of a copy between touched pages, on all of torch's threads."""
    source, target = (torch.ones(COPIED_BYTES, dtype=torch.uint8) for _ in range(2))
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - begin)
    return COPIED_BYTES / min(seconds) / 1e9


def fresh_copy_gbytes_per_s(nbytes: int) -> float:
    """Speed of copies of `nbytes` in all to untouched pages, as those of a slab: the system zeroes each page first, and
    a virtual machine may need to get it from its host.
    """
    source, streams = torch.ones(min(nbytes, COPIED_BYTES), dtype=torch.uint8), InlineStreams(torch.device("cpu"))
    count = max(1, nbytes // source.nbytes)
    begin = time.perf_counter()
    targets = [PageMemory(source.nbytes, streams) for _ in range(count)]
    for target in targets:
        target.tensor[: source.nbytes].copy_(source)
    return count * source.nbytes / (time.perf_counter() - begin) / 1e9


def _registrar(lock: str, device: torch.device) -> Registrar | None:
    if lock == "none":
        return None
    return MlockRegistrar() if lock == "mlock" else backend_for(device, pin_budget=PinBudget(0)).registrar


def _blocks_that_fit(preset: Preset) -> int:
    each = expected_bytes(preset) / preset.layers
    return max(1, min(preset.layers, int(read_host_memory().available_bytes / MEMORY_SHARE / each)))


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options; a wrong one ends the process with one line."""
    parser = argparse.ArgumentParser(prog="benchmarks.adopt", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="14b", choices=tuple(PRESETS))
    parser.add_argument("--blocks", type=int, help="number of blocks (default: as many as the host's memory holds)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--lock", choices=("driver", "mlock", "none"), help="how pages are locked")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache first")
    parser.add_argument("--repeats", type=int, default=3, help="number of adopts; the fastest is reported")
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
    if options.repeats < 1 or (options.blocks is not None and options.blocks < 3):
        parser.error("--repeats must be 1 or more, and --blocks 3 or more, because two slots hold two blocks")
    scratch = options.scratch or Path(tempfile.gettempdir())
    if not scratch.is_dir():
        parser.error(f"--scratch: expected an existing folder, got {str(scratch)!r}")
    preset = PRESETS[options.model]
    options.preset = replace(preset, layers=options.blocks or _blocks_that_fit(preset))
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
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        write_files(preset, folder)
        runs, fresh_copies = [], []
        for _ in range(options.repeats):
            fresh_copies.append(fresh_copy_gbytes_per_s(expected_bytes(preset)))
            (forget if options.cold else touch)(folder)
            runs.append(adopt(preset, folder, options.chosen, _registrar(options.lock, options.chosen)))
    copy, fresh = copy_gbytes_per_s(), max(fresh_copies)
    ran_on = host() if options.chosen.type == "cpu" else machine(options.chosen)
    best = max(runs, key=lambda run: run.gbytes_per_s)
    result = {
        "heading": f"`{' '.join(['python -m benchmarks.adopt', *words])}`: {dated(ran_on)}",
        "blocks": preset.layers,
        **asdict(best),
        "gbytes_per_s": round(best.gbytes_per_s, 3),
        "copy_gbytes_per_s": round(copy, 3),
        "fresh_copy_gbytes_per_s": round(fresh, 3),
        "median_gbytes_per_s": round(statistics.median(run.gbytes_per_s for run in runs), 3),
        "share_of_copy": round(best.gbytes_per_s / copy, 3),
        "share_of_fresh_copy": round(best.gbytes_per_s / fresh, 3),
        "pinned_over_swapped": round(best.pinned_bytes / best.swapped_bytes, 4),
    }
    if options.json:
        print(json.dumps(result))
        return 0
    print(f"{result['heading']}\n")
    print(f"{preset.layers} blocks, {format_bytes(best.swapped_bytes)}, {'cold' if options.cold else 'warm'} files")
    print(f"mapped in {best.load_s:.2f} s, adopted in {best.adopt_s:.2f} s, locking took {best.lock_s:.2f} s")
    print(
        f"{best.gbytes_per_s:.2f} GB/s; a copy in memory {copy:.2f} GB/s, a copy to untouched pages "
        f"{fresh:.2f} GB/s; the median of the repeats {result['median_gbytes_per_s']:.2f} GB/s"
    )
    for what, share, is_met in (
        ("of a copy in memory", result["share_of_copy"], result["share_of_copy"] >= SHARE),
        ("page-locked over swapped bytes", result["pinned_over_swapped"], result["pinned_over_swapped"] <= EXACT_PINS),
    ):
        print(f"- {'met' if is_met else 'NOT MET'}: {share:.3f} {what}")
    for refusal in best.refusals:
        print(refusal)
    return 0


if __name__ == "__main__":
    sys.exit(main())
