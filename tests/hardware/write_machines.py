"""Writes machines.txt: `python tests/hardware/write_machines.py`, in the checkout."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # this folder has the machines, the one above it the model files

from machine_table import GOLDEN, models, plans, readings_of, table
from machines import MACHINES

rows = models()
read = [(machine, readings_of(machine)) for machine in MACHINES]
found = [(machine, readings, plans(machine, readings, rows)) for machine, readings in read]
GOLDEN.write_text(table(found, rows), encoding="utf-8")
