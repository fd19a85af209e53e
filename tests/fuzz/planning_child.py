"""Plans for each file whose path comes in, within 64 MB above its beginning; answers each with a line of JSON."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import re
import sys
import time
from argparse import Namespace
from pathlib import Path

import psutil
from wanvideo_enhanced_blockswap.blockswap.errors import BlockSwapError, CheckpointError
from wanvideo_enhanced_blockswap.commands import plan as command
from wanvideo_enhanced_blockswap.hardware import GIB, HostMemory, HostPlatform

MEMORY_LIMIT = 64_000_000
"""Bytes that a header may cost beyond what the process has without it."""

LONGEST_MESSAGE = 1500
"""Letters; three names, a path and a sentence."""

HUNG_S = 60.0

HOST = HostMemory(64 * GIB, 64 * GIB, None, None, HostPlatform.LINUX)
"""Read once, since reading it takes as long as a header; on every machine the same."""

WORD = re.compile(r"[A-Za-z']+[,:;]?")
QUOTED = re.compile(r"\bb?'.*?'(?!\w)|\bb?\".*?\"")
REPEATED = re.compile(r"#( #)+")


def outcome(path: Path) -> str:
    """What `plan` says to this file, without its numbers and names; raises what `plan` must not raise."""
    options = Namespace(model=str(path), gpu="RTX 4090", vram=None, ram="64GiB", link=25.0, shape="832x480x81")
    options.beside, options.blocks_to_swap, options.vram_threshold_percent = [], None, 50.0
    try:
        command.plan(options)
    except BlockSwapError as failure:
        message = str(failure)
        if not message.isprintable() or not message or len(message) > LONGEST_MESSAGE:
            raise AssertionError(f"not one readable sentence: {message[:300]!r}") from failure
        if type(failure) is CheckpointError and path.name not in message:
            raise AssertionError(f"does not name the file: {message!r}") from failure
        told = QUOTED.sub("…", message.replace(str(path), "FILE").replace(path.name, "FILE"))
        words = (word if WORD.fullmatch(word) else "#" for word in told.split())
        return f"{type(failure).__name__}: {REPEATED.sub('#', ' '.join(words))[:100]}"
    return "planned"


def limit_memory() -> bool:
    """From here on no more than the limit can be had, also if it is only asked for; False where that is not known."""
    if sys.platform != "linux":
        return False
    import resource

    limit = psutil.Process().memory_info().vms + MEMORY_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts anew
    return True


def peak_bytes() -> int:
    """The most resident memory so far."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    command.read_host_memory = lambda: HOST
    for name in sys.argv[1:]:  # loads and caches what the first inputs need; what they raise is not counted
        with contextlib.suppress(Exception):
            outcome(Path(name))
    before = psutil.Process().memory_info().rss
    sys.stdout.write(json.dumps({"limited": limit_memory()}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        faulthandler.dump_traceback_later(HUNG_S, exit=True)
        start, crash = time.perf_counter(), None
        try:
            said = outcome(Path(line.rstrip("\n")))
        except Exception as failure:  # noqa: BLE001  # whatever it is, it is a finding
            said = f"CRASH {type(failure).__name__}"
            crash = f"{type(failure).__name__}: {str(failure)[:300]}"
        answer = {"outcome": said, "crash": crash, "seconds": time.perf_counter() - start}
        answer["peak_bytes"] = peak_bytes() - before
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
