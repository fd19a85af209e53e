"""One browser for all tests, and a page for each front end, booted once and emptied before each test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from .front_end import VARIANTS, FrontEnd, browser, opened, what_is_missing

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    """Skips where something is missing; fails there if BLOCKSWAP_NEEDS_FRONTENDS is set.

    Closed after this folder's tests: while Playwright is on, nobody else in this thread can run an event loop.
    """
    missing = what_is_missing()
    if missing is not None and os.environ.get("BLOCKSWAP_NEEDS_FRONTENDS"):
        pytest.fail(missing)
    if missing is not None:
        pytest.skip(missing)
    with browser() as running:
        yield running


@pytest.fixture(scope="package", params=VARIANTS, ids=str)
def front_end(request: pytest.FixtureRequest, chromium: Browser) -> Iterator[FrontEnd]:
    """Each front end in turn; `parametrize("front_end", [Variant(…)], indirect=True)` takes fewer."""
    with opened(chromium, request.param) as page:
        yield page


@pytest.fixture
def ui(front_end: FrontEnd) -> FrontEnd:
    """The page with an empty graph."""
    front_end.reset()
    return front_end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "chromium" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.frontend)
