"""The thumbnails of the examples, drawn: what goes in, what comes out, the model's name and the card's memory.

The template dialog lays a badge over the upper left corner; nothing is drawn there.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

SIDE = 512
"""Units of a side."""

BADGE = (256, 72)
"""Width and height of the corner that the dialog's badge covers: in the dialog, about 90 by 24 of 230 pixels."""

LIGHT, DARK, SUN, ORANGE, TEAL, PINK = "#f4f6fb", "#10151f", "#ffd166", "#ff9f43", "#2ec4b6", "#ff6b9d"
PEN = 'fill="none" stroke-linecap="round" stroke-linejoin="round"'


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """One picture.

    Attributes:
        example: The number at the start of the file's name.
        card: The memory of the card that the example is for.
        model: Large, at the bottom.
        task: Smaller, above the model.
        ground: Colours of the background, above and below.
        scene: Draws what is between the words.
    """

    example: int
    card: str
    model: str
    task: str
    ground: tuple[str, str]
    scene: Callable[[], str]

    def svg(self) -> str:
        above, below = self.ground
        words = (
            _words(488, 54, self.card, 42, anchor="end", weight=800, colour=SUN)
            + _words(24, 432, self.task, 31, colour="#dfe6f3")
            + _words(24, 488, self.model, 50, weight=800)
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{SIDE}" height="{SIDE}" viewBox="0 0 {SIDE} {SIDE}" '
            'font-family="DejaVu Sans, sans-serif"><defs><linearGradient id="ground" x2="0" y2="1">'
            f'<stop stop-color="{above}"/><stop offset="1" stop-color="{below}"/></linearGradient></defs>'
            f'<rect width="{SIDE}" height="{SIDE}" fill="url(#ground)"/>{self.scene()}{words}</svg>'
        )


def thumbnails() -> list[Thumbnail]:
    """One for each example, in their order."""
    return [
        Thumbnail(1, "8 - 16 GB", "Wan 14B", "text to video", ("#1d3a8a", "#0d1a3f"), _text_to_video),
        Thumbnail(2, "12 GB", "Wan 14B", "image to video", ("#0f766e", "#06302d"), _image_to_video),
        Thumbnail(3, "12 GB", "Wan 2.2", "two experts", ("#6d28d9", "#250a52"), _two_experts),
        Thumbnail(4, "8 GB", "Wan GGUF", "text to video", ("#9a3412", "#3b1106"), _quantised),
        Thumbnail(5, "16 GB", "Wan VACE", "first + last image", ("#be185d", "#4a0824"), _first_and_last),
        Thumbnail(6, "16 GB", "by hand", "plan + report", ("#475569", "#1a2130"), _plan_and_report),
        Thumbnail(7, "12 GB", "InfiniteTalk", "image + voice", ("#0369a1", "#04263d"), _talking_head),
        Thumbnail(8, "12 GB", "HuMo", "image + text + sound", ("#a16207", "#3d2503"), _person_and_sound),
        Thumbnail(9, "12 GB", "Wan Animate", "pose + face video", ("#15803d", "#052e16"), _pose_to_dancer),
        Thumbnail(10, "12 GB", "LongCat", "text or image to video", ("#9f1239", "#1f1235"), _cat_and_film),
    ]


# Parts


def _words(
    x: float, y: float, text: str, size: int, *, anchor: str = "start", weight: int = 600, colour: str = LIGHT
) -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{colour}">{text}</text>'
    )


def _box(x: float, y: float, width: float, height: float, colour: str, *, round_: float = 12, more: str = "") -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{round_}" fill="{colour}" {more}/>'


def _disc(x: float, y: float, radius: float, colour: str) -> str:
    return f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{colour}"/>'


def _path(way: str, colour: str, width: float) -> str:
    return f'<path d="{way}" {PEN} stroke="{colour}" stroke-width="{width}"/>'


def _shape(way: str, colour: str) -> str:
    return f'<path d="{way}" fill="{colour}"/>'


def _arrow(x: float, y: float, length: float) -> str:
    return _path(f"M{x} {y}h{length}m-20 -20l20 20l-20 20", LIGHT, 11)


