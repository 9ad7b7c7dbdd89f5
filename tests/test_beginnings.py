"""What all examples begin with: found, and computed once a packed row without changing a loss or a gradient."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_instruct.data import beginnings, packing
from open_instruct.data.beginnings import LEAST, common_beginning
from open_instruct.data.dataset import Examples
from open_instruct.data.packing import Packing
from open_instruct.model import attention_varlen
from open_instruct.model.backends import BACKENDS
from open_instruct.model.training_model import PackedModel, PaddedModel
from tests.conftest import no_dropout, write_conversations
from tests.test_backends import reference_kernel
from tests.tiny_models import (
    VARIANTS,
    examples,
    gradient_error,
    packed_token_losses,
    padded_token_losses,
    random_model,
    step,
    wrap,
)

# Longer than the sliding window of the tiny models, and within reach of a soft prompt before it.
BEGINNING = tuple(range(30, 43))
HARD = (7, 9, 11)


def rows_behind(beginning: tuple[int, ...] = BEGINNING) -> list[dict[str, Any]]:
    """Ragged examples that begin alike, none of whose labels is the first token behind that."""
    rows = [{**row, "spans": [max(bound, 1) for bound in row["spans"]]} for row in examples()]
    return [packing.behind_context({**row, "context": beginning}, 0) for row in rows]


def differences(
    architecture: str,
    variant: str,
    backend: str = "blocked",
    shared: tuple[int, ...] = BEGINNING,
    hard: tuple[int, ...] = (),
    checkpointing: bool = False,
) -> float:
    """The largest relative difference of loss, losses of tokens and gradient: shared, and with each example, padded."""
    base = random_model(architecture)
    model, method = wrap(variant, base)
    rows = rows_behind()
    behind = [packing.behind_context({**row, "context": hard}, 0) for row in rows]
    expected_loss, expected = step(PaddedModel(model), packing.pad(behind, 0))
    expected_tokens = padded_token_losses(model, behind)

    def collate(chosen: Any) -> dict[str, Any]:
        return Packing(999, beginning=BEGINNING).collate(chosen) | {"beginning": torch.tensor(shared)}

    packed = PackedModel(model, partial(method.soft_prompt, model), BACKENDS[backend], "find", hard)
    packed.activate()
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    loss, gradient = step(packed, collate(rows))
    tokens = packed_token_losses(packed, rows, collate)
    assert expected.norm() > 1e-3 and len(tokens) == len(expected_tokens)
    return max(
        ((tokens - expected_tokens).abs() / expected_tokens.abs().clamp(min=1)).max().item(),
        abs(loss - expected_loss) / expected_loss,
        gradient_error(gradient, expected),
    )


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sharing_changes_no_loss_and_no_gradient(architecture, variant):
    assert differences(architecture, variant) < 1e-5


@pytest.mark.parametrize("variant", ["lora", "prompt_tuning", "prefix_tuning"])
def test_behind_a_hard_prompt_with_other_attention_and_with_checkpointing(variant, monkeypatch):
    monkeypatch.setitem(BACKENDS, "varlen", partial(attention_varlen.varlen, reference_kernel))
    assert differences("llama", variant, hard=HARD) < 1e-5
    assert differences("mistral", variant, "varlen", hard=HARD) < 1e-5
    assert differences("mistral", variant, "sdpa") < 1e-5
    assert differences("llama", variant, checkpointing=True) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_last_token_is_noticed(variant):
    """The negative control: one example that began otherwise would have lost its own token."""
    assert differences("llama", variant, shared=(*BEGINNING[:-1], 99)) > 1e-3


def test_an_example_that_begins_otherwise_is_no_part_of_such_a_row():
    rows = rows_behind()
    rows[2]["input_ids"][len(BEGINNING) - 1] = 99
    with pytest.raises(AssertionError, match="begins otherwise"):
        Packing(999, beginning=BEGINNING).collate(rows)
    learned = rows_behind()
    learned[0]["spans"] = [len(BEGINNING), len(BEGINNING) + 2]  # predicted by the last shared token
    with pytest.raises(AssertionError, match="begins otherwise"):
        Packing(999, beginning=BEGINNING).collate(learned)


def examples_of(rows: list[dict[str, Any]], chosen: Any = None, chunk_rows: int = 3) -> Examples:
    """A table of several chunks."""
    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("spans", pa.list_(pa.int32()))])
    tables = [pa.Table.from_pylist(rows[i : i + chunk_rows], schema) for i in range(0, len(rows), chunk_rows)]
    return Examples(pa.concat_tables(tables), np.arange(len(rows)) if chosen is None else np.asarray(chosen), "")


def plain_beginning(rows: list[dict[str, Any]]) -> tuple[int, ...]:
    """The same by comparing one token after the other."""
    shared: list[int] = []
    while True:
        at = len(shared)
        if any(at + 1 >= row["spans"][0] for row in rows):  # the token behind the shared ones is not learned either
            break
        if len({row["input_ids"][at] for row in rows}) > 1:
            break
        shared.append(rows[0]["input_ids"][at])
    return tuple(shared) if len(shared) >= LEAST else ()


TAILS = st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=4), st.integers(1, 6)), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None)
@given(
    tails=TAILS, length=st.integers(LEAST - 4, LEAST + 8), rows_at_once=st.sampled_from([1, 2, 8192]), data=st.data()
)
def test_the_beginning_is_that_of_a_plain_comparison(tails, length, rows_at_once, data):
    rows = []
    for tail, first_label in tails:
        ids = [*range(length), *tail, 3, 4, 5, 6, 7, 8]
        start = data.draw(st.sampled_from([length + first_label, length - first_label, 1]))
        rows.append({"input_ids": ids, "spans": [start, start + 1]})
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, unique=True))
    before, beginnings.ROWS_AT_ONCE = beginnings.ROWS_AT_ONCE, rows_at_once
    try:
        assert common_beginning(examples_of(rows, chosen)) == plain_beginning([rows[i] for i in chosen])
    finally:
        beginnings.ROWS_AT_ONCE = before


def test_one_row_that_differs_in_its_last_shared_token_shortens_what_is_shared():
    rows = [{"input_ids": [*range(50), 60 + i, 2, 3], "spans": [52, 53]} for i in range(7)]
    assert common_beginning(examples_of(rows)) == tuple(range(50))
    rows[4]["input_ids"][49] = 99
    assert common_beginning(examples_of(rows)) == tuple(range(49))
    rows[6]["input_ids"][LEAST - 1] = 99
    assert common_beginning(examples_of(rows)) == ()
    assert common_beginning(examples_of(rows, [0, 1, 2, 3, 5])) == tuple(range(50))
    learned_whole = [{**row, "spans": [1, 53]} for row in rows[:3]]
    assert common_beginning(examples_of(learned_whole)) == ()


def test_rows_hold_more_examples_where_they_share():
    lengths, beginning = np.array([40, 41, 45, 50]), tuple(range(36))
    shared, alone = Packing(32, beginning=beginning), Packing(68)
    assert len(shared.micro_batches([0, 1, 2, 3], lengths, 0, 1)) == 1
    assert len(alone.micro_batches([0, 1, 2, 3], lengths, 0, 1)) == 4
    assert shared.positions([0, 1, 3], lengths, 5) == 36 + 4 + 5 + 14 + 5
    halved = Packing(40, beginning=beginning).halved([0, 1, 2, 3], lengths)
    assert halved == Packing(16, beginning=beginning)
    assert shared.collate([])["targets"].tolist() == [] and "beginning" not in shared.collate([])


SYSTEM = "Put the words in the reverse order, one after the other, with one space between two of them, and no other. "
SHORT = ["--max_train_steps", "4", "--eval_steps", "2", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2"]
SHORT += ["--prompt_tuning_init", "random"]


def with_system(source: Path, target: Path, system: str) -> Path:
    rows = [json.loads(line)["messages"] for line in source.read_text().splitlines()]
    lines = [json.dumps({"messages": [{"role": "system", "content": system}, *row]}) for row in rows]
    target.write_text("\n".join(lines) + "\n")
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Training and held-out rows behind a system message, and held-out rows behind another."""
    made = tmp_path_factory.mktemp("beginnings")
    plain = write_conversations(made / "plain.jsonl", "reverse", 24, long_every=4)
    held_out = write_conversations(made / "held.jsonl", "reverse", 8, seed=3, long_every=4)
    with_system(plain, made / "train.jsonl", SYSTEM * 2)
    with_system(held_out, made / "alike.jsonl", SYSTEM * 2)
    with_system(held_out, made / "other.jsonl", "Answer, please.")
    return made


