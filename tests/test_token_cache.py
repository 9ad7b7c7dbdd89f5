"""Entries of the token cache: verified, rebuilt where they are damaged, never half, and never in anybody's way."""

import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from open_instruct.data import chat, dataset, token_cache
from open_instruct.data.dataset import Examples
from open_instruct.data.token_cache import COUNTS, TOKENS
from open_instruct.errors import InputError
from tests.conftest import TINY_MODEL
from tests.warm import CONTEXT

NAMED = [
    ("row", [{"role": "user", "content": "word " * (n % 7 + 1)}, {"role": "assistant", "content": f"answer {n}"}])
    for n in range(1200)
]


def load_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    chat.set_chat_template(tokenizer, "tulu")
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def build(tokenizer, cache: Path | None, rows=NAMED, overwrite: bool = False) -> Examples:
    return dataset.build(iter(rows), tokenizer, 64, "key", cache, overwrite)


@pytest.fixture(scope="module")
def expected(tokenizer) -> Examples:
    return build(tokenizer, None)


@pytest.fixture(scope="module")
def filled(tokenizer, tmp_path_factory) -> Path:
    """A cache with one entry."""
    cache = tmp_path_factory.mktemp("filled")
    build(tokenizer, cache)
    return cache


@pytest.fixture(scope="module")
def rng() -> random.Random:
    """The same damages in each run of the tests, another one in each test."""
    return random.Random(0)


def entry_of(cache: Path) -> Path:
    (entry,) = cache.iterdir()
    return entry


def same(first: Examples, second: Examples) -> bool:
    return first.table.equals(second.table) and first.content == second.content


ODD = [b"[" * 100_000, b"null", b"[]", b'{"sha256": 1}', b"9" * 5000, b"\xff"]
KINDS = ["flipped", "zeroed", "truncated", "longer", "missing", "folder", "pipe", "empty", "odd", "entry is a file"]


@pytest.mark.parametrize("name", [TOKENS, COUNTS])
@pytest.mark.parametrize("kind", [*KINDS, *KINDS[:3], "odd", "odd"])
def test_a_damaged_entry_is_made_anew(kind, name, tokenizer, filled, expected, tmp_path, capsys, rng):
    """Bytes flipped, zeroed, cut or added anywhere in either file, files missing, replaced or of another kind."""
    cache = tmp_path / "cache"
    shutil.copytree(filled, cache)
    path = entry_of(cache) / name
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    if kind == "flipped":
        content[place] ^= 1 << rng.randrange(8)
    elif kind == "zeroed":
        content[place : place + 4096] = bytes(len(content[place : place + 4096]))
        content[0] = 0
    elif kind == "truncated":
        del content[place:]
    elif kind == "longer":
        content += b"x"
    elif kind == "odd":
        content = bytearray(rng.choice(ODD))
    path.write_bytes(b"" if kind == "empty" else content)
    if kind in ("missing", "folder", "pipe"):
        path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    if kind == "entry is a file":
        entry = entry_of(cache)
        shutil.rmtree(entry)
        entry.write_bytes(b"x")
    capsys.readouterr()
    rebuilt = build(tokenizer, cache)
    assert same(rebuilt, expected), kind
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "can't be used" in error and "tokenising again" in error, (kind, error)
    assert same(build(tokenizer, cache, rows=[]), rebuilt) and capsys.readouterr().err == ""
    assert len(list(cache.iterdir())) == 1


def test_what_is_cached_equals_what_is_in_memory(tokenizer, filled):
    """And another token, span, order of rows or choice of rows is another content."""
    cached, fresh = build(tokenizer, filled, rows=[]), build(tokenizer, None)
    assert same(cached, fresh) and cached.entry and fresh.entry is None
    backwards = fresh.subset(fresh.rows[::-1])
    others = {e.content for e in (fresh, backwards, fresh.subset(fresh.rows[1:]), build(tokenizer, None, NAMED[::-1]))}
    assert len(others) == 4
    other_table = fresh.table.slice(0, 1199)
    assert token_cache.content_of(other_table) != token_cache.content_of(fresh.table) == fresh.table_content


def test_the_fingerprint_covers_all_that_shapes_tokens(tokenizer, tmp_path):
    """Special tokens that templates write stand in none of the tokenizer's files that hold its vocabulary."""

    def fingerprint(change) -> str:
        own = AutoTokenizer.from_pretrained(TINY_MODEL)
        chat.set_chat_template(own, "tulu")
        change(own)
        return build(own, None, NAMED[:3]).fingerprint

    def other_vocabulary(own) -> None:
        own.add_tokens(["answer"])

    changes = {
        "none": lambda own: None,
        "end of turn": lambda own: setattr(own, "eos_token", "<pad>"),
        "beginning": lambda own: setattr(own, "bos_token", "</s>"),
        "template": lambda own: chat.set_chat_template(own, "zephyr"),
        "add_bos": lambda own: chat.set_chat_template(own, "tulu", add_bos=True),
        "vocabulary": other_vocabulary,
    }
    fingerprints = {name: fingerprint(change) for name, change in changes.items()}
    assert len(set(fingerprints.values())) == len(changes), fingerprints
    assert fingerprint(changes["none"]) == fingerprints["none"]


