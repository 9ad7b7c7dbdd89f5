"""What is learned: all answers, the last one, or every token. Masks against a slow and plain way to find them."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from open_instruct import study_peft
from open_instruct.data import chat, packing
from open_instruct.data.dataset import build, hold_out
from open_instruct.data.spans import Labels
from open_instruct.data.tokenising import new_counts, tokenize_all
from open_instruct.errors import InputError
from tests.conftest import TINY_MODEL, write_conversations

OWN_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
TEMPLATES = [*chat.CHAT_TEMPLATES, "own"]
RULES: list[Labels] = ["answers", "last", "all"]
WORDS = st.sampled_from(["horse", "apple  fig", "été ☂ 漢字", "a\n\nb", "Reverse.", "0"])
CONVERSATIONS = st.builds(
    lambda system, turns, open_end: [
        *([{"role": "system", "content": system}] if system else []),
        *(
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ),
        *([{"role": "user", "content": open_end}] if open_end else []),
    ],
    st.none() | WORDS,
    st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4),
    st.none() | WORDS,
)


def tokenizer_of(template: str, add_bos: bool = False):
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    if template == "own":
        tokenizer.chat_template = OWN_TEMPLATE
    chat.set_chat_template(tokenizer, "tokenizer" if template == "own" else template, add_bos)
    return tokenizer


TOKENIZERS = {(name, add_bos): tokenizer_of(name, add_bos) for name in TEMPLATES for add_bos in (False, True)}


def plain_mask(tokenizer, messages, labels: str, max_length: int) -> list[bool]:
    """Whether each token is learned, one token and one turn after the other.

    A token belongs to an answer if it has a character between the prompt and the end of that turn, which are found by
    rendering the conversation up to there.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assistant = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if labels == "last":
        assistant = assistant[-1:]
    learned_characters: set[int] = set()
    for number in assistant:
        prompt = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        until = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        if "generation %}" in str(tokenizer.chat_template):
            until = until.rstrip("\n")  # the line break after the end of a turn is not the assistant's
        learned_characters |= set(range(len(prompt), len(until)))
    mask = []
    for number, (start, end) in enumerate(offsets[:max_length]):
        if labels == "all":
            mask.append(number > 0)
        else:
            mask.append(number > 0 and any(character in learned_characters for character in range(start, end)))
    return mask


def mask_of(row: dict) -> list[bool]:
    """The mask that the loss sees: the first token of a row has none."""
    labels = packing.labels_of(row["input_ids"], row["spans"])
    return [number > 0 and label != packing.IGNORE for number, label in enumerate(labels)]


@settings(max_examples=60, deadline=None)
@given(messages=CONVERSATIONS, key=st.sampled_from(sorted(TOKENIZERS)), max_length=st.integers(2, 80))
def test_masks_are_those_of_the_plain_way(messages, key, max_length):
    tokenizer = TOKENIZERS[key]
    has_answer = any(plain_mask(tokenizer, messages, "answers", max_length))
    for labels in RULES:
        counts = new_counts()
        (table,) = tokenize_all([("row", messages)], tokenizer, max_length, counts, labels=labels)
        assert table.num_rows == has_answer == 1 - counts["num_skipped"]
        for row in table.to_pylist():
            assert mask_of(row) == plain_mask(tokenizer, messages, labels, max_length)
            if labels != "answers":
                answers = {"input_ids": row["input_ids"], "spans": row["answers"]}
                assert mask_of(answers) == plain_mask(tokenizer, messages, "answers", max_length)


def test_the_comparison_sees_a_wrong_rule():
    """Negative control: the masks of two rules differ, and so does one that is a token off."""
    messages = [{"role": role, "content": "horse apple"} for role in ("user", "assistant") * 2]
    tokenizer = TOKENIZERS["tulu", False]
    (table,) = tokenize_all([("row", messages)], tokenizer, 80, new_counts(), labels="last")
    (row,) = table.to_pylist()
    assert all(mask_of(row) != plain_mask(tokenizer, messages, labels, 80) for labels in ("answers", "all"))
    moved = {**row, "spans": [bound + 1 for bound in row["spans"]]}
    assert mask_of(moved) != plain_mask(tokenizer, messages, "last", 80)


ROWS = [
    ("short", [{"role": role, "content": "horse apple"} for role in ("user", "assistant") * 2]),
    ("long", [{"role": role, "content": "horse apple " * 4} for role in ("user", "assistant") * 2]),
]


def test_rows_whose_last_answer_is_cut_away_are_skipped_by_last_alone(tmp_path):
    tokenizer = TOKENIZERS["tulu", False]
    ids, spans = chat.tokenize(tokenizer, [messages for _, messages in ROWS], 1000)
    length = spans[1][1][0]  # the long row keeps its first answer, and nothing of its second
    assert len(ids[0]) < length
    built = {labels: build(iter(ROWS), tokenizer, length, "key", tmp_path, labels=labels) for labels in RULES}
    assert [len(built[labels]) for labels in RULES] == [2, 2, 2]
    left = {labels: built[labels].labelled("training", length) for labels in RULES}
    assert [len(left[labels]) for labels in RULES] == [2, 1, 2]
    assert left["last"].num_skipped == 1 and left["last"].rows.tolist() == [0]
    assert left["all"].label_counts.tolist() == (left["all"].lengths - 1).tolist()
    for labels in RULES:  # what is asked and compared is the same
        assert built[labels].by_answers().label_counts.tolist() == built["answers"].label_counts.tolist()
        assert built[labels].by_answers()[1] == built["answers"][1]
    with pytest.raises(InputError, match=f"within --max_seq_length {length}: raise it, or learn from all answers"):
        built["last"].subset(built["last"].rows[1:]).labelled("training", length)