def embedded(monkeypatch) -> list[int]:
    """The number of tokens of each packed row from now on."""
    seen: list[int] = []
    outputs = PackedModel.outputs

    def counted(self, input_ids, *others, beginning=None, **options):
        seen.append(input_ids.shape[1] + (0 if beginning is None else len(beginning)))
        return outputs(self, input_ids, *others, beginning=beginning, **options)

    monkeypatch.setattr(PackedModel, "outputs", counted)
    return seen


def test_a_run_is_the_same_with_fewer_positions(train, folder, monkeypatch):
    """Its held-out rows begin alike, or otherwise; `other` means behind another system message."""
    flags = ["--use_prompt_tuning", "--num_virtual_tokens", "4", *no_dropout("prompt_tuning"), *SHORT]
    seen, others = embedded(monkeypatch), [("each", ["--share_beginning", "False"]), ("padded", ["--packing", "False"])]
    for held_out, compared in (("alike", others), ("other", others[:1])):
        sizes, runs = [], []
        for name, more in [("shared", []), *compared]:
            seen.clear()
            data = ["--validation_file", str(folder / f"{held_out}.jsonl")]
            run = train(f"{held_out}-{name}", *flags, *data, *more, data=folder / "train.jsonl")
            assert run.code == 0, run.err
            assert ("; computed once a row: the " in run.out) == (name == "shared")
            both = name == "shared" and held_out == "alike"
            assert ("tokens that all held-out examples begin with" in run.out) == both
            sizes.append(sum(seen))
            runs.append(run)
        for run in runs[1:]:
            for key in ("base_eval_loss", "initial_eval_loss", "final_eval_loss", "tokens"):
                assert run.summary[key] == pytest.approx(runs[0].summary[key], rel=1e-5)
        assert sizes[0] < 0.7 * sizes[1]


