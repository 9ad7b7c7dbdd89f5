"""Keys of the token cache, and what is drawn and held out by seed."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest

from open_instruct.data import dataset
from open_instruct.data.dataset import Examples
from open_instruct.data.token_cache import SCHEMA
from open_instruct.errors import InputError


def examples(count: int) -> Examples:
    rows = {"input_ids": [[i, i, i] for i in range(count)], "spans": [[1, 3]] * count}
    return Examples(pa.table(rows, schema=SCHEMA), np.arange(count), "f")


def test_the_key_of_files_stays_as_it_was(tmp_path, monkeypatch):
    """The digest of the files' digests, as every cache was named; also where Python has no `file_digest` (3.10)."""
    contents = [b"", b"a" * 20_000_000, b"c"]
    paths = [tmp_path / str(i) for i in range(3)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    expected = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()
    assert dataset.file_key(paths) == expected
    monkeypatch.delattr(hashlib, "file_digest", raising=False)
    assert dataset.file_key(paths) == expected
    assert dataset.file_key(paths[:2]) != expected


def test_labels_are_counted_without_a_token_that_nothing_predicts():
    rows = {"input_ids": [[1] * 9, [1] * 5], "spans": [[0, 2, 4, 9], [1, 2]]}
    counted = Examples(pa.table(rows, schema=SCHEMA), np.array([1, 0]), "f")
    assert counted.lengths.tolist() == [5, 9] and counted.label_counts.tolist() == [1, 6]


def test_held_out_examples_are_drawn_by_seed_and_the_rest_is_trained_on():
    train, held_out = dataset.hold_out(examples(100), 0.2, 10, seed=1)
    assert len(held_out) == 10 and sorted([*train.rows, *held_out.rows]) == list(range(100))
    assert held_out.rows.tolist() == dataset.hold_out(examples(100), 0.2, 10, seed=1)[1].rows.tolist()
    assert held_out.rows.tolist() != dataset.hold_out(examples(100), 0.2, 10, seed=2)[1].rows.tolist()
    assert dataset.hold_out(examples(100), 0, 10, seed=1)[1] is None
    with pytest.raises(InputError, match="only one conversation"):
        dataset.hold_out(examples(1), 0.5, 10, seed=1)


def test_a_draw_keeps_the_order():
    rows = dataset.draw(examples(100), 30, seed=1).rows.tolist()
    assert rows == sorted(set(rows)) and len(rows) == 30
    assert len(dataset.draw(examples(100), None, seed=1)) == 100
