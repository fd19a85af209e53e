"""Files that weights are read from during a run; imports no torch."""

from .reader import READERS, FileIdentity, FileReader, WeightFileError

__all__ = ["READERS", "FileIdentity", "FileReader", "WeightFileError"]
