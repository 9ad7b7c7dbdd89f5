"""Examples become tensors: what stands where, and which position predicts which target."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from open_instruct.data.packing import IGNORE, Packing, Padding, pack, pad, to_device

EXAMPLES = [{"input_ids": [11, 12, 13, 14], "spans": [2, 3]}, {"input_ids": [21, 22, 23], "spans": [0, 3]}]
LENGTHS = np.array([4, 3, 9, 5, 6])


def test_a_packed_row_names_the_position_that_predicts_each_target():
    batch = pack(EXAMPLES)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 14, 21, 22, 23]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch["lengths"] == (4, 3)
    assert batch["targets"].tolist() == [13, 22, 23]  # 21 follows another example's token
    assert batch["target_positions"].tolist() == [1, 4, 5]
    assert batch["input_ids"][0, batch["target_positions"] + 1].tolist() == batch["targets"].tolist()


def test_padded_rows_have_the_same_targets():
    batch = pad(EXAMPLES, 7)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 14], [21, 22, 23, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 13, IGNORE], [IGNORE, 22, 23, IGNORE]]


@pytest.mark.parametrize("batching, num_positions", [(Padding(4, 0), 2 * (9 + 5)), (Packing(64), 9 + 3 + 5)])
def test_positions_count_padding_and_virtual_tokens(batching, num_positions):
    assert batching.positions([1, 2], LENGTHS, 5) == num_positions


def test_rows_are_halved_until_the_longest_example_fills_one():
    first = Packing(64).halved(range(5), LENGTHS)
    assert first == Packing(27 // 2)
    assert first.halved(range(5), LENGTHS) is None  # its rows have 9 tokens already, as the longest example
    assert Padding(4, 0).halved(range(5), LENGTHS) is None


def test_all_tensors_move_to_the_device_and_nothing_else_changes():
    batch = to_device(pack(EXAMPLES), torch.device("meta"))
    assert {name for name, value in batch.items() if getattr(value, "is_meta", False)} == set(batch) - {"lengths"}
    assert batch["lengths"] == (4, 3)
