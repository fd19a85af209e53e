"""Files of ours are written whole or not at all, past whatever stands in their place, and read without trust."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from wanvideo_enhanced_blockswap.hardware.files import read_json, write_json

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows has other rights, and needs one for links")
MOST = 1000


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---- written


def test_what_is_written_is_there_and_nothing_else(tmp_path):
    path = tmp_path / "new" / "folder" / "file.json"
    write_json(path, {"a": [1, "ä"]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1, "ä"]}
    assert list(path.parent.iterdir()) == [path]


class Stopped(BaseException):
    """As an interrupt: no Exception."""


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt(), Stopped(), MemoryError()])
@pytest.mark.parametrize(("owner", "step"), [(json, "dump"), (os, "replace")])
def test_whatever_ends_a_write_leaves_the_old_file_and_no_draft(tmp_path, monkeypatch, owner, step, failure):
    def fail(*_arguments, **_options):
        raise failure

    path = tmp_path / "file.json"
    path.write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(owner, step, fail)
        with pytest.raises(type(failure)):
            write_json(path, {"a": 1})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_draft_that_cannot_be_removed_does_not_hide_what_ended_the_write(tmp_path, monkeypatch):
    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    def refuse(*_arguments, **_options):
        raise PermissionError("in use")

    monkeypatch.setattr(json, "dump", interrupted)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "file.json", {})


def test_a_number_that_json_does_not_know_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "file.json", {"speed": float("nan")})
    assert list(tmp_path.iterdir()) == []


@posix_only
def test_a_link_in_the_files_place_is_replaced_and_not_written_through(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "ours" / "file.json"
    victim.write_text("precious")
    path.parent.mkdir()
    path.symlink_to(victim)
    write_json(path, {"a": 1})
    assert victim.read_text() == "precious"
    assert not path.is_symlink()
    assert json.loads(path.read_text()) == {"a": 1}


@posix_only
def test_a_link_in_the_drafts_place_is_not_written_through(tmp_path, monkeypatch):
    victim, path = tmp_path / "victim", tmp_path / "ours" / "file.json"
    victim.write_text("precious")
    write_json(path, {})
    monkeypatch.setattr(secrets, "token_hex", lambda _length: "guessed")
    (path.parent / ".file.json.guessed.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_json(path, {"a": 1})
    assert victim.read_text() == "precious"


def test_two_drafts_never_have_the_same_name(tmp_path, monkeypatch):
    drafts = []
    monkeypatch.setattr(os, "replace", lambda draft, _path: drafts.append(draft))
    write_json(tmp_path / "file.json", {})
    write_json(tmp_path / "file.json", {})
    assert len(set(drafts)) == 2
    assert {draft.parent for draft in drafts} == {tmp_path}


@posix_only
def test_nobody_else_may_write_what_is_made_even_where_the_umask_lets_them(tmp_path):
    path = tmp_path / "ours" / "file.json"
    with umask(0):
        write_json(path, {})
    assert (mode(path.parent), mode(path)) == (0o755, 0o644)


@posix_only
def test_a_stricter_umask_is_kept(tmp_path):
    path = tmp_path / "ours" / "file.json"
    with umask(0o077):
        write_json(path, {})
    assert (mode(path.parent), mode(path)) == (0o700, 0o600)


# ---- read


def test_what_was_written_is_read(tmp_path):
    write_json(tmp_path / "file.json", {"a": [1, None]}, indent=1)
    assert read_json(tmp_path / "file.json", most_bytes=MOST) == {"a": [1, None]}


def test_a_file_that_is_not_there_is_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "file.json", most_bytes=MOST)


@pytest.mark.parametrize("length", [MOST, MOST + 1, pytest.param(1 << 30, marks=posix_only)])
def test_a_file_that_is_too_long_is_not_read(tmp_path, length):
    path = tmp_path / "file.json"
    path.write_text("1")
    with path.open("r+b") as file:
        file.truncate(length)  # NULs, which take no room on the disk
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="it has more than 1,000 bytes" if length > MOST else "Extra data"):
            read_json(path, most_bytes=MOST)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


@posix_only
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "file.json")
    with pytest.raises(ValueError, match="it is no regular file"):
        read_json(tmp_path / "file.json", most_bytes=MOST)


@posix_only
def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text("{}")
    (tmp_path / "file.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"file\.json"):
        read_json(tmp_path / "file.json", most_bytes=MOST)


def test_a_folder_in_its_place_is_an_error_of_the_system(tmp_path):
    (tmp_path / "file.json").mkdir()
    with pytest.raises(OSError, match=r"file\.json"):
        read_json(tmp_path / "file.json", most_bytes=MOST)