def _hills(x: float, y: float, width: float, height: float, *, sun: float, sky: str = "#8ec9f0") -> str:
    """A picture of hills, with the sun at this share of its width."""

    def at(across: float, down: float) -> str:
        return f"{x + across * width:.1f} {y + down * height:.1f}"

    ridges = (
        _shape(f"M{at(0, 0.75)}Q{at(0.25, 0.3)} {at(0.5, 0.7)}T{at(1, 0.55)}V{y + height}H{x}Z", "#3f7d58"),
        _shape(f"M{at(0, 0.95)}Q{at(0.35, 0.6)} {at(0.65, 0.85)}T{at(1, 0.8)}V{y + height}H{x}Z", "#24503a"),
    )
    disc = _disc(x + sun * width, y + (0.2 + 0.6 * (sun - 0.5) ** 2) * height, 0.12 * height, SUN)
    return _framed(x, y, width, height, _box(x, y, width, height, sky, round_=0) + disc + "".join(ridges))


def _framed(x: float, y: float, width: float, height: float, inside: str) -> str:
    name = f"cut{x:.0f}-{y:.0f}"
    cut = f'<clipPath id="{name}">{_box(x, y, width, height, DARK)}</clipPath><g clip-path="url(#{name})">{inside}</g>'
    return cut + _box(x, y, width, height, "none", more=f'stroke="{LIGHT}" stroke-width="6"')


def _play(x: float, y: float, size: float) -> str:
    triangle = _shape(
        f"M{x - 0.3 * size} {y - 0.45 * size}l{0.85 * size} {0.45 * size}l{-0.85 * size} {0.45 * size}Z", DARK
    )
    return _disc(x, y, size, LIGHT) + triangle


def _sound(x: float, y: float, heights: Iterable[float], colour: str, *, step: float = 22) -> str:
    """Bars around a middle line."""
    return "".join(_path(f"M{x + n * step} {y - height}v{2 * height}", colour, 11) for n, height in enumerate(heights))


# Scenes


def _text_to_video() -> str:
    lines = "".join(
        _box(52, 154 + 42 * n, width, 18, "#8aa4e8", round_=9) for n, width in enumerate((110, 136, 84, 120))
    )
    page = _box(28, 118, 184, 222, LIGHT, round_=22) + _shape("M70 336l0 48l52 -48Z", LIGHT)
    screen = _hills(308, 142, 180, 176, sun=0.7) + _play(398, 236, 42)
    return page + lines + _arrow(228, 230, 60) + screen


def _image_to_video() -> str:
    frames = "".join(_hills(276 + 28 * n, 112 + 46 * n, 156, 132, sun=0.25 + 0.25 * n) for n in range(3))
    return _hills(26, 152, 164, 164, sun=0.25) + _arrow(206, 234, 52) + frames


def _two_experts() -> str:
    grains = random.Random(3)
    noise = "".join(
        _box(
            24 + 16 * column,
            116 + 16 * row,
            16,
            16,
            f"hsl({grains.randrange(360)} 60% {grains.randrange(25, 85)}%)",
            round_=0,
        )
        for column in range(13)
        for row in range(13)
    )
    high = _framed(24, 116, 204, 204, noise)
    low = _hills(284, 116, 204, 204, sun=0.7)
    names = _words(126, 370, "high noise", 30, anchor="middle") + _words(386, 370, "low noise", 30, anchor="middle")
    return high + low + _path("M240 218h32m-14 -16l16 16l-16 16", LIGHT, 9) + names


def _quantised() -> str:
    large = "".join(
        _box(30 + 52 * column, 122 + 52 * row, 46, 46, "#ffb38a" if (row + column) % 2 else ORANGE, round_=8)
        for column in range(4)
        for row in range(4)
    )
    small = "".join(
        _box(352 + 30 * column, 166 + 30 * row, 26, 26, "#ffe1b3" if (row + column) % 2 else SUN, round_=6)
        for column in range(4)
        for row in range(4)
    )
    return large + _arrow(258, 228, 66) + small + _words(410, 346, "4 bit", 42, anchor="middle", weight=800)


