"""Files that weights are read from during a run; imports no torch."""

from .mappings import FileMappings, FileRegion
from .reader import READERS, FileIdentity, FileReader, WeightFileError
from .speed import measure_disk

__all__ = ["READERS", "FileIdentity", "FileMappings", "FileReader", "FileRegion", "WeightFileError", "measure_disk"]
