"""Runs the command line: `python -m wanvideo_enhanced_blockswap demo`."""

import sys

from .cli import main

if __name__ == "__main__":  # importing runs nothing
    sys.exit(main())
