"""Where the command line keeps what it has measured."""

from __future__ import annotations

from pathlib import Path


def cache_dir() -> Path | None:
    """The user's cache folder for this package; None, which keeps nothing, where platformdirs is not installed."""
    try:
        from platformdirs import user_cache_path
    except ImportError:
        return None
    return user_cache_path("wanvideo-enhanced-blockswap")
