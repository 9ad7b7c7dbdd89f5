"""Each way to write down a conversation gives the same messages."""

import json
import random

import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from open_instruct.data import chat, dataset, forms, reading
from open_instruct.errors import InputError
from tests.conftest import TINY_MODEL
from tests.test_chat import mask_by_counting, positions

QUESTION = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SAME = [
    {"messages": QUESTION},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "content": [{"type": "text", "value": "a"}]},
        ]
    },
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"prompt": "q", "completion": "a"},
    {"prompt": [QUESTION[0]], "completion": [QUESTION[1]]},
    {"instruction": "q", "input": "", "output": "a"},
    {"instruction": "q", "output": "a"},
]


@pytest.mark.parametrize("row", SAME)
def test_forms_are_equal(row):
    assert forms.to_messages("row", {"id": 1, **row}) == QUESTION


def test_alpacas_input_follows_its_instruction():
    row = {"instruction": "Sort.", "input": "b a", "output": "a b"}
    assert forms.to_messages("row", row)[0]["content"] == "Sort.\n\nb a"


def test_tool_and_system_roles_survive():
    turns = [("human", "u"), ("function_call", "{}"), ("observation", "o"), ("gpt", "a")]
    row = {"system": "s", "conversations": [{"from": who, "value": text} for who, text in turns]}
    assert [m["role"] for m in forms.to_messages("row", row)] == ["system", "user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize(
    "row, says",
    [
        ({"text": "x", "n": 1}, r"columns: text, n\): known forms are messages"),
        ({"conversations": [{"from": "martian", "value": "x"}]}, "is from 'martian': known speakers"),
        (
            {"messages": [QUESTION[0], {"role": "assistant", "content": [{"type": "image", "url": "x"}]}]},
            "content part of type 'image'",
        ),
        ({"messages": [QUESTION[0], {**QUESTION[1], "loss_weight": 0.0}]}, "has loss_weight 0.0"),
        ({"prompt": "q", "completion": ""}, "message 2 .assistant. has content that is empty"),
        ({"messages": [QUESTION[0], {"role": "assistant", "content": "\ud800"}]}, "surrogate"),
    ],
)
def test_what_fits_no_form_is_named(row, says):
    with pytest.raises(InputError, match=says):
        forms.to_messages("f.jsonl:3", row)


def test_every_kind_of_source_gives_the_same_rows(tmp_path):
    rows = [{"id": str(i), "messages": QUESTION} for i in range(5)]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (
        pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, pa.Table.from_pylist(rows).schema) as writer,
    ):
        writer.write_table(pa.Table.from_pylist(rows))
    with pa.CompressedOutputStream(str(tmp_path / "rows.jsonl.gz"), "gzip") as sink:
        sink.write((tmp_path / "a" / "rows.jsonl").read_bytes())
    for source in (
        tmp_path / "a" / "rows.jsonl",
        tmp_path / "a",
        tmp_path / "rows.arrow",
        tmp_path / "rows.jsonl.gz",
        tmp_path / "rows.ar*",
    ):
        assert [row for _, row in reading.read_files(reading.files_of(str(source)))] == rows, source


def test_masks_equal_counting_on_random_conversations():
    """One pass over characters against counting the tokens of prefixes, on texts whose tokens merge across borders."""
    rng = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    chat.set_chat_template(tokenizer, "tulu")
    pieces = ["horse", " ", "\n", "\n\n", "é", "漢", "</s>", "<|user|>", "!", "  cat", "12", "\u2028", "\x00"]
    batch = []
    for _ in range(200):
        roles = [role for _ in range(rng.randint(1, 4)) for role in ("user", "assistant")]
        content = ["x" + "".join(rng.choices(pieces, k=rng.randint(0, 12))) for _ in roles]
        batch.append([{"role": role, "content": text} for role, text in zip(roles, content, strict=True)])
    _, spans = chat.tokenize(tokenizer, batch, 10_000)
    for row, messages in zip(spans, batch, strict=True):
        assert positions(row) == mask_by_counting(tokenizer, messages)


def test_a_cache_entry_is_used_only_for_the_same_content(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    chat.set_chat_template(tokenizer, "tulu")
    named = [("row", QUESTION)] * 3

    def build(key, length=100):
        return dataset.build(iter(named), tokenizer, length, key, tmp_path)

    first = build("a")
    assert build("a").fingerprint == first.fingerprint
    others = {build("b").fingerprint, build("a", 50).fingerprint}
    chat.set_chat_template(tokenizer, "zephyr")
    others.add(build("a").fingerprint)
    assert len(others) == 3 and first.fingerprint not in others
    assert len(list(tmp_path.iterdir())) == 4
