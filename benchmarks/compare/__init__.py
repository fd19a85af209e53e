"""Engines that run a transformer larger than its device, side by side. See `benchmarks/compare/__main__.py`."""