def test_another_version_of_the_tokenisers_is_another_entry(tokenizer, monkeypatch):
    first = build(tokenizer, None, NAMED[:3])
    monkeypatch.setattr(dataset.importlib.metadata, "version", lambda name: "0.0")
    second = build(tokenizer, None, NAMED[:3])
    assert first.fingerprint != second.fingerprint and first.content == second.content


@pytest.mark.parametrize("kind", ["read-only", "below a file", "dangling link", "name too long", "a file"])
def test_a_cache_that_can_not_be_written_is_said_and_done_without(kind, tokenizer, expected, tmp_path, capsys):
    cache = tmp_path / "cache"
    if kind == "read-only":
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        cache.mkdir(mode=0o500)
    elif kind == "below a file":
        (tmp_path / "file").write_text("")
        cache = tmp_path / "file" / "cache"
    elif kind == "dangling link":
        cache.symlink_to(tmp_path / "nowhere" / "deeper")
    elif kind == "name too long":
        cache = tmp_path / ("x" * 300)
    else:
        cache.write_text("")
    capsys.readouterr()
    built = build(tokenizer, cache)
    error = capsys.readouterr().err
    assert same(built, expected) and built.entry is None
    assert error.count("\n") == 1 and "kept in memory" in error, error


def start(work: Callable[[Path, Connection], None], cache: Path) -> tuple[Any, Connection]:
    """Do some work in a process of its own; gives the process, and the connection to it."""
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=work, args=(cache, there))
    process.start()
    there.close()  # so that the end of the process is the end of what it sends
    return process, here


def fill_for_ever(cache: Path, connection: Connection) -> None:
    """Begin an entry that is never complete."""

    def rows():
        yield from NAMED
        connection.send("half")
        signal.pause()

    build(load_tokenizer(), cache, rows())


def fill_on_a_full_disk(cache: Path, connection: Connection) -> None:
    """Send the error; a limit on the size of files stands for the disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        build(load_tokenizer(), cache)
    except InputError as error:
        connection.send(str(error))


def fill(cache: Path, connection: Connection) -> None:
    """Send the content of the entry."""
    connection.send(build(load_tokenizer(), cache).content)


def test_what_a_killed_process_leaves_is_removed_and_what_a_living_one_makes_is_not(tokenizer, expected, tmp_path):
    cache = tmp_path / "cache"
    (killed, first_news), (living, second_news) = start(fill_for_ever, cache), start(fill_for_ever, cache)
    assert first_news.recv() == second_news.recv() == "half"
    assert len(list(cache.iterdir())) == 2
    killed.kill()
    killed.join()
    assert len(list(cache.iterdir())) == 2
    built = build(tokenizer, cache)  # while the other one is at work on the same entry
    assert len(list(cache.iterdir())) == 2 and same(built, expected)
    living.terminate()
    living.join()
    assert living.exitcode == -signal.SIGTERM
    assert [path.name for path in cache.iterdir()] == [built.fingerprint]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    process, news = start(fill_on_a_full_disk, tmp_path / "cache")
    message = news.recv()
    process.join()
    assert "can't be used (Error writing bytes to file" in message and "--dataset_skip_cache" in message, message
    assert "\n" not in message and list((tmp_path / "cache").iterdir()) == []


def test_processes_that_fill_one_entry_together_agree(tokenizer, expected, tmp_path):
    """Over a damaged entry, too: whoever comes last takes what is there, and nobody reads half an entry."""
    cache = tmp_path / "cache"
    build(tokenizer, cache)
    (entry_of(cache) / TOKENS).write_bytes(b"damaged")
    workers = [start(fill, cache) for _ in range(4)]
    assert {news.recv() for _, news in workers} == {expected.content}
    for process, _ in workers:
        process.join()
    assert len(list(cache.iterdir())) == 1


def test_an_entry_that_another_process_has_just_moved_away(tokenizer, expected, tmp_path, monkeypatch):
    """The race of the test above at its worst moment: between this process's writing and its reading."""
    own = token_cache.publish

    def moved_away(working, entry, *others):
        own(working, entry, *others)
        shutil.rmtree(entry)

    monkeypatch.setattr(token_cache, "publish", moved_away)
    assert same(build(tokenizer, tmp_path / "cache"), expected)


def test_an_error_of_the_source_is_not_the_caches(tokenizer, tmp_path):
    def rows():
        yield from NAMED[:1100]
        raise PermissionError(13, "Permission denied", "train.jsonl")

    with pytest.raises(PermissionError):
        build(tokenizer, tmp_path / "cache", rows())
    assert list((tmp_path / "cache").iterdir()) == []


def test_entries_are_readable_as_the_umask_says(tokenizer, tmp_path):
    before = os.umask(0o027)
    try:
        build(tokenizer, tmp_path / "cache")
    finally:
        os.umask(before)
    entry = entry_of(tmp_path / "cache")
    assert entry.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in entry.iterdir()} == {0o640}
