"""A step is a set of examples, whatever the processes and micro-batches."""

import numpy as np
import pytest

from open_instruct.data.plan import Plan, balanced_rows, micro_batches


def test_an_epoch_holds_every_example_once_in_an_order_of_its_own():
    plan = Plan(num_examples=23, examples_per_step=4, num_steps=12, seed=1)
    first = np.concatenate([plan.examples(step) for step in range(6)])
    second = np.concatenate([plan.examples(step) for step in range(6, 12)])
    assert sorted(first) == sorted(second) == list(range(23))
    assert list(first) != list(range(23))
    assert list(first) != list(second)
    assert len(plan.examples(5)) == 3  # the last step of an epoch takes what is left


def test_another_seed_is_another_order():
    orders = [Plan(50, 50, 1, seed).examples(0).tolist() for seed in (1, 2)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("step, epoch", [(0, 0), (3, 12 / 23), (6, 1), (12, 2)])
def test_epochs_count_examples(step, epoch):
    assert Plan(23, 4, 12, 0).epoch(step) == pytest.approx(epoch, abs=1e-6)


@pytest.mark.parametrize("size, num_ranks", [(1, 1), (4, 1), (3, 2), (5, 3), (16, 2)])
def test_micro_batches_of_all_processes_hold_the_step_once_and_are_equally_many(size, num_ranks):
    lengths = np.random.default_rng(0).integers(1, 100, 40)
    examples = [3, 1, 4, 15, 9, 2, 6, 5, 35, 8, 7]
    ranks = [micro_batches(examples, lengths, size, rank, num_ranks) for rank in range(num_ranks)]
    assert sorted(i for batches in ranks for batch in batches for i in batch) == sorted(examples)
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(batch) <= size for batches in ranks for batch in batches)


def test_examples_of_similar_length_share_a_micro_batch():
    lengths = np.array([10, 100, 11, 101, 12, 102])
    batches = micro_batches([0, 1, 2, 3, 4, 5], lengths, 3, 0, 1)
    assert [sorted(batch) for batch in batches] == [[1, 3, 5], [0, 2, 4]]


@pytest.mark.parametrize("max_tokens, num_ranks", [(1000, 1), (100, 1), (120, 2), (250, 4), (100, 16)])
def test_rows_of_all_processes_hold_the_step_once_within_the_bound(max_tokens, num_ranks):
    lengths = np.random.default_rng(0).integers(1, 100, 40)
    examples = [3, 1, 4, 15, 9, 2, 6, 5, 35, 8, 7]
    ranks = [balanced_rows(examples, lengths, max_tokens, rank, num_ranks) for rank in range(num_ranks)]
    rows = [row for rows in ranks for row in rows]
    assert sorted(i for row in rows for i in row) == sorted(examples)
    assert len({len(rows) for rows in ranks}) == 1
    assert all(lengths[row].sum() <= max_tokens for row in rows)


def test_rows_are_few_and_balanced():
    lengths = np.random.default_rng(0).integers(20, 100, 64)
    rows = balanced_rows(range(64), lengths, 1000, 0, 1)
    sums = [lengths[row].sum() for row in rows]
    assert len(rows) == -(-lengths.sum() // 1000)
    assert max(sums) - min(sums) < 20


def test_processes_that_share_a_round_have_rows_of_similar_length():
    lengths = np.random.default_rng(0).integers(20, 400, 40)
    ranks = [balanced_rows(range(40), lengths, 700, rank, 2) for rank in range(2)]
    for first, second in zip(*ranks, strict=True):
        assert abs(int(lengths[first].sum()) - int(lengths[second].sum())) < 100
