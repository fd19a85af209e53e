"""Reads a Wan model's blocks, tensors and bytes from the headers of its files, without loading a weight."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection, Sequence
from pathlib import Path

from ..errors import CheckpointError, printable
from ..model.names import EXTRA_MODELS, parts, place
from ..model.recognise import CheckpointProfile, TensorInfo, profile_tensors
from .headers import LONGEST_HEADER, HeaderError, read_gguf, read_safetensors

FORMATS = {
    ".safetensors": ("safetensors", read_safetensors),
    ".sft": ("safetensors", read_safetensors),
    ".gguf": ("GGUF", read_gguf),
}

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
DOWNLOADS = (".part", ".crdownload", ".download", ".incomplete", ".aria2", ".opdownload", ".tmp")

PICKLE_CURE = "convert it to .safetensors, or download that file of the model"
CONTENTS = (
    (rb"GGUF", "GGUF", "a GGUF file", "rename it to .gguf, by which the loader knows it"),
    (rb".{8}\{", "safetensors", "a safetensors file", "rename it to .safetensors, by which the loader knows it"),
    (
        rb"version https://git-lfs",
        "",
        "a Git LFS pointer to the model",
        "run git lfs pull, or download the file itself",
    ),
    (rb"\s*<(!doctype|html|\?xml)", "", "a web page in the place of the model", "download the file by its own link"),
    (rb"PK\x03\x04", "", "a zip file, in which torch.save keeps pickles", PICKLE_CURE),
    (rb"\x80[\x02-\x05].{0,5}[^\0]", "", "a pickle", PICKLE_CURE),
)
"""Beginnings of files, the format that they are, what the file is called, and what to do if it should be another;
the first that fits decides."""

SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.safetensors)", re.IGNORECASE)
INDEX, SHARDS = ".index.json", ".safetensors"
MOST_SHARDS = 1000


def read_checkpoint(path: Path, *, modules: Sequence[Path] = (), loras: Sequence[Path] = ()) -> CheckpointProfile:
    """The profile of a Wan transformer from the headers of its .safetensors or .gguf files.

    Args:
        path: One file with all blocks, in Wan's own layout or diffusers'; of a model in several files, any of them or
            its index.
        modules: Files that the loader merges into the model, such as VACE's or InfiniteTalk's.
        loras: LoRAs that are not merged into the weights.

    Raises:
        CheckpointError: A file is missing, truncated, of another format, not of a Wan model or incomplete, or the
            package that reads it is missing.
    """
    stored = _read_all(path)
    added = [(file, _read_all(file)) for file in modules]
    for file, tensors in added:
        _check_format(path, file, tensors)
    return profile_tensors(
        printable(str(path)),
        stored,
        modules=[(printable(str(file)), tensors) for file, tensors in added],
        loras=[(printable(str(file)), _read(file)) for file in loras],
    )


def model_files(path: Path) -> tuple[Path, ...]:
    """The files that a model is in: the file itself, or all of a model in several files.

    Raises:
        CheckpointError: An index is not one, or a file is missing.
    """
    match = SHARD.fullmatch(path.name)
    if path.name.endswith(INDEX):
        names = _indexed(path)
    elif match and 0 < int(match[2]) <= MOST_SHARDS:
        index = path.with_name(f"{match[1]}{match[3]}{INDEX}")
        count = int(match[2])
        numbered = [f"{match[1]}-{number:05}-of-{count:05}{match[3]}" for number in range(1, count + 1)]
        names = _indexed(index) if os.path.isfile(index) else numbered
    else:
        return (path,)
    files = tuple(path.with_name(name) for name in names)
    missing = [file.name for file in files if not os.path.isfile(file)]  # unlike Path's, it raises nothing
    if missing:
        shown = printable(", ".join(missing[:5]))
        raise CheckpointError(
            f"{printable(str(path))} is of a model in {len(files)} files, of which {len(missing)} are missing: "
            f"{shown}; download them into the same folder"
        )
    return files


def _check_format(path: Path, module: Path, tensors: Collection[str]) -> None:
    """The loader takes no GGUF module with a safetensors model, and the reverse with some modules alone."""
    model_is_gguf, module_is_gguf = (file.suffix.lower() == ".gguf" for file in (path, module))
    is_strict = any(part in EXTRA_MODELS for part in parts([place(name) for name in tensors]))
    if model_is_gguf == module_is_gguf or (model_is_gguf and not is_strict):
        return
    wanted = ".gguf" if model_is_gguf else ".safetensors"
    raise CheckpointError(
        f"{printable(str(path))} takes modules of its own format: expected a {wanted} file, got "
        f"{printable(module.name)}; give the module as {wanted}"
    )


def _indexed(index: Path) -> list[str]:
    """The files that an index names, all of them in its folder."""
    source = printable(str(index))
    try:
        with index.open("rb") as file:
            found = json.loads(file.read(LONGEST_HEADER + 1))["weight_map"].values()
        names = sorted(set(found))
    except OSError as exc:
        raise _unreadable(source, exc) from exc
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        names = []
    if not names or len(names) > MOST_SHARDS or not all(type(n) is str and n.endswith(SHARDS) for n in names):
        raise CheckpointError(f"{source} is not the index of a model in several files; name the model file")
    if any("/" in name or "\\" in name for name in names):
        raise CheckpointError(f"{source} names files in other folders; download the model again")
    return names


def _read_all(path: Path) -> dict[str, TensorInfo]:
    """The tensors of all files of a model."""
    stored: dict[str, TensorInfo] = {}
    for file in model_files(path):
        stored |= _read(file)
    return stored


def _read(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file."""
    source, suffix = printable(str(path)), path.suffix.lower()
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise CheckpointError(f"{source} is a folder; name the model file inside it")
        if not stat.S_ISREG(found.st_mode):  # a read from a pipe would wait for its writer
            raise CheckpointError(f"{source} is a pipe, a socket or a device; name a model file")
        if suffix not in FORMATS:
            raise _wrong_suffix(path)
        if os.path.exists(f"{path}.aria2"):
            raise CheckpointError(
                f"{source} is an unfinished download, as {source}.aria2 shows; let it finish, or resume it"
            )
        kind, read = FORMATS[suffix]
        with path.open("rb") as file:
            start = file.read(64)
        seen = next((row for row in CONTENTS if re.match(row[0], start, re.DOTALL | re.IGNORECASE)), None)
        if seen is not None and seen[1] != kind:
            raise CheckpointError(f"{source} is {seen[2]}; {seen[3]}")
        return read(path)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise CheckpointError(f"there is no model file {source}; check the name and the folder") from exc
    except OSError as exc:
        raise _unreadable(source, exc) from exc
    except HeaderError as exc:
        message = f"{source} ({found.st_size:,} bytes) is not a complete {kind} file: {exc}"
        raise CheckpointError(f"{message}; {exc.remedy}") from exc


def _unreadable(source: str, failure: OSError) -> CheckpointError:
    why = printable(str(failure))
    return CheckpointError(f"{source} cannot be read ({why}); check its permissions and its disk")


def _wrong_suffix(path: Path) -> CheckpointError:
    expected = f"expected a .safetensors or .gguf file, got {printable(path.name)}"
    if path.suffix.lower() in PICKLES:
        return CheckpointError(f"{expected}, a pickle, which runs code when it is loaded; {PICKLE_CURE}")
    if path.suffix.lower() in DOWNLOADS:
        return CheckpointError(f"{expected}, an unfinished download; let it finish, or resume it")
    return CheckpointError(f"{expected}; convert it, or name another")
