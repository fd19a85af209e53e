"""Runs peers that are written for CUDA on a stand-in: torch.cuda's names over the pretend accelerator.

A script for a process of its own, since nothing is undone; it prints a JSON object for each engine and number of
swapped blocks. Streams and events order nothing: every copy has finished when its call returns.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pretend_accelerator
import torch
from torch import nn
from wanvideo_enhanced_blockswap.commands.wan_model import PRESETS, build, make_inputs

from benchmarks.compare.engine import NotOfferedError
from benchmarks.compare.peers import GroupOffload, Mmgp, RamTorch

PRESET = PRESETS["small"]
SHAPE, WORDS = (32, 32, 5), 4
"""Few tokens: processors without bf16 take long."""
PRETEND = torch.device("hpu:0")
PRETEND_BYTES = pretend_accelerator.DEFAULT_MEMORY_BYTES
ENGINES: dict[str, Callable[[], Any]] = {
    "diffusers": lambda: GroupOffload(record_stream=False),
    "diffusers-record-stream": lambda: GroupOffload(record_stream=True),
    "ramtorch": RamTorch,
    "mmgp": Mmgp,
}
CELLS = (
    *(("diffusers", 12), ("diffusers-record-stream", 12)),
    *(("ramtorch", 6), ("ramtorch", 12)),
    *(("mmgp", 0), ("mmgp", 1), ("mmgp", 6), ("mmgp", 12)),
)
TIMES = (937.5, 421.337)


class Stream:
    """A stream, and an event of one."""

    def __init__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record(self, *_: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass


def stand_in() -> None:
    """Tensors that are to go to CUDA go to the pretend accelerator; host memory counts as page-locked."""

    def real(value: object) -> object:
        is_cuda = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
        return PRETEND if is_cuda else value

    def to(tensor: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        return move(tensor, *map(real, arguments), **{name: real(value) for name, value in options.items()})

    def pageable(*arguments: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return empty(*arguments, **options)

    move, empty = torch.Tensor.to, torch.empty
    tensors: dict[str, object] = {
        "to": to,
        "cuda": functools.partialmethod(to, "cuda"),
        "is_cuda": property(lambda tensor: tensor.device.type == PRETEND.type),
        "is_pinned": lambda tensor: tensor.device.type == "cpu",
        "pin_memory": lambda tensor: tensor,
        "record_stream": lambda *_: None,
    }
    devices: dict[str, object] = {
        **dict.fromkeys(("Stream", "Event", "default_stream", "current_stream"), Stream),
        "stream": contextlib.nullcontext,
        "get_device_properties": lambda _: SimpleNamespace(total_memory=PRETEND_BYTES),
        **dict.fromkeys(("synchronize", "empty_cache", "set_device"), lambda *_: None),
        **dict.fromkeys(("memory_reserved", "memory_allocated"), lambda: 0),
    }
    torch.empty = pageable
    for owner, names in ((torch.Tensor, tensors), (torch.cuda, devices)):
        for name, value in names.items():
            setattr(owner, name, value)


def main() -> None:
    torch.set_num_threads(1)
    pretend_accelerator.install()
    inputs = make_inputs(PRESET, SHAPE, PRETEND, seed=0)
    times = [torch.full((1,), time, device=PRETEND) for time in TIMES]

    def run(model: nn.Module, time: torch.Tensor) -> torch.Tensor:
        return model(inputs.latents, time, inputs.positive[:, :WORDS], return_dict=False)[0].cpu()

    unswapped = build(PRESET, seed=0).to(PRETEND)
    with torch.inference_mode():
        truth = [run(unswapped, time) for time in times]
    del unswapped
    models = [build(PRESET, seed=0) for _ in CELLS]
    stand_in()
    for (name, swapped), model in zip(CELLS, models, strict=True):
        before = torch.hpu.memory_allocated()
        engine = ENGINES[name]()
        found: dict[str, Any] = {"engine": name, "swapped": swapped}
        try:
            engine.place(model, torch.device("cuda:0"), swapped=swapped)
            found["equal"] = []
            for turn in (0, 1, 0):
                torch.hpu.reset_copy_stats()
                with torch.inference_mode(), engine.forward():
                    found["equal"].append(torch.equal(run(model, times[turn]), truth[turn]))
            found["held_bytes"] = torch.hpu.memory_allocated() - before
            found["moved_bytes"] = torch.hpu.copy_stats()["h2d_bytes"]
        except NotOfferedError as why:
            found["reason"] = str(why)
        engine.close()
        found["default_device"] = str(torch.get_default_device())
        sys.stdout.write(f"{json.dumps(found)}\n")


if __name__ == "__main__":
    main()