def test_the_cache_keeps_rules_apart(tmp_path):
    tokenizer = TOKENIZERS["tulu", False]
    first = {labels: build(iter(ROWS), tokenizer, 50, "key", tmp_path / "cache", labels=labels) for labels in RULES}
    assert len({examples.entry for examples in first.values()}) == 3 == len(list((tmp_path / "cache").iterdir()))
    for labels in RULES:
        again = build(iter([]), tokenizer, 50, "key", tmp_path / "cache", labels=labels)  # without rows: from the cache
        assert again.content == first[labels].content and again[1] == first[labels][1]
    assert len({examples.content for examples in first.values()}) == 3
    assert len({examples.fingerprint for examples in first.values()}) == 1


@pytest.mark.parametrize("labels", RULES)
@pytest.mark.parametrize("padded", [[], ["--packing", "False"]], ids=["packed", "padded"])
def test_a_run_learns_and_measures_by_its_labels(labels, padded, train, data_file):
    """The base's held-out loss of a run, against losses of single tokens under the plain mask."""
    run = train("run", "--use_lora", "--labels", labels, "--max_train_steps", "1", *padded)
    assert run.code == 0, run.err
    tokenizer, model = TOKENIZERS["tulu", False], AutoModelForCausalLM.from_pretrained(TINY_MODEL).eval()
    rows = [json.loads(line) for line in data_file.read_text().splitlines()]
    named = [(str(number), row["messages"]) for number, row in enumerate(rows)]
    _, held_out = hold_out(build(iter(named), tokenizer, 4096, "", None), 0.2, 500, 42)
    total, count = 0.0, 0
    for index in held_out.rows.tolist():
        mask = torch.tensor(plain_mask(tokenizer, named[index][1], labels, 4096)[1:])
        ids = torch.tensor([held_out.table["input_ids"][index].as_py()])
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        total, count = total + losses[mask].sum().item(), count + int(mask.sum())
    assert run.summary["base_eval_loss"] == pytest.approx(total / count, rel=1e-4)
    (tokens,) = {row["eval_tokens"] for row in run.metrics if "eval_tokens" in row}
    assert tokens == count


def test_questions_are_cut_before_the_last_answer_whatever_is_learned(train):
    """The same prompts and references, also where every token is learned."""
    samples = {}
    for labels in RULES:
        run = train(labels, "--use_lora", "--labels", labels, "--max_train_steps", "1", "--num_sample_answers", "3")
        assert run.code == 0, run.err
        samples[labels] = [
            (sample["question"], sample["reference"], sample["base"]) for sample in run.summary["samples"]
        ]
    assert samples["answers"] == samples["last"] == samples["all"] and len(samples["all"]) == 3
    assert all(question and reference for question, reference, _ in samples["all"])


def test_what_a_context_is_worth_is_measured_on_answers(train, tmp_path):
    (tmp_path / "context.txt").write_text("narrow dry old open")
    words = ["--use_prompt_tuning", "--distill_context", str(tmp_path / "context.txt"), "--max_train_steps", "1"]
    runs = {labels: train(labels, *words, "--labels", labels) for labels in ("answers", "all")}
    assert all(run.code == 0 for run in runs.values()), runs["all"].err
    worth = {labels: [run.summary[f"{who}_answer_loss"] for who in ("base", "teacher")] for labels, run in runs.items()}
    assert worth["all"] == pytest.approx(worth["answers"], rel=1e-6)
    assert runs["all"].summary["base_eval_loss"] != pytest.approx(runs["answers"].summary["base_eval_loss"], rel=1e-3)


def test_a_study_compares_labels_on_the_same_answers(tmp_path):
    """Rows, base and exact match are by one rule; the held-out loss of each run is by its own."""
    data = write_conversations(tmp_path / "train.jsonl", "reverse", 60, long_every=2)
    content = {
        "output_dir": str(tmp_path / "study"),
        "flags": {
            "model_name_or_path": str(TINY_MODEL), "train_file": str(data), "validation_fraction": 0.3,
            "max_seq_length": 50, "dataset_local_cache_dir": str(tmp_path / "cache"), "max_train_steps": 2,
        },
        "methods": {labels: {"method": "lora", "labels": labels} for labels in RULES},
        "search": {"kind": "grid", "space": {"learning_rate_factor": [1]}},
        "seeds": [1],
        "report": {"questions": 2, "max_new_tokens": 4},
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    assert study_peft.main(["--config", str(tmp_path / "study.yaml")]) == 0
    summaries = {
        path.parent.name.split("-")[0]: json.loads(path.read_text())
        for path in (tmp_path / "study" / "trials").glob("*/summary.json")
    }
    assert set(summaries) == set(RULES)
    counts = {name: [count for _, count in summary["study"]["rows"]] for name, summary in summaries.items()}
    assert counts["answers"] == counts["last"] == counts["all"]
    assert len({summary["base_eval_loss"] for summary in summaries.values()}) == 3
    assert len({summary["examples"] for summary in summaries.values()}) == 1
    assert len(list((tmp_path / "study").glob("base-*.json"))) == 1
