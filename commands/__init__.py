"""The commands of the command line: each takes its options and returns what is to be printed."""

from .demo import demo
from .plan import plan
from .probe import probe
from .result import Result
from .simulate import simulate

__all__ = ["Result", "demo", "plan", "probe", "simulate"]
