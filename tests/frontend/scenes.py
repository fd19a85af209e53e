"""The thumbnails of the examples: the nodes in each picture, their places, and their progress."""

from __future__ import annotations

from dataclasses import dataclass

from wanvideo_enhanced_blockswap.blockswap.run.progress import Progress
from wanvideo_enhanced_blockswap.blockswap.run.text import plan_text
from wanvideo_enhanced_blockswap.blockswap.settings import SwapSettings

from .front_end import NODE
from .made_runs import Case, MadeRun, fp8, gguf_with_lora

SIDE = 480
"""Of the square that a thumbnail shows, in units of the graph: text of 12 units is still read at half the size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A node in the picture.

    Attributes:
        kind: Its type.
        place: Left, top and width of the node with its title, in units of the graph; the picture's corner is 0, 0.
        height: The least that it is given; 0 leaves it to the front end.
        number: Which of the nodes of this type, in the order of their ids.
        progress: The last event of a swap node.
        text: What a node that previews text has been given.
        image: What a node that loads an image shows.
    """

    kind: str
    place: tuple[int, int, int]
    height: int = 0
    number: int = 0
    progress: Progress | None = None
    text: str = ""
    image: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A thumbnail.

    Attributes:
        example: The number at the start of the file's name.
        parts: Its nodes, those above others last.
        side: Of the square, in units of the graph.
    """

    example: int
    parts: tuple[Part, ...]
    side: int = SIDE


def scenes() -> list[Scene]:
    """One for each example, in their order."""
    return [_automatic(), _image_to_video(), _two_experts(), _gguf_with_lora(), _vace(), _by_hand()]


def twelve_gib() -> MadeRun:
    """Image to video on a card of 12 GB: the example of the README and of the help pages."""
    return MadeRun(Case(card="NVIDIA GeForce RTX 3060", vram_gib=12, rates="RTX 3060 12GB", model=fp8(channels=36)))


def _swap(progress: Progress, top: int, *, width: int = 440, number: int = 0) -> Part:
    return Part(kind=NODE, place=(20, top, width), number=number, progress=progress)


def _sixteen_gib(*, vace: int = 0, settings: SwapSettings | None = None) -> MadeRun:
    model = fp8(vace=vace)
    settings = settings or SwapSettings()
    return MadeRun(Case(card="NVIDIA GeForce RTX 4080", vram_gib=16, rates="RTX 3090", model=model, settings=settings))


def _automatic() -> Scene:
    run = MadeRun(Case(card="NVIDIA GeForce RTX 4090", vram_gib=24, rates="RTX 4090", model=fp8()))
    around = (
        Part(kind="WanVideoTextEncodeCached", place=(20, 450, 420)),
        Part(kind="WanVideoModelLoader", place=(500, 60, 480)),
        Part(kind="WanVideoSampler", place=(500, 470, 340)),
    )
    return Scene(example=1, parts=(*around, _swap(run.done(60), 78, width=420)), side=700)


def _image_to_video() -> Scene:
    image = Part(kind="LoadImage", place=(20, -160, 440), height=400, image="morning")
    return Scene(example=2, parts=(image, _swap(twelve_gib().sampling(17), 146)))


def _two_experts() -> Scene:
    run = _sixteen_gib()
    high, low = _swap(run.done(20), -56, width=584), _swap(run.sampling(7), 312, width=584, number=1)
    return Scene(example=3, parts=(high, low), side=624)


def _gguf_with_lora() -> Scene:
    model = gguf_with_lora()
    case = Case(card="NVIDIA GeForce RTX 3060 Ti", vram_gib=8, rates="RTX 3060 12GB", model=model, video=(640, 384, 81))
    lora = Part(kind="WanVideoLoraSelect", place=(20, 20, 440))
    return Scene(example=4, parts=(lora, _swap(MadeRun(case).adopting(25), 146)))


def _vace() -> Scene:
    first = Part(kind="LoadImage", place=(14, -114, 225), height=260, image="morning")
    last = Part(kind="LoadImage", place=(241, -114, 225), height=260, number=1, image="evening")
    return Scene(example=5, parts=(first, last, _swap(_sixteen_gib(vace=8).sampling(9), 146)))


def _by_hand() -> Scene:
    run = _sixteen_gib(settings=SwapSettings(auto_hardware_tuning=False, blocks_to_swap=24, num_cuda_streams=2))
    text = plan_text(run.plan, card=run.card)
    plan = Part(kind="PreviewAny", place=(20, 0, 440), height=200, text=text)
    return Scene(example=6, parts=(plan, _swap(run.sampling(22), 146)))
