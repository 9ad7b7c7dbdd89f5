"""Rows that offer and call tools: what the chat template gets, wherever text is rendered."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from open_instruct.data import chat, duplicates, forms, reading
from open_instruct.data.bad_rows import BadRows
from open_instruct.data.dataset import build
from open_instruct.data.pairs import tokenize_pairs
from open_instruct.data.questions import prompt_ids, questions, with_calls_written
from open_instruct.data.rendering import Rendering
from open_instruct.data.sources import Conversation
from open_instruct.data.templates import Template
from open_instruct.data.tools import tools_in
from open_instruct.data.unwritten import unwritten
from open_instruct.errors import InputError
from open_instruct.evaluate_peft import main as evaluate_main
from open_instruct.generate_peft import main as generate_main
from open_instruct.inspect_peft import main as inspect_main
from tests.conftest import TINY_MODEL

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLING = [
    {"role": "user", "content": "horse apple"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "tool_call_id": "c1", "content": "fig"},
    {"role": "assistant", "content": "apple horse"},
]
# As the templates of models that call tools: schemas first, calls within the assistant's turn, results with their id.
TEMPLATE = (
    "{% if tools %}{% for tool in tools %}(tool {{ tool | tojson }})\n{% endfor %}{% endif %}"
    "{% for m in messages %}[{{ m.role }}{{ ' ' + m.name if m.name else '' }}"
    "{{ ' ' + m.tool_call_id if m.tool_call_id else '' }}]\n"
    "{{ m.content if m.content is not none else '' }}"
    "{% for call in m.tool_calls or [] %}(call {{ call.function | tojson }}){% endfor %}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


@pytest.fixture
def tokenizer():
    made = AutoTokenizer.from_pretrained(TINY_MODEL)
    made.chat_template = TEMPLATE
    return made


def row(messages=CALLING, **others) -> dict:
    return {"messages": messages, **others}


def conversation(value: dict) -> Conversation:
    ((_, messages),) = reading.conversations([("row", value)])
    assert isinstance(messages, Conversation)
    return messages


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode(ids)


@pytest.mark.parametrize(
    "value", [[WEATHER], WEATHER, json.dumps([WEATHER]), json.dumps(WEATHER), f"  {json.dumps([WEATHER])}\n"]
)
def test_every_form_of_the_column_is_the_same_schemas(value):
    assert tools_in("row", {"tools": value}) == (WEATHER,)


@pytest.mark.parametrize("value", [None, "", " ", [], {}, "[]", "null", '""', "{}", math.nan])
def test_an_empty_column_offers_nothing(value):
    assert tools_in("row", {"tools": value}) == tools_in("row", {}) == ()


@pytest.mark.parametrize(
    "value, says",
    [
        (["weather"], "names a tool, 'weather', and does not describe it"),
        ("weather, clock", "is text that can't be used"),
        ('"weather"', "is text: give a list of JSON schemas"),
        (7, "is a number: give"),
        ([[WEATHER]], "holds a list: give"),
        ([{}], "holds an empty value: give"),
    ],
)
def test_a_column_that_means_something_else_is_refused(value, says):
    with pytest.raises(InputError, match="row: `tools` ") as refused:
        tools_in("row", {"tools": value})
    assert says in str(refused.value) and "rename or remove a column" in str(refused.value)


def test_rows_of_a_table_and_of_json_are_the_same_text(tokenizer, tmp_path):
    """Arrow gives each tool the parameters of all, and each message the entries of all, as nulls."""
    rows = [row(tools=[WEATHER]), row(CALLING[:1] + CALLING[-1:], tools=[CLOCK])]
    for each in rows:
        each["messages"] = [dict(message) for message in each["messages"]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    texts = []
    for name in ("rows.parquet", "rows.jsonl"):
        read = [messages for _, messages in reading.conversations(reading.read_rows(tmp_path / name))]
        assert [list(messages.tools) for messages in read] == [[WEATHER], [CLOCK]]
        texts.append(chat.render_texts(tokenizer, read)[0])
    assert texts[0] == texts[1] and "null" not in "".join(texts[0])
    assert '"default": null' in chat.render_texts(tokenizer, [conversation(row(tools='[{"default": null}]'))])[0][0]


def test_the_template_gets_what_transformers_would_give_it(tokenizer):
    """Each row its own tools, in training and for a prompt; every entry of a message as it is."""
    rows = [row(tools=[WEATHER]), row(), row(tools=[CLOCK, WEATHER]), row(tools=[CLOCK, WEATHER])]
    texts, _ = chat.render_texts(tokenizer, [conversation(each) for each in rows])
    for each, text in zip(rows, texts, strict=True):
        expected = tokenizer.apply_chat_template(CALLING, tools=each.get("tools"), tokenize=False)
        assert text == expected and '(call {"name": "weather", "arguments": {"city": "Oslo"}})' in text
        assert "[tool weather c1]\nfig" in text
    (question,) = questions([("row", rows[0])])
    prompt = tokenizer.apply_chat_template(CALLING[:-1], tools=[WEATHER], add_generation_prompt=True, tokenize=False)
    assert prompt_ids(tokenizer, question.messages) == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert prompt_ids(tokenizer, list(question.messages)) != prompt_ids(tokenizer, question.messages)  # without them


def test_calls_are_learned_and_results_are_not(tokenizer):
    (ids,), (spans,) = chat.tokenize(tokenizer, [conversation(row(tools=[WEATHER]))], 1000)
    learned = [tokenizer.decode(ids[start:end]) for start, end in spans]
    assert learned[0].startswith("(call") and "Oslo" in learned[0] and learned[1].startswith("apple horse")
    assert not any("fig" in text or "(tool" in text for text in learned)


@pytest.mark.parametrize("role", ["tool", "ipython", "environment"])
def test_results_of_tools_may_be_empty_and_have_three_roles(role):
    messages = [*CALLING[:2], {"role": role, "content": ""}, CALLING[3]]
    assert forms.to_messages("row", row(messages))[2] == {"role": role, "content": ""}
    with pytest.raises(InputError, match="has content that is empty"):
        forms.to_messages("row", row([{"role": "user", "content": ""}, CALLING[3]]))
    with pytest.raises(InputError, match="has content that is null"):
        forms.to_messages("row", row([CALLING[0], {"role": "assistant", "content": None, "tool_calls": []}]))


def test_what_a_template_does_not_write_is_found(tokenizer):
    with_tools, spoken = conversation(row(tools=[WEATHER])), [dict(message) for message in CALLING]
    spoken[1]["content"] = "let me see"
    assert unwritten(tokenizer, [with_tools, conversation(row(spoken))]).lines("of 2 rows") == []
    chat.set_chat_template(tokenizer, "tulu")
    counts = unwritten(tokenizer, [conversation(row(spoken, tools=[WEATHER])), conversation(row(spoken))])
    assert (counts.num_tools, counts.num_calls) == (1, 2)
    assert counts.lines("of 2 rows")[0].startswith("the chat template writes no tools, which 1 of 2 rows have, so the")
    silent = [dict(message) for message in spoken]
    silent[1]["content"] = ""
    with pytest.raises(InputError, match="message 2 calls tools and says nothing else"):
        unwritten(tokenizer, [conversation(row(silent))])


def test_examples_say_what_the_template_leaves_out(tokenizer, tmp_path):
    """Also from the cache; and the same messages with other tools are other rows."""
    plain = [CALLING[0], CALLING[3]]
    values = [("1", row(plain, tools=[WEATHER])), ("2", row(plain, tools=[CLOCK])), ("3", row(plain))]

    def read():
        return reading.conversations(values)

    written = build(read(), tokenizer, 1000, "a", tmp_path)
    assert written.by_template == "" and len(set(map(tuple, written.table["input_ids"].to_pylist()))) == 3
    assert len(set(written.hashes[0])) == 3
    assert written.hashes[0][2] == duplicates.hashes_of(plain)[0]
    chat.set_chat_template(tokenizer, "zephyr")
    for _ in range(2):
        silent = build(read(), tokenizer, 1000, "a", tmp_path)
        assert silent.by_template.startswith("the chat template writes no tools, which 2 of 3 conversations have")
    assert len(set(map(tuple, silent.table["input_ids"].to_pylist()))) == 1
    bad = BadRows(skip=True)
    some = build(reading.conversations([*values, ("4", row())], bad=bad), tokenizer, 1000, "b", None, bad=bad)
    assert len(some) == 3 and "1 of 4 rows can't be used (4: " in some.bad_rows


def test_a_question_that_ends_with_a_call_has_it_as_its_reference(tokenizer, capsys):
    (question,) = questions([("row", row(CALLING[:2], tools=[WEATHER]))])
    assert question.reference == "" and list(question.messages) == CALLING[:1]
    (written,) = with_calls_written([question], tokenizer)
    assert written.reference == '(call {"name": "weather", "arguments": {"city": "Oslo"}})'
    assert capsys.readouterr().err == ""
    chat.set_chat_template(tokenizer, "tulu")
    with pytest.raises(InputError, match="row: "):
        with_calls_written([question], tokenizer)


def test_columns_and_templates_keep_tools_and_refuse_calls(tokenizer):
    made = Rendering((("prompt", "q"), ("answer", "a")))
    ((_, messages),) = reading.conversations([("row", {"q": "b", "a": "c", "tools": [CLOCK]})], rendering=made)
    assert messages.tools == (CLOCK,)
    own = Rendering((("answer", "a"),), (Template("{q} with {tools}", False),))
    ((_, messages),) = reading.conversations([("row", {"q": "b", "a": "c", "tools": "a saw"})], rendering=own)
    assert messages.tools == () and messages[0]["content"] == "b with a saw"
    shots = Rendering(num_shots=1)
    with pytest.raises(InputError, match="calls tools: templates and exemplars are for answers of text alone"):
        shots.conversations("row", row(CALLING[:2]))
    plain = {"prompt": "b", "completion": "c"}
    with pytest.raises(InputError, match="it offers tools, which no other row's text would describe"):
        shots.with_exemplars([("row", {**plain, "tools": [CLOCK]})], "rows")


def test_an_encoder_decoder_refuses_calls(tokenizer):
    with pytest.raises(InputError, match="an encoder–decoder learns the text of answers alone"):
        tokenize_pairs(tokenizer, [conversation(row(CALLING[:2]))], 100)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("tools")
    plain = [CALLING[0], CALLING[3]]
    rows = [
        row(CALLING, tools=json.dumps([WEATHER])),
        row(plain, tools="[]"),
        row(CALLING[:2], tools=json.dumps([CLOCK])),
    ]
    lines = [json.dumps({**each, "id": number}) + "\n" for number, each in enumerate(rows * 3)]
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / "template.jinja").write_text(TEMPLATE)
    return SimpleNamespace(folder=folder, rows=folder / "rows.jsonl", template=folder / "template.jinja", lines=rows)


def test_training_evaluation_generation_and_inspection(train, files, capsys, tmp_path):
    """The whole way; the loss of evaluation is that of training's held-out rows, which have tools in their prompt."""
    flags = ["--use_prompt_tuning", "--num_virtual_tokens", "4", "--max_train_steps", "2", "--keep_best", "False"]
    flags += ["--validation_file", str(files.rows), "--per_device_train_batch_size", "3"]
    (tmp_path / "copy.jsonl").write_text(files.rows.read_text())
    own = train("tools", *flags, "--chat_template_name", str(files.template), data=tmp_path / "copy.jsonl")
    assert own.code == 0, own.err
    assert "writes no" not in own.out
    last = tmp_path / "last.jsonl"  # of several answers, training labels each, and an evaluation too
    last.write_text(files.rows.read_text())
    out = tmp_path / "evaluated"
    words = ["--adapter", str(own.folder), "--file", str(last), "--max_new_tokens", "4"]
    assert evaluate_main([*words, "--metrics", "loss", "exact_match", "--output_dir", str(out)]) == 0
    result = json.loads((out / "evaluation.json").read_text())
    assert result["figures"]["tools"]["loss"]["value"] == pytest.approx(own.summary["final_eval_loss"], rel=1e-5)
    assert any(example["reference"].startswith("(call") for example in result["examples"])
    answers = tmp_path / "answers.jsonl"
    words = ["--adapter", str(own.folder), "--input_file", str(last), "--max_new_tokens", "4"]
    assert generate_main([*words, "--output_file", str(answers)]) == 0
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line.get("tools") for line in lines[:3]] == [[WEATHER], None, [CLOCK]]
    assert lines[2]["reference"].startswith("(call")
    assert inspect_main(["--adapter", str(own.folder), "--file", str(last), "--output_dir", str(tmp_path / "i")]) == 0
    assert "writes no" not in capsys.readouterr().err

    spoken = [{**m, "content": m["content"] or "wait"} for m in CALLING]
    silent = tmp_path / "silent.jsonl"
    silent.write_text("".join(json.dumps(row(spoken, tools=[WEATHER])) + "\n" for _ in range(4)))
    tulu = train("tulu", *flags[:-4], "--validation_fraction", "0.25", data=silent)
    said = "the chat template writes no tools, which 4 of 4 conversations have, so the model does not see them"
    assert tulu.code == 0 and tulu.out.count(said) == 1, tulu.err
    record = json.loads((tulu.folder / "run.json").read_text())
    assert record["by_template"]["training"][0].startswith(said) and len(record["by_template"]["training"]) == 2
    words = ["--adapter", str(tulu.folder), "--file", str(silent), "--metrics", "loss", "--output_dir"]
    assert evaluate_main([*words, str(tmp_path / "e")]) == 0
    assert "writes no tools, which 4 of 4 rows have" in capsys.readouterr().err


def test_a_column_of_names_is_refused_in_one_line(train, tmp_path):
    data = Path(tmp_path / "names.jsonl")
    data.write_text(json.dumps(row([CALLING[0], CALLING[3]], tools=["weather"])) + "\n")
    run = train("names", "--use_prompt_tuning", "--max_train_steps", "1", data=data)
    assert run.code == 2 and run.err.count("\n") == 1 and "names a tool, 'weather'" in run.err
