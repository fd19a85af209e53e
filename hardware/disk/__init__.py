"""Files that weights are read from during a run; imports no torch."""

from .mappings import FileMappings, FileRegion
from .reader import READERS, FileIdentity, FileReader, WeightFileError

__all__ = ["READERS", "FileIdentity", "FileMappings", "FileReader", "FileRegion", "WeightFileError"]
