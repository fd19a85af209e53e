"""The engines by name."""

from __future__ import annotations

from collections.abc import Callable

from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier

from .cells import RESIDENT, Task
from .engine import Engine, NotOfferedError
from .ours import Ours, PlainSwap, Resident
from .peers import Accelerate, GroupOffload, Mmgp, RamTorch
from .testbed import Testbed

OURS: dict[str, Callable[[Testbed, int], Engine]] = {
    RESIDENT: lambda testbed, _: Resident(testbed),
    "ours": lambda testbed, streams: Ours(testbed, streams=streams),
    "ours-1-slot": lambda testbed, streams: Ours(testbed, streams=streams, slots=1),
    "ours-3-slots": lambda testbed, streams: Ours(testbed, streams=streams, slots=3),
    "ours-tail": lambda testbed, streams: Ours(testbed, streams=streams, tail=True),
    "ours-no-prefetch": lambda testbed, streams: Ours(testbed, streams=streams, overlap=False),
    "ours-staged": lambda testbed, streams: Ours(testbed, streams=streams, tier=HostTier.STAGED),
    "plain": lambda testbed, _: PlainSwap(testbed),
}
"""Engines that a simulated device can run too."""

PEERS: dict[str, Callable[[], Engine]] = {
    "diffusers": lambda: GroupOffload(record_stream=False),
    "diffusers-record-stream": lambda: GroupOffload(record_stream=True),
    "accelerate": Accelerate,
    "mmgp": Mmgp,
    "ramtorch": RamTorch,
}

NAMES = (*OURS, *PEERS)


def make_engine(task: Task, testbed: Testbed) -> Engine:
    """The engine that `task` names.

    Raises:
        NotOfferedError: It cannot run on the device of `task`.
    """
    if task.engine in OURS:
        return OURS[task.engine](testbed, task.streams)
    if testbed.clock == "virtual":
        raise NotOfferedError("not simulated: a GPU is needed to measure it")
    return PEERS[task.engine]()
