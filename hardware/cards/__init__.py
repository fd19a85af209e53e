"""Graphics cards by the name on the box: memory, PCIe interface and assumed rates, for plans without the card."""

from .find import KnownGpu, find_gpu, known_gpus, vendor_of

__all__ = ["KnownGpu", "find_gpu", "known_gpus", "vendor_of"]
