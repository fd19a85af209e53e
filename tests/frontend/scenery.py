"""Replaces the user's images in the pictures: computed hills under a low sun."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter

WIDTH, HEIGHT = 832, 480
HORIZON = 0.62
"""Of the height, from above."""

SKIES = {
    "morning": ((0.20, 0.36, 0.62), (1.00, 0.76, 0.52), (1.0, 0.93, 0.75), (0.27, 0.44)),
    "evening": ((0.11, 0.10, 0.30), (0.93, 0.42, 0.36), (1.0, 0.75, 0.55), (0.74, 0.45)),
}
"""Colour above, colour at the horizon, colour of the sun, and its place."""

RIDGES = ((0.56, 0.050, 3.0, 0.3), (0.66, 0.045, 5.0, 1.9), (0.80, 0.060, 2.2, 4.1))
"""For each row of hills, from far to near: height of its foot, height of its tops, number of tops, and their start."""

FOREGROUND = np.array((0.03, 0.07, 0.09))


def scenery(time: str) -> bytes:
    """A PNG of the hills in the `morning` or `evening`."""
    above, at_horizon, sun_colour, sun = (np.array(each) for each in SKIES[time])
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] / np.array((HEIGHT, WIDTH)).reshape(2, 1, 1)
    depth = np.clip(y / HORIZON, 0, 1)[..., None] ** 1.3
    picture = above * (1 - depth) + at_horizon * depth
    distance = np.hypot((x - sun[0]) * WIDTH / HEIGHT, y - sun[1])[..., None]
    picture = picture + sun_colour * 0.55 * np.exp(-distance / 0.16)
    picture = np.where(distance < 0.055, sun_colour, picture)
    for number, (foot, height, tops, begin) in enumerate(RIDGES):
        share = (number + 1) / len(RIDGES)
        colour = at_horizon * (1 - share) * 0.75 + FOREGROUND * share + 0.10 * (1 - share) * above
        outline = foot - height * (np.sin(tops * 6.28 * x + begin) + 0.4 * np.sin(2.7 * tops * 6.28 * x + 2 * begin))
        picture = np.where((y > outline)[..., None], colour, picture)
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    file = io.BytesIO()
    image.filter(ImageFilter.GaussianBlur(0.7)).save(file, "PNG")
    return file.getvalue()