def test_nothing_is_shared_where_the_beginning_is_learned_or_short(train, folder):
    flags = ["--use_prompt_tuning", *SHORT, "--dry_run"]
    for rows, more, is_shared in (("train", [], True), ("train", ["--labels", "all"], False), ("plain", [], False)):
        run = train("tried", *flags, *more, data=folder / f"{rows}.jsonl")
        assert run.code == 0 and ("computed once a row" in run.out) == is_shared


def test_a_run_that_shared_is_resumed_by_one_that_does_not(train, folder):
    flags = ["--use_prompt_tuning", *SHORT, "--checkpointing_steps", "2", "--keep_last_n_checkpoints", "-1"]
    whole = train("resumed", *flags, data=folder / "train.jsonl")
    final = whole.summary["final_eval_loss"]
    (whole.folder / "summary.json").unlink()
    shutil.rmtree(whole.folder / "checkpoints" / "step_4")
    flags += ["--resume_from_checkpoint", "--share_beginning", "False"]
    again = train("resumed", *flags, data=folder / "train.jsonl")
    assert again.code == 0, again.err
    assert again.summary["final_eval_loss"] == pytest.approx(final, rel=1e-5)


def test_a_setting_without_effect_is_refused(train, folder):
    text = ["--distill_context", str(folder / "plain.jsonl")]
    for extra, says in [
        (["--packing", "False"], "it belongs to the packed forward pass"),
        (text, "it has no effect with --distill_context"),
    ]:
        flags = ["--use_prompt_tuning", "--share_beginning", "True", *extra]
        run = train("refused", *flags, data=folder / "train.jsonl")
        assert run.code == 2 and says in run.err and run.err.count("\n") == 1
