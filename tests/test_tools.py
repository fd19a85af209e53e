"""What comfy-cli and comfy-test say of the package and its examples, offline and without a trace in the home folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from frontend import answers
from wanvideo_enhanced_blockswap import NODE_CLASS_MAPPINGS

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(answers.EXAMPLES.glob("*.json"))
COMFY = ("comfy", "--skip-prompt", "--no-enable-telemetry")
NOWHERE = "http://127.0.0.1:9"
"""A proxy that answers nobody."""

SHIPPED = (
    r"(CHANGELOG|CONTRIBUTING|README)\.md",
    r"LICENSE|py\.typed|pyproject\.toml|requirements\.txt",
    r"\w+\.py",
    r"blockswap/(\w+/)?\w+\.py",
    r"commands/\w+\.py",
    r"docs/[\w-]+\.(gif|json|md|png)",
    r"example_workflows/\d\d [\w ,.-]+\.(jpg|json)",
    r"hardware/(\w+/)?\w+\.py",
    r"hardware/cards/cards\.csv",
    r"locales/[a-z]{2}/(main|nodeDefs|settings)\.json",
    r"web/docs/\w+(/[a-z]{2})?\.md",
    r"web/docs/\w+/\w+(\.[a-z]{2})?\.png",
    r"web/docs/\w+/\w+(\.[a-z]{2})?\.png",
    r"web/js/\w+\.js",
)
"""All that a user gets."""

LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("shipped", "__init__.py", submodule_search_locations=["."])
sys.modules["shipped"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(*module.NODE_CLASS_MAPPINGS)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Another home, and no network."""
    home = str(tmp_path_factory.mktemp("home"))
    folders = ("HOME", "USERPROFILE", "APPDATA", "LOCALAPPDATA", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
    proxies = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, **dict.fromkeys(folders, home), **dict.fromkeys(proxies, NOWHERE), "PATH": tools}


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def run(environment: Mapping[str, str]) -> Run:
    """Runs a tool of this Python's."""

    def run(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
        program = shutil.which(command[0], path=environment["PATH"])
        assert program is not None, f'{command[0]} is missing: pip install -e ".[test]"'
        return subprocess.run(
            [program, *command[1:]],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def checkout(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the files of this one, those included that are about to be added."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is no git checkout: what is packed is what git knows")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    folder = tmp_path_factory.mktemp("checkout")
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for command in (("git", "init", "--quiet"), ("git", "add", "--all")):
        assert run(folder, *command).returncode == 0
    return folder


@pytest.fixture(scope="module")
def shipped(run: Run, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a user has after installing."""
    packed = run(checkout, *COMFY, "node", "pack")
    assert packed.returncode == 0, packed.stdout + packed.stderr
    folder = tmp_path_factory.mktemp("custom_nodes") / "wanvideo-enhanced-blockswap"
    with zipfile.ZipFile(checkout / "node.zip") as archive:
        archive.extractall(folder)
    return folder


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_only_what_a_user_needs_is_shipped(shipped: Path) -> None:
    known = re.compile("|".join(f"(?:{pattern})" for pattern in SHIPPED))
    assert [name for name in files_of(shipped) if not known.fullmatch(name)] == []


@pytest.mark.parametrize("pattern", SHIPPED)
def test_each_kind_of_file_is_shipped(shipped: Path, pattern: str) -> None:
    assert any(re.fullmatch(pattern, name) for name in files_of(shipped))


def test_what_is_shipped_can_be_loaded(run: Run, shipped: Path) -> None:
    loaded = run(shipped, sys.executable, "-B", "-c", LOAD)
    assert loaded.stdout.split() == list(NODE_CLASS_MAPPINGS), loaded.stderr


def test_the_registry_accepts_the_package_without_a_warning(run: Run, checkout: Path) -> None:
    checked = run(checkout, *COMFY, "node", "validate")
    said = checked.stdout + checked.stderr
    assert checked.returncode == 0
    assert "All validation checks passed" in said
    assert "warning" not in said.lower()


def test_the_registry_warns_of_code_that_executes_text(run: Run, checkout: Path, tmp_path: Path) -> None:
    shutil.copy(checkout / "pyproject.toml", tmp_path)
    (tmp_path / "nodes.py").write_text('exec("1")\n', encoding="utf-8")
    checked = run(tmp_path, *COMFY, "node", "validate")
    assert "Security warnings" in checked.stdout + checked.stderr


def test_what_is_shipped_has_no_lint(run: Run, shipped: Path) -> None:
    checked = run(shipped, "comfy-test", "lint", "--strict", "--json")
    results = json.loads(checked.stdout)["results"]
    assert [(name, each["error"], each["details"]) for name, each in results.items() if not each["passed"]] == []
    assert checked.returncode == 0
    assert results["javascript"]["summary"] == {"errors": 0, "warnings": 0}


def test_lint_finds_a_write_to_the_page(run: Run, shipped: Path, tmp_path: Path) -> None:
    shutil.copytree(shipped, tmp_path, dirs_exist_ok=True)
    (tmp_path / "web" / "js" / "more.js").write_text("window.bar = 1;\n", encoding="utf-8")
    assert run(tmp_path, "comfy-test", "lint", "--strict").returncode == 1


# Examples


@pytest.fixture(scope="module")
def object_info(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the answer of a ComfyUI that has what the examples need."""
    file = tmp_path_factory.mktemp("server") / "object_info.json"
    file.write_text(json.dumps(answers.object_info()), encoding="utf-8")
    return file


def validated(run: Run, workflow: Path, object_info: Path) -> dict[str, Any]:
    command = (*COMFY, "--json", "workflow", "validate", "--workflow", workflow, "--input", object_info)
    said = run(object_info.parent, *command)
    return {"rc": said.returncode, **json.loads(said.stdout.splitlines()[-1])["data"]}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_valid_without_a_warning(run: Run, example: Path, object_info: Path) -> None:
    data = validated(run, example, object_info)
    nodes = [node for node in json.loads(example.read_bytes())["nodes"] if node["type"] != "MarkdownNote"]
    assert (data["errors"], data["warnings"]) == ([], [])
    assert (data["rc"], data["valid"], data["converted_node_count"]) == (0, True, len(nodes))


@pytest.mark.parametrize("value", [10_000, "many"], ids=["above the highest", "of another type"])
def test_a_value_that_is_wrong_is_found(run: Run, tmp_path: Path, object_info: Path, value: object) -> None:
    workflow = json.loads(EXAMPLES[0].read_bytes())
    node = next(node for node in workflow["nodes"] if node["type"] == "WanVideoEnhancedBlockSwap")
    node["widgets_values"][4] = value
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(workflow), encoding="utf-8")
    data = validated(run, broken, object_info)
    assert [each["field"] for each in (*data["errors"], *data["warnings"])] == ["vram_threshold_percent"]
