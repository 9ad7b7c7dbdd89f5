"""Files are there completely or not at all, whatever stands in the way."""

import errno
import hashlib
import json
import os
import secrets
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from open_instruct import files
from open_instruct.errors import InputError
from open_instruct.files import AtomicFile, replacing_by_name, sha256, write_json, write_text
from tests.conftest import ROOT


def write_big(path, text):
    with AtomicFile(path) as file:
        file.write(text.encode())


WRITERS = [write_text, write_big]


@pytest.mark.parametrize("write", WRITERS)
def test_the_old_file_is_replaced_and_nothing_else_is_left(write, tmp_path):
    path = tmp_path / "new" / "a.txt"
    write(path, "old")
    write(path, "é new")
    assert path.read_bytes() == "é new".encode()
    assert list(path.parent.iterdir()) == [path]


def test_json_is_indented_and_keeps_letters(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1, tmp_path]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"é": [1, str(tmp_path)]} and "é" in text and text.endswith("\n}\n")


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_permissions_follow_the_umask(write, umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        write(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("write", WRITERS)
def test_a_planted_link_is_never_followed(write, tmp_path, monkeypatch):
    victim, path = tmp_path / "victim", tmp_path / "a.txt"
    victim.write_text("precious")
    monkeypatch.setattr(secrets, "token_hex", lambda length: "guessed")
    (tmp_path / f".a.txt.{os.getpid()}-guessed.writing").symlink_to(victim)
    with pytest.raises(InputError, match="existed before it was made"):
        write(path, "mine")
    assert victim.read_text() == "precious" and not path.exists()


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_nothing(write, tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "flush", full)
    with pytest.raises(InputError, match=r"no space left for .*nothing was left behind"):
        write(tmp_path / "a.txt", "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block_keeps_the_old_file(error, tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(error), AtomicFile(tmp_path / "a.txt") as file:
        file.write(b"half")
        raise error
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_an_interrupt_while_a_small_file_is_flushed_keeps_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("old")

    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "flush", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


HALF_WRITTEN = """
import os, pathlib, signal, sys
from open_instruct.files import AtomicFile
from open_instruct.temporary import temporary_folder
path = pathlib.Path(sys.argv[1])
with AtomicFile(path) as file, temporary_folder(path) as folder:
    file.write(b"x" * 100)
    while len(list(path.parent.glob(f".a.txt.{os.getpid()}-*.writing"))) < 2:
        pass
    (folder / "inside").write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_is_removed_and_a_living_ones_is_not(tmp_path):
    (tmp_path / ".a.txt.notes.writing").write_text("a user's")
    words = [sys.executable, "-c", HALF_WRITTEN, str(tmp_path / "a.txt")]
    process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "writing\n"
    assert len(os.listdir(tmp_path)) == 3
    write_text(tmp_path / "b.txt", "while it lives")
    assert len(os.listdir(tmp_path)) == 4
    process.kill()
    process.communicate()
    write_text(tmp_path / "c.txt", "after it died")
    assert sorted(os.listdir(tmp_path)) == [".a.txt.notes.writing", "b.txt", "c.txt"]


def test_an_interrupt_that_arrives_twice_leaves_nothing(tmp_path):
    """As when a library in C raises it once more before `__exit__` is entered: the end of the process cleans up."""
    program = HALF_WRITTEN.replace("sys.stdin.read()", "AtomicFile.__exit__ = None; raise KeyboardInterrupt")
    words = [sys.executable, "-c", program, str(tmp_path / "a.txt")]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert "writing" in result.stdout and result.returncode != 0 and os.listdir(tmp_path) == []


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_of_libraries_have_the_umasks_permissions(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        with replacing_by_name(tmp_path / "a.safetensors") as path:
            save_file({"a": torch.zeros(2)}, path)
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode


def test_a_long_name_leaves_room_for_the_temporary_one(tmp_path):
    write_text(tmp_path / ("é" * 127), "x")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_file_without_permission_is_not_called_missing(tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    (tmp_path / "model.safetensors").chmod(0o600)
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    program = (
        "import os, pathlib, sys\nfrom open_instruct.files import check_readable\nos.setuid(65534)\n"
        "check_readable(pathlib.Path(sys.argv[1]))"
    )
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert "model.safetensors can't be used (Permission denied): change its permissions" in result.stderr


def test_small_files_need_no_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "Thread", None)
    write_text(tmp_path / "a.txt", "x")
    write_json(tmp_path / "a.json", {})
    with pytest.raises(TypeError):  # negative control
        AtomicFile(tmp_path / "b.txt")


def test_checksums_are_those_of_hashlib(tmp_path):
    data = os.urandom(3_000_000)
    with AtomicFile(tmp_path / "a", "gzip") as file:
        file.write(data[:1_000_000])
        file.write(data[1_000_000:])
    assert file.sha256 == hashlib.sha256(data).hexdigest() and file.num_bytes == len(data)
    (tmp_path / "b").write_bytes(data)
    assert sha256(tmp_path / "b") == file.sha256
