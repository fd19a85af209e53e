"""The search for what the wrapper does to weights, in a made-up source, and the table of what it has found."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path

import pytest
from wrapper_lines import read_table, statements

PACKAGE = "wanvideo_enhanced_blockswap.blockswap"

MODEL = """
from torch import nn
import torch

class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x):
        return self.linear(x.to(self.linear.weight.dtype))

class Model(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.layers = nn.ModuleList([Block(dim) for _ in range(4)])
        self.head = Block(dim)
        self.seen = 0

    def forward(self, x, device):
        self.seen = self.seen + x.shape[0]
        x = x.to(device)
        for layer in self.layers:
            x = layer(x)
            log(f"{x.mean()}")
        return x.cpu()
"""

NODES = """
def sample(transformer, vae, latents, device):
    latents = latents * 2
    samples = transformer(latents, device)
    vae.to(device)
    del latents
    return samples.to(device)
"""

KNOWN = {("model.py", "Model.forward", "for layer in self.layers:")}


def found(folder: Path, **sources: str) -> set[tuple[str, str, str]]:
    for name, source in {"model": MODEL, "nodes": NODES, **sources}.items():
        (folder / f"{name}.py").write_text(source, "utf-8")
    return statements(folder)


def test_nothing_is_found_in_what_leaves_weights_alone(tmp_path: Path) -> None:
    assert found(tmp_path) == KNOWN


@pytest.mark.parametrize(
    "line",
    [
        "transformer.to(device)",
        "transformer.head.to(device)",
        "transformer = transformer.half()",
        "transformer.layers[0].cuda()",
        "first = transformer.layers[0]",
        "transformer.head = Block(2)",
        "transformer.extra = torch.nn.Linear(2, 2)",
        "transformer.head.linear.weight.data = latents",
        "latents = transformer.head.forward(latents)",
        "device = transformer.head.linear.weight.device",
        "names = dict(transformer.named_parameters())",
        "transformer.load_state_dict(latents)",
        "transformer.head._parameters['weight'] = latents",
        "setattr(transformer, name, latents)",
        "set_module_tensor_to_device(transformer, name, device)",
        "transformer = torch.compile(transformer)",
        "sd = patcher.model['sd']",
        "sd[name] = latents",
        "del transformer",
        "anything.to(device)",
        "mm.unload_all_models()",
    ],
)
def test_a_new_statement_about_weights_is_found(tmp_path: Path, line: str) -> None:
    added = NODES.replace("    latents = latents * 2", f"    {line}")
    assert found(tmp_path, nodes=added) - KNOWN == {("nodes.py", "sample", line)}


@pytest.mark.parametrize("line", ["for block in self.layers:", "with torch.no_grad(), self.head.to(device):"])
def test_of_a_statement_with_others_inside_the_first_line_is_found(tmp_path: Path, line: str) -> None:
    added = MODEL.replace("        x = x.to(device)", f"        {line}\n            x = x + 1")
    assert found(tmp_path, model=added) - KNOWN == {("model.py", "Model.forward", line)}


def test_files_of_other_models_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "qwen").mkdir()
    assert found(tmp_path, **{"qwen/text": "def load(model, device):\n    model.to(device)\n"}) == KNOWN
    assert found(tmp_path, text="def load(model, device):\n    model.to(device)\n") != KNOWN


def test_no_statement_is_in_the_table_twice() -> None:
    groups = list(read_table().values())
    assert len(set().union(*groups)) == sum(map(len, groups)) > 400


@pytest.mark.parametrize("group", read_table())
def test_the_table_says_where_each_statement_is_dealt_with(group: str) -> None:
    _, has_names, names = group.rpartition(": ")
    for name in names.split(", ") if has_names else ():
        room, module, *inside = name.split(".")
        functools.reduce(getattr, inside, importlib.import_module(f"{PACKAGE}.{room}.{module}"))
