"""Makes the pictures of README, help pages and template dialog in the real front end, from runs that were made up."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT, help="where the folders of the pictures are; the checkout")
    out = parser.parse_args().out
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # as for pytest
    from frontend.front_end import what_is_missing

    missing = what_is_missing()
    if missing is not None:
        sys.exit(missing)
    from frontend.shots import Studio, draws, opened_for_pictures

    with opened_for_pictures("zh") as ui:
        if not draws(ui, "显存"):
            sys.exit("a font with Chinese is missing: apt-get install fonts-noto-cjk")
        Studio(ui, out).help_page()
    with opened_for_pictures("en") as ui:
        studio = Studio(ui, out)
        studio.nodes()
        studio.film()
        studio.thumbnails()


if __name__ == "__main__":
    main()
