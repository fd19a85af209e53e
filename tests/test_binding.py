"""Where a tensor's pointer is switched: in one file."""

from __future__ import annotations

import ast

from test_architecture import ROOT, SHIPPED, nodes


def assigned(node: ast.AST) -> list[ast.expr]:
    """What an assignment of any kind writes to."""
    if isinstance(node, ast.Assign):
        return [one for target in node.targets for one in getattr(target, "elts", [target])]
    return [node.target] if isinstance(node, (ast.AugAssign, ast.AnnAssign)) else []


def test_only_the_binding_assigns_data_to_a_tensor() -> None:
    """And a slab that is given up. The demo model of `commands` is made before it is swapped, and is not counted."""
    files = {
        str(path.relative_to(ROOT))
        for path in SHIPPED
        for node in nodes(path)
        for target in assigned(node)
        if isinstance(target, ast.Attribute) and target.attr == "data"
    }
    assert {file for file in files if not file.startswith("commands/")} == {
        "blockswap/engine/binding.py",
        "blockswap/host/slabs.py",
    }


def test_nothing_sets_data_by_name_or_re_points_storage_besides_a_fresh_view() -> None:
    calls = {
        (str(path.relative_to(ROOT)), name)
        for path in SHIPPED
        for node in nodes(path)
        if isinstance(node, ast.Call)
        for name in [ast.unparse(node.func).rpartition(".")[2]]
        if name in ("set_", "set_data", "swap_tensors")
        or (name == "setattr" and isinstance(node.args[1], ast.Constant) and node.args[1].value == "data")
    }
    assert calls == {("blockswap/model/tensors.py", "set_")}