def _first_and_last() -> str:
    between = "".join(
        _box(
            196 + 44 * n,
            178,
            34,
            108,
            "none",
            round_=8,
            more=f'stroke="{LIGHT}" stroke-width="5" stroke-dasharray="12 9"',
        )
        for n in range(3)
    )
    moon = _disc(424, 164, 26, LIGHT) + _disc(436, 156, 24, "#1b2559")
    night = _box(336, 112, 152, 240, "#1b2559", round_=0) + moon
    night += "".join(_disc(x, y, 4, LIGHT) for x, y in ((360, 150), (384, 206), (464, 222), (452, 130)))
    night += _shape("M336 300Q380 236 420 286T488 268V352H336Z", "#0c1130")
    return _hills(24, 112, 152, 240, sun=0.3) + between + _framed(336, 112, 152, 240, night)


def _plan_and_report() -> str:
    sliders = "".join(
        _path(f"M40 {y}h176", "#94a3b8", 14) + _path(f"M40 {y}h{x}", TEAL, 14) + _disc(40 + x, y, 22, LIGHT)
        for y, x in ((150, 120), (232, 60), (314, 150))
    )
    board = _box(276, 96, 208, 280, LIGHT, round_=18)
    rows = "".join(
        _path(f"M298 {y}l14 14l24 -28", "#15803d", 10) + _box(352, y - 10, width, 18, "#94a3b8", round_=9)
        for y, width in ((140, 104), (194, 76))
    )
    bars = "".join(
        _box(304 + 42 * n, 352 - height, 30, height, colour, round_=5)
        for n, (height, colour) in enumerate(((52, "#64748b"), (112, TEAL), (78, ORANGE), (98, PINK)))
    )
    return sliders + board + rows + bars


def _head(x: float, y: float) -> str:
    hair = _shape(f"M{x - 86} {y + 20}Q{x - 96} {y - 112} {x} {y - 112}T{x + 86} {y + 20}Z", "#4a2c1d")
    neck = _shape(f"M{x - 34} {y + 60}h68v50q70 14 88 62h-244q18 -48 88 -62Z", "#e2e8f0") + _box(
        x - 30, y + 50, 60, 70, "#e8b48c"
    )
    face = f'<ellipse cx="{x}" cy="{y}" rx="70" ry="86" fill="#f6c9a0"/>'
    eyes = _disc(x - 27, y - 16, 9, DARK) + _disc(x + 27, y - 16, 9, DARK)
    fringe = _shape(
        f"M{x - 72} {y - 24}Q{x - 40} {y - 88} {x + 72} {y - 40}Q{x + 50} {y - 108} {x} {y - 104}T{x - 72} {y - 24}Z",
        "#4a2c1d",
    )
    mouth = f'<ellipse cx="{x}" cy="{y + 40}" rx="22" ry="17" fill="#8f2d3f"/>'
    return hair + neck + face + eyes + fringe + mouth


def _talking_head() -> str:
    waves = "".join(
        _path(f"M{248 + 34 * n} {232 - 34 - 26 * n}q{34 + 14 * n} {34 + 26 * n} 0 {68 + 52 * n}", SUN, 12)
        for n in range(3)
    )
    endless = _path("M414 232c-18 -36 -62 -36 -62 0s44 36 62 0s62 -36 62 0s-44 36 -62 0Z", LIGHT, 15)
    return _head(140, 216) + waves + f'<g transform="translate(14 0)">{endless}</g>'


def _person_and_sound() -> str:
    body = (
        _disc(150, 142, 42, "#f6c9a0")
        + _shape("M108 136a42 42 0 0 1 84 0q-42 -26 -84 0Z", "#2b1a10")
        + _shape("M96 222q54 -42 108 0l10 158h-128Z", "#c2410c")
        + _path("M104 228l-56 50l20 66", "#f6c9a0", 24)
        + _path("M198 228l66 6l34 -66", "#f6c9a0", 24)
    )
    bubble = _box(318, 100, 170, 100, LIGHT, round_=20) + _shape("M344 196v40l44 -40Z", LIGHT)
    lines = _box(340, 126, 124, 16, "#b08a4a", round_=8) + _box(340, 158, 86, 16, "#b08a4a", round_=8)
    return body + bubble + lines + _sound(280, 314, (12, 30, 52, 24, 44, 60, 34, 50, 22, 10), SUN)


