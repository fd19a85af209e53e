"""Runs the command line: `python -m wanvideo_enhanced_blockswap demo`."""

import sys

from .cli import main

sys.exit(main())
