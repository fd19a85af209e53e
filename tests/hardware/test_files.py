"""Files of ours are written whole or not at all, and replace any file of the same name."""

from __future__ import annotations

import json
import os
import secrets
import sys
from pathlib import Path

import pytest
from wanvideo_enhanced_blockswap.hardware.files import write_json

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows needs a right for links")


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