LIMBS = ((0, 1), (1, 2), (2, 3), (1, 4), (4, 5), (1, 6), (6, 7), (7, 8), (6, 9), (9, 10))
JOINTS = (
    (0, -122),
    (0, -78),
    (-52, -60),
    (-86, -112),
    (52, -50),
    (92, -18),
    (4, 20),
    (-36, 74),
    (-20, 136),
    (50, 66),
    (100, 104),
)
"""Head, neck, left elbow and hand, right elbow and hand, hip, left knee and foot, right knee and foot."""


def _pose_to_dancer() -> str:
    def ways(x: float) -> list[tuple[str, int]]:
        places = [(x + dx, 236 + dy) for dx, dy in JOINTS]
        return [(f"M{places[a][0]} {places[a][1]}L{places[b][0]} {places[b][1]}", n) for n, (a, b) in enumerate(LIMBS)]

    hues = [f"hsl({n * 360 / len(LIMBS):.0f} 95% 60%)" for n in range(len(LIMBS))]
    skeleton = "".join(_path(way, hues[n], 10) for way, n in ways(118))
    skeleton += "".join(_disc(118 + dx, 236 + dy, 9, LIGHT) for dx, dy in JOINTS)
    dark = _box(16, 92, 218, 300, DARK, round_=18)
    clothes = {0: "#f6c9a0", 1: PINK, 2: "#f6c9a0", 3: PINK, 4: "#f6c9a0", 5: PINK}
    dancer = "".join(_path(way, clothes.get(n, "#312e81"), 46 if n == 5 else 26) for way, n in ways(382))
    dancer += _disc(382, 112, 32, "#f6c9a0") + _shape("M350 112a32 34 0 0 1 64 -4q-30 -16 -64 4Z", "#5b2a0e")
    return dark + skeleton + _path("M246 236h36m-16 -18l18 18l-18 18", LIGHT, 10) + dancer


def _cat_and_film() -> str:
    """A cat behind a film that runs off the picture."""
    cat = (
        _shape("M150 330q-10 -122 52 -142l-6 -66l44 34h40l44 -34l-6 66q62 20 52 142Z", ORANGE)
        + _disc(230, 204, 10, DARK)
        + _disc(290, 204, 10, DARK)
        + _path("M260 222v8m0 0q-12 14 -24 4m24 -4q12 14 24 4", DARK, 6)
        + _path("M206 226l-52 -8m52 20l-50 10M314 226l52 -8m-52 20l50 10", LIGHT, 5)
    )
    middle = {x: 308 + 30 * math.sin(x / 70) for x in range(-16, 560, 4)}
    edges = [f"{x} {y - 56:.0f}" for x, y in middle.items()] + [
        f"{x} {y + 56:.0f}" for x, y in reversed(middle.items())
    ]
    film = _shape(f"M{'L'.join(edges)}Z", "#141826")
    for n, x in enumerate(range(-12, 520, 56)):
        left, right = middle[x], middle[x + 44]
        film += _shape(
            f"M{x} {left - 32:.0f}L{x + 44} {right - 32:.0f}V{right + 32:.0f}L{x} {left + 32:.0f}Z",
            f"hsl({18 * n} 85% 68%)",
        )
    for x in range(-8, 524, 28):
        film += "".join(_box(x, middle[x] + side, 12, 10, LIGHT, round_=3) for side in (-50, 40))
    return f'<g transform="translate(0 -28)">{cat}</g>{film}'


def drawn(thumbnail: Thumbnail) -> str:
    """A page with nothing but the picture."""
    return f"<!doctype html><style>body{{margin:0}}svg{{display:block}}</style>{thumbnail.svg()}"
