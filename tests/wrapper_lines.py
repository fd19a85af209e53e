"""Finds the statements of the wrapper that read, move, replace or free blocks or weights of its transformers.

Left out are files and names of other models, and what reads no more than the type and the shape of a weight.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

OTHER_FILES = re.compile(
    r"tests/|qwen/|taehv/|lynx/face/|MTV/motion4d/|Ovi/(bigvgan/|vae/|mel_converter|nodes_ovi)|fantasyportrait/pd_fgc/"
    r"|unianimate/dwpose/|multitalk/wav2vec2|FlashVSR/(TCDecoder|flashvsr_nodes)"
    r"|wanvideo/(configs/|schedulers/|wan_video_vae|modules/(clip|t5|tokenizers|vae)\.)"
)
"""Files without a part of a transformer: VAEs, encoders of texts and images, vocoders, detectors, schedulers."""

OTHERS = re.compile(
    r"vae\b|text_encoder|encoder\.model|clip|whisper|\bt5|wav2vec|nlf|taesd|tqdm|signature|_sig\b", re.I
)
"""Names of such models, and what else has attributes with the names below."""

IN_PLACE = re.compile("copy_|fill_|zero_|mul_|add_")
MOVES = re.compile("to|cpu|cuda|half|float|bfloat16|double|type|to_empty|pin_memory|apply")
CALLS = re.compile(
    "set_module_tensor_to_device|load_weights|init_blockswap|offload_transformer|block_swap|compile|compile_model|apply_lora"
    "|remove_lora_from_module|set_lora_params(_gguf)?|_replace(_with_gguf)?_linear|convert_fp8_linear|setattr|delattr"
    "|enable_vram_management|offload|onload|(un)?patch_model|patch_weight_to_device|unload_all_models|free_memory"
    "|load_models?_gpu"
)
WALKS = re.compile(
    "(named_)?(parameters|buffers|modules|children)|(load_)?state_dict|register_(buffer|parameter)|add_module"
    "|_parameters|_buffers|_modules|_apply"
)
WEIGHTS = re.compile("weight|bias|modulation|data|scale_weight")
MODELS = frozenset(("transformer", "diffusion_model", "model", "module", "submodule", "block", "blk", "layer", "param"))
"""Variables that are modules or weights, beside those that get an instance of a module's class."""

TABLE = Path(__file__).parent / "rig/wrapper_lines.txt"
"""Each statement of the newest wrapper, by what this package makes of it: a sentence, and where it is dealt with."""

LONGEST = 110
"""Letters of a statement that are kept."""


def statements(root: Path) -> set[tuple[str, str, str]]:
    """Of each such statement its file, its function, and its text: of a loop and the like the first line."""
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    trees = {name: ast.parse((root / name).read_text("utf-8")) for name in names if not OTHER_FILES.match(name)}
    finder = _Finder(trees.values())
    found = {(name, *of) for name, tree in trees.items() for of in finder.found_in(tree)}
    return {(name, function, text) for name, function, text in found if not OTHERS.search(text)}


