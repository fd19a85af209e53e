"""Whether a forward may be called once more as it was called before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from wanvideo_enhanced_blockswap.blockswap.wrapper.retry import Inputs


def call() -> dict[str, Any]:
    """Arguments as ComfyUI's nodes make them: inference tensors in lists and mappings."""
    with torch.inference_mode():
        latents = torch.linspace(0, 1, 77).reshape(7, 11)
        rows = torch.arange(640.0).reshape(64, 10)
        odd = torch.arange(5, dtype=torch.uint8)
        part = torch.arange(24.0).reshape(4, 6)[1:3, ::2]
    return {
        "x": [latents, torch.zeros(3)],
        "t": torch.ones(1),
        "odd": odd,
        "rows": rows,
        "part": part,
        "nested": {"cond": ({"a": latents.clone(), "b": 1.5},), "name": "x"},
        "nan": float("nan"),
        "flag": True,
        "nothing": None,
        "empty": torch.zeros(0),
        "module": torch.nn.Linear(2, 2),
    }


def test_what_nobody_has_touched_is_still_the_same() -> None:
    arguments = call()
    assert Inputs.of(arguments).are_still(arguments)


def edits() -> dict[str, Callable[[dict[str, Any]], object]]:
    return {
        "an inference tensor edited": lambda a: a["x"][0].add_(0.25),
        "one element of it": lambda a: a["x"][0][3].__setitem__(4, 9.0),
        "rows that change places": lambda a: a["rows"].copy_(a["rows"].flip(0).clone()),
        "bytes that fill no word": lambda a: a["odd"].__setitem__(2, 200),
        "a view": lambda a: a["part"].mul_(2),
        "a normal tensor edited": lambda a: a["t"].add_(1),
        "a normal tensor edited back": lambda a: a["t"].add_(1).sub_(1),
        "a tensor deep inside": lambda a: a["nested"]["cond"][0]["a"].neg_(),
        "a list longer": lambda a: a["x"].append(torch.zeros(1)),
        "another tensor in its place": lambda a: a["x"].__setitem__(1, torch.zeros(3)),
        "a key more": lambda a: a["nested"].update(more=1),
        "another number": lambda a: a["nested"]["cond"][0].update(b=2.5),
        "a switch thrown": lambda a: a.update(flag=False),
        "a number for a switch": lambda a: a.update(flag=1),
        "another module": lambda a: a.update(module=torch.nn.Linear(2, 2)),
        "data of another": lambda a: setattr(a["t"], "data", torch.zeros(1)),
    }


@pytest.mark.parametrize("name", edits())
def test_an_edit_is_seen(name: str) -> None:
    arguments = call()
    before = Inputs.of(arguments)
    with torch.inference_mode():
        edits()[name](arguments)
    assert not before.are_still(arguments)


def test_a_tensor_whose_bytes_cannot_be_added_up_is_not_taken_for_the_same() -> None:
    with torch.inference_mode():
        conjugate = torch.zeros(4, dtype=torch.complex64).conj()
    assert not Inputs.of(conjugate).are_still(conjugate)


def test_containers_that_hold_themselves_end_somewhere() -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert Inputs.of(loop).are_still(loop)
