"""Fuzzes `plan` with hostile model files: every one is planned for or refused in one sentence, in bounded memory.

    python tests/fuzz/headers.py --inputs 100000

The same seed gives the same inputs; `--only safetensors:123` runs one of them and shows what it raises. The files are
planned for in a child process that does nothing else, so that what it takes is what reading a header takes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from gguf_inputs import gguf_input, giant_gguf
from planning_child import MEMORY_LIMIT
from safetensors_inputs import giant_safetensors, safetensors_input

SLOW_S = 5.0
"""Seconds for one input after which the run has failed: the largest header that is read takes a fraction of it."""

GIANT_EVERY = 1000
"""Inputs between two with a header of megabytes, which take a thousand times as long."""

BATCH = 100
"""Files written while the child reads as many."""

FORMATS = {"safetensors": (safetensors_input, giant_safetensors), "gguf": (gguf_input, giant_gguf)}


@dataclass
class RunStats:
    """What became of one format's inputs."""

    outcomes: Counter[str] = field(default_factory=Counter)
    crashes: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    longest_input: int = 0
    elapsed_s: float = 0.0
    peak_bytes: int = 0
    limited: bool = False

    @property
    def failed(self) -> bool:
        return bool(self.crashes) or self.longest_s > SLOW_S or self.peak_bytes > MEMORY_LIMIT


def make_input(kind: str, number: int, seed: int) -> tuple[bytes, int]:
    """Content of one input, and the length of its file."""
    usual, giant = FORMATS[kind]
    rng = random.Random(f"{kind}:{seed}:{number}")
    return (giant if number % GIANT_EVERY == GIANT_EVERY - 1 else usual)(rng)


def write_input(path: Path, made: tuple[bytes, int]) -> None:
    content, size = made
    with path.open("wb") as file:
        file.write(content[:size])
        file.truncate(size)


def fuzz(kind: str, *, inputs: int, seed: int) -> RunStats:
    """Runs so many inputs of one format in a child of their own."""
    found, begin = RunStats(), time.perf_counter()
    child_file = Path(__file__).with_name("planning_child.py")
    with tempfile.TemporaryDirectory() as folder:
        warm = [Path(folder) / f"warm-{number}.{kind}" for number in range(BATCH)]
        for number, path in enumerate(warm):
            write_input(path, make_input(kind, number, 0))
        command = [sys.executable, str(child_file), *map(str, warm)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            found.limited = json.loads(child.stdout.readline())["limited"]
            sent: list[int] = []
            for batch in _batches(kind, inputs, seed, Path(folder)):
                _take(child.stdout, sent, found, kind, Path(folder))
                child.stdin.write("".join(f"{_path(Path(folder), kind, number)}\n" for number in batch))
                child.stdin.flush()
                sent = batch
            _take(child.stdout, sent, found, kind, Path(folder))
            child.stdin.close()
    found.elapsed_s = time.perf_counter() - begin
    return found


def _path(folder: Path, kind: str, number: int) -> Path:
    return folder / f"hostile-{number}.{kind}"


def _batches(kind: str, inputs: int, seed: int, folder: Path) -> Iterator[list[int]]:
    """Numbers of inputs whose files have been written."""
    for start in range(0, inputs, BATCH):
        numbers = list(range(start, min(inputs, start + BATCH)))
        for number in numbers:
            write_input(_path(folder, kind, number), make_input(kind, number, seed))
        yield numbers


def _take(answers: IO[str], sent: list[int], found: RunStats, kind: str, folder: Path) -> None:
    """The child's answers to what was sent; no answer is a crash as well, and ends the run."""
    for number in sent:
        line = answers.readline()
        if not line:
            found.crashes.append(f"{kind}:{number}: the process ended or hung")
            raise SystemExit(f"{kind}:{number} has ended the process that read it")
        answer: dict[str, Any] = json.loads(line)
        found.outcomes[answer["outcome"]] += 1
        if answer["crash"] is not None:
            found.crashes.append(f"{kind}:{number}: {answer['crash']}")
        if answer["seconds"] > found.longest_s:
            found.longest_s, found.longest_input = answer["seconds"], number
        found.peak_bytes = answer["peak_bytes"]
        _path(folder, kind, number).unlink()


def run_one(which: str, seed: int) -> int:
    from planning_child import outcome

    kind, number = which.split(":")
    content, size = make_input(kind, int(number), seed)
    with tempfile.TemporaryDirectory() as folder:
        path = _path(Path(folder), kind, int(number))
        write_input(path, (content, size))
        sys.stdout.write(f"{size} bytes, of which {content[:2000]!r}\n")
        sys.stdout.write(f"{outcome(path)}\n")
    return 0


def report(kind: str, inputs: int, found: RunStats) -> str:
    held = "its address space limited to as much" if found.limited else "by resident memory alone"
    lines = [
        f"{kind}: {inputs} inputs, {inputs / found.elapsed_s:,.0f} a second",
        f"  longest input {found.longest_s * 1e3:.0f} ms (number {found.longest_input}); peak extra memory "
        f"{found.peak_bytes / 1e6:.1f} MB of {MEMORY_LIMIT / 1e6:.0f}, {held}",
        *(f"  {count:8}  {said}" for said, count in sorted(found.outcomes.items(), key=lambda item: -item[1])),
        *(f"  CRASH {crash}" for crash in itertools.islice(found.crashes, 20)),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=5000, help="of each format")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", metavar="FORMAT:NUMBER", help="one input, and what it raises")
    options = parser.parse_args()
    if options.only:
        return run_one(options.only, options.seed)
    failed = False
    for kind in FORMATS:
        found = fuzz(kind, inputs=options.inputs, seed=options.seed)
        sys.stdout.write(report(kind, options.inputs, found))
        failed = failed or found.failed
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
