"""What a stranger's file may say at most, and how its words are printed; pure.

[Note: Untrusted headers] Model files come from anywhere, so that a header is data to be doubted. Both formats are
therefore read here, by two small parsers over bytes that have been read once, and not by the libraries that load them:
these map the whole file (one that is cut meanwhile ends the process), and make objects by counts that the file only
claims. Nothing is allocated by a claim, nothing nests, and a name serves to tell blocks apart and to be printed alone.
"""

from __future__ import annotations

LONGEST_HEADER = 8 << 20
"""Bytes. Wan 14B in fp8 with scales has 0.2 MB for its 1,500 tensors, and a workflow that is saved inside takes some
tenths more. With what is made of it, reading takes a few times as much memory."""

MOST_TENSORS = 1 << 14
"""All-in-one files of Wan with text encoder and VAE have under 5,000."""

LONGEST_NAME = 256
"""Letters; the longest in published files have 90."""

MOST_DIMENSIONS = 8
"""Of a tensor; Wan has 5, GGML knows 4."""


class HeaderError(ValueError):
    """A header says what it cannot: `expects X but got Y`.

    Attributes:
        remedy: What to do.
    """

    def __init__(self, said: str, *, remedy: str = "download it again") -> None:
        super().__init__(said)
        self.remedy = remedy
