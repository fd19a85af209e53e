"""The modules of a transformer that are swapped: its blocks, and the groups beside them; their names and order; pure.

Most families of models have large weights beside the blocks: S2V's audio cross-attentions, One-to-All's control and
reference blocks, Uni3C's, the encoders of face, motion and audio. The wrapper keeps them on the device, or moves them
there and back in every forward. They are swapped like the blocks: each module of a group is one more block to the plan
and to the engine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

MAIN, VACE = "blocks", "vace_blocks"

INJECTED = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
"""The blocks after which S2V's audio cross-attentions run: `audio_inject_layers` of the wrapper's WanModel."""

LONGEST_NUMBER = 4
"""Digits of a module's number."""


def _own(number: int) -> int:
    return number


def _next(number: int) -> int:
    return number + 1


def _injected(number: int) -> int:
    return INJECTED[number] if number < len(INJECTED) else INJECTED[-1] + number


@dataclass(frozen=True, slots=True)
class Group:
    """A list of modules, or one module, that is swapped.

    Attributes:
        path: Its dotted name in the transformer. A group whose path continues another's is no part of that one.
        stage: When it runs in a forward: groups of a lower number run first, and those of one number alternate.
        place: Where a module of the list runs among those of its stage, by its number.
        is_list: Whether it is a list.
        has_own_slot: Whether it has a slot of its own. Small modules that alternate with large ones would else take a
            slot of the large ones, whose copies could not run ahead any more.
    """

    path: str
    stage: int
    place: Callable[[int], int] = _own
    is_list: bool = True
    has_own_slot: bool = False


GROUPS = (
    Group("casual_audio_encoder", 0, is_list=False),
    Group("image_to_cond", 1, is_list=False),
    Group("refextractor", 2, is_list=False),
    Group("refextractor.blocks", 3),
    Group("refextractor.ref_blocks", 4),
    Group("motion_encoder", 5, is_list=False),
    Group("face_encoder", 6, is_list=False),
    Group("multitalk_audio_proj", 7, is_list=False),
    Group(VACE, 8),
    Group("uni3c_controlnet", 9, is_list=False),
    Group("uni3c_controlnet.controlnet_blocks", 10),
    Group("uni3c_controlnet.proj_out", 10, has_own_slot=True),
    Group(MAIN, 11),
    Group("controlnet.blocks", 11, _next),
    Group("controlnet_zero", 11, _next, has_own_slot=True),
    Group("audio_injector.injector_adain_layers", 11, _injected, has_own_slot=True),
    Group("audio_injector.injector", 11, _injected, has_own_slot=True),
)
"""In the order in which the wrapper's forward runs them (wanvideo/modules/model.py, upstream of 2026-05-24)."""

LOADED_WITH_BLOCKS = ("audio_model.blocks.",)
"""Beginnings of names that the wrapper loads beside the blocks and puts into them when a run starts: Ovi's."""

_BY_PATH = {group.path: (rank, group) for rank, group in enumerate(GROUPS)}

_NAME = re.compile("({})(?:\\.(.+))?".format("|".join(re.escape(group.path) for group in reversed(GROUPS))))
_NUMBER = re.compile(rf"(0|[1-9][0-9]{{0,{LONGEST_NUMBER - 1}}})(?:\.(.+))?")


def split(name: str) -> tuple[str, str] | None:
    """The swapped module that a tensor or module belongs to, and the rest of its name; None outside all of them."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    _, group = _BY_PATH[match[1]]
    if not group.is_list:
        return match[1], match[2] or ""
    number = _NUMBER.fullmatch(match[2] or "")
    return None if number is None else (f"{match[1]}.{number[1]}", number[2] or "")


def in_order(modules: Iterable[str]) -> list[str]:
    """Names of swapped modules in the order in which a forward runs them."""
    return sorted(modules, key=_position)


def _position(module: str) -> tuple[int, int, int]:
    path, number = _path_and_number(module)
    rank, group = _BY_PATH[path]
    return group.stage, group.place(number), rank


def _path_and_number(module: str) -> tuple[str, int]:
    if module in _BY_PATH:
        return module, 0
    path, _, number = module.rpartition(".")
    return path, int(number)


def kind_of(module: str) -> str:
    """The path of a swapped module's group; for a name in no group, `blocks`."""
    path = module if module in _BY_PATH else module.rpartition(".")[0]
    return path if path in _BY_PATH else MAIN


def is_beside(module: str) -> bool:
    """Whether a swapped module is neither a block nor a VACE block."""
    return kind_of(module) not in (MAIN, VACE)


def lane_of(module: str) -> str:
    """The group whose slot a swapped module takes: its own, or `blocks`."""
    kind = kind_of(module)
    return kind if _BY_PATH[kind][1].has_own_slot else MAIN
