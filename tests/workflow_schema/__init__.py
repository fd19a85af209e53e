"""Reads saved workflows, and says what is wrong with them."""

from .checks import (
    definition_problems,
    layout_problems,
    link_problems,
    model_problems,
    origin_problems,
    prompt_problems,
    reach_problems,
    schema_problems,
    value_problems,
)
from .definitions import Definition, Input, live, recorded
from .prompt import to_prompt
from .workflow import NOTE, Workflow

__all__ = [
    "NOTE",
    "Definition",
    "Input",
    "Workflow",
    "definition_problems",
    "layout_problems",
    "link_problems",
    "live",
    "model_problems",
    "origin_problems",
    "prompt_problems",
    "reach_problems",
    "recorded",
    "schema_problems",
    "to_prompt",
    "value_problems",
]
