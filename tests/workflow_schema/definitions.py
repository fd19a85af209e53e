"""What ComfyUI says about nodes: its recorded answers to /object_info, and the same of our own classes, asked live."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
"""A combo whose choice adds inputs, which follow it by position and are called `combo.input`."""

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC}
SEEDS = {"seed", "noise_seed"}
CONTROL = "control_after_generate"
PLAYER = ("audioUI", "upload")
CONTROLS = ("fixed", "increment", "decrement", "randomize")


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a node: a socket, or a widget.

    Attributes:
        name: What a prompt calls it.
        kind: Its type; COMBO where the definition gives the choices in place of a type.
        is_required: A prompt without it is refused.
        options: Its range, default and choices.
    """

    name: str
    kind: str
    is_required: bool
    options: Mapping[str, Any]

    @property
    def is_widget(self) -> bool:
        return self.kind in WIDGETS and not self.options.get("forceInput", False)

    def extras(self) -> tuple[Input, ...]:
        """Widgets that the front end puts after this one; saved workflows store them, prompts do not."""
        if self.options.get(CONTROL) or (self.kind == "INT" and self.name in SEEDS):
            return (Input(CONTROL, "COMBO", is_required=False, options={"choices": CONTROLS}),)
        if self.options.get("image_upload") or self.options.get("video_upload"):
            return (Input("upload", "COMBO", is_required=False, options={"choices": ("image",)}),)
        if self.options.get("audio_upload"):  # a player and a button, which have no value
            return tuple(Input(name, "COMBO", is_required=False, options={"choices": (None, "")}) for name in PLAYER)
        return ()

    def chosen(self, value: object) -> tuple[Input, ...]:
        """The inputs that a choice of a dynamic combo brings."""
        if self.kind != DYNAMIC:
            return ()
        of_choice = [option["inputs"] for option in self.options["options"] if option["key"] == value]
        return tuple(_inputs(of_choice[0], prefix=f"{self.name}.")) if of_choice else ()

    def problem(self, value: Any) -> str | None:
        """Why the widget cannot have this value."""
        if self.kind in ("COMBO", DYNAMIC):
            return None if value in self._choices() else f"is none of {self._choices()}"
        kinds = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}[self.kind]
        if not isinstance(value, kinds) or (isinstance(value, bool) and self.kind != "BOOLEAN"):
            return f"is not of type {self.kind}"
        if self.kind not in ("INT", "FLOAT"):
            return None
        lowest, highest = self.options.get("min"), self.options.get("max")
        if (lowest is not None and value < lowest) or (highest is not None and value > highest):
            return f"is not from {lowest} to {highest}"
        if self.kind == "INT" and (value - (lowest or 0)) % self.options.get("step", 1):
            return f"is off the steps of {self.options['step']} from {lowest}"
        return None

    def _choices(self) -> tuple[object, ...]:
        if self.kind == DYNAMIC:
            return tuple(option["key"] for option in self.options["options"])
        return tuple(self.options["choices"] if "choices" in self.options else self.options["options"])


@dataclass(frozen=True, slots=True)
class Definition:
    """One type of node.

    Attributes:
        package: The registry's id of its package.
        inputs: Required before optional, as widgets are stored.
        outputs: Name and type of each.
        is_output: It ends a workflow: what leads to none is never run.
    """

    package: str
    inputs: tuple[Input, ...]
    outputs: tuple[tuple[str, str], ...]
    is_output: bool

    @property
    def sockets(self) -> tuple[Input, ...]:
        return tuple(each for each in self.inputs if not each.is_widget)

    def widgets(self, values: Sequence[object]) -> list[tuple[Input, object]]:
        """Each stored value with its widget; ends early where values run out.

        Raises:
            ValueError: There are values without a widget.
        """
        left = list(values)
        named = list(_taken([each for each in self.inputs if each.is_widget], left))
        if left:
            raise ValueError(f"{len(left)} values too many: {left}")
        return named

    def input(self, name: str) -> Input | None:
        return next((each for each in self.inputs if each.name == name), None)


def recorded(path: Path) -> dict[str, Definition]:
    """The definitions in a file that `object_info/record.py` wrote."""
    answer = json.loads(path.read_text(encoding="utf-8"))
    return {name: _definition(answer["package"], node) for name, node in answer["nodes"].items()}


def live(package: str, classes: Mapping[str, Any]) -> dict[str, Definition]:
    """The definitions of node classes as ComfyUI gives them."""
    return {
        name: _definition(
            package,
            {
                "input": node.INPUT_TYPES(),
                "output": node.RETURN_TYPES,
                "output_name": getattr(node, "RETURN_NAMES", node.RETURN_TYPES),
                "output_node": getattr(node, "OUTPUT_NODE", False),
            },
        )
        for name, node in classes.items()
    }


def _definition(package: str, node: Mapping[str, Any]) -> Definition:
    outputs = tuple(zip(node["output_name"], node["output"], strict=True))
    return Definition(package, tuple(_inputs(node["input"])), outputs, bool(node["output_node"]))


def _inputs(groups: Mapping[str, Any], *, prefix: str = "") -> Iterator[Input]:
    for group in ("required", "optional"):
        for name, (kind, *rest) in groups.get(group, {}).items():
            options = dict(rest[0]) if rest else {}
            if not isinstance(kind, str):
                kind, options = "COMBO", {**options, "choices": tuple(kind)}
            yield Input(prefix + name, kind, is_required=group == "required", options=options)


def _taken(widgets: Sequence[Input], left: list[object]) -> Iterator[tuple[Input, object]]:
    for widget in widgets:
        if not left:
            return
        value = left.pop(0)
        yield widget, value
        yield from _taken([*widget.extras(), *widget.chosen(value)], left)