class _Finder:
    """Knows which names are modules, and which of these are lists of modules."""

    def __init__(self, trees: Sequence[ast.Module]) -> None:
        nodes = [node for tree in trees for node in ast.walk(tree)]
        classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
        made = [
            (_last(target), node.value) for node in nodes if isinstance(node, ast.Assign) for target in node.targets
        ]
        self._classes, self._modules = {"Module"}, set(MODELS)
        for _ in range(4):  # classes of classes
            self._classes |= {node.name for node in classes if {_last(base) for base in node.bases} & self._classes}
        for _ in range(2):  # names of modules, and other names of these
            self._modules |= {name for name, value in made if len(name) > 2 and self._is_module(value)}
        self._lists = {name for name, value in made if name and "ModuleList" in map(_last, ast.walk(value))}

    def _is_module(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            return node.slice.value in self._modules
        if isinstance(node, (ast.Attribute, ast.Name)):
            return _last(node) in self._modules
        return any(isinstance(one, ast.Call) and self._is_class(one.func) for one in ast.walk(node))

    def _is_class(self, node: ast.AST) -> bool:
        return _last(node) in self._classes or re.match(r"(torch\.)?nn\.[A-Z]", ast.unparse(node)) is not None

    def found_in(self, tree: ast.AST, function: str = "") -> Iterator[tuple[str, str]]:
        """The statements of a function or module, and of those inside it."""
        body: list[ast.stmt] = []
        waiting = list(ast.iter_child_nodes(tree))
        for node in waiting:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield from self.found_in(node, f"{function}.{node.name}".lstrip("."))
            elif isinstance(node, (ast.stmt, ast.ExceptHandler)):
                waiting += ast.iter_child_nodes(node)
                body += [node] if isinstance(node, ast.stmt) else []
        members = {"block", "blk"}
        for node in body:
            if isinstance(node, ast.For) and any(_last(one) in self._lists for one in ast.walk(node.iter)):
                members |= {one.id for one in ast.walk(node.target) if isinstance(one, ast.Name) and len(one.id) > 2}
        lists = set() if function.endswith("__init__") else self._lists
        for node in body:
            own = [one for one in ast.iter_child_nodes(node) if not isinstance(one, (ast.stmt, ast.ExceptHandler))]
            inside = [one for child in own for one in ast.walk(child)]
            types = [one.value for one in inside if isinstance(one, ast.Attribute) and one.attr in ("dtype", "shape")]
            if self._changes(node) or any(self._is_found(one, lists, members) for one in inside if one not in types):
                text = re.sub(r":?\n.*", ":", ast.unparse(node).replace('"', "'"), flags=re.DOTALL)
                yield function, text if len(text) <= LONGEST else f"{text[:LONGEST]}…"

    def _is_found(self, node: ast.AST, lists: set[str], members: set[str]) -> bool:
        if isinstance(node, ast.Call):
            name, receiver = _last(node.func), getattr(node.func, "value", None)
            if not isinstance(receiver, ast.Call) and (MOVES.fullmatch(name) or IN_PLACE.fullmatch(name)):
                of = _last(receiver)
                is_inside = IN_PLACE.fullmatch(name) and _root(receiver) in MODELS
                return bool(of in self._modules | members | {"self"} or WEIGHTS.fullmatch(of) or is_inside)
            return bool(CALLS.fullmatch(name)) or (_root(receiver) in MODELS and name in self._modules | {"forward"})
        if isinstance(node, ast.Attribute):
            by = node.value.id if isinstance(node.value, ast.Name) else ""
            is_weight = WALKS.fullmatch(node.attr) or (by != "self" and WEIGHTS.fullmatch(node.attr))
            return bool(is_weight) or node.attr in lists or by in members
        return isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value == "sd"

    def _changes(self, node: ast.stmt) -> bool:
        """Whether it moves a module, hangs one on another, deletes one, or puts a weight into the state dict."""
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Call)
            and isinstance(node.value.func, ast.Attribute)
        ):
            return MOVES.fullmatch(node.value.func.attr) is not None
        if isinstance(node, ast.Delete):
            return any(_last(target) in self._modules | {"sd"} for target in node.targets)
        targets = node.targets if isinstance(node, ast.Assign) else []
        hung = [one for one in targets if isinstance(one, (ast.Attribute, ast.Subscript)) and _root(one) != "self"]
        is_module = isinstance(node, ast.Assign) and self._is_module(node.value)
        return any(_last(one) == "sd" or (is_module and isinstance(one, ast.Attribute)) for one in hung)


def _last(node: ast.AST | None) -> str:
    """The last name of an expression: `b` of `a.b`, of `a.b[0]` and of `a.b(0)`."""
    if isinstance(node, (ast.Subscript, ast.Call)):
        return _last(node.value if isinstance(node, ast.Subscript) else node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _root(node: ast.AST | None) -> str:
    """The first name of an expression: `a` of `a.b[0].c()`."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def read_table() -> dict[str, set[tuple[str, str, str]]]:
    """The statements in the table, by what this package makes of them."""
    groups: dict[str, set[tuple[str, str, str]]] = {}
    for line in filter(None, TABLE.read_text("utf-8").splitlines()):
        if line.startswith("= "):
            group = groups.setdefault(line.removeprefix("= "), set())
        elif not line.startswith(" "):
            name, _, function = line.partition(" ")
        else:
            group.add((name, function, line.strip()))
    return groups
