"""Measurements behind the project's claims; each module is one, run with `python -m benchmarks.NAME`."""
