"""Columns, templates and exemplars: rows of any form, in training and in every tool alike."""

from __future__ import annotations

import datetime
import json
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from open_instruct.data import duplicates, reading
from open_instruct.data.dataset import build, hold_out
from open_instruct.data.held_out_groups import hold_out_groups
from open_instruct.data.questions import read_questions
from open_instruct.data.rendering import Exemplar, Rendering
from open_instruct.data.rendering_flags import from_record, rendering_of
from open_instruct.data.spans import own_spans
from open_instruct.data.templates import Rendered, Template, read_templates
from open_instruct.data.tokenising import new_counts, tokenize_all
from open_instruct.errors import InputError
from open_instruct.evaluate_peft import main as evaluate_main
from open_instruct.generate_peft import main as generate_main
from open_instruct.inspect_peft import main as inspect_main
from tests.conftest import TINY_MODEL, TINY_T5
from tests.test_labels import TOKENIZERS, mask_of, plain_mask

NAMES = ("Ann", "Bob", "Tom", "Eve")
WORDS = ("horse", "apple", "red", "green", "blue", "tall", "small", "old", "open", "narrow", "dry")
NAMED = ["--columns", "prompt=dialogue", "answer=summary"]
TWO = "Summarize:\n{dialogue}\n---\n{dialogue}\nTL;DR of {topic}:\n"


def dialogues(count: int, seed: int = 0) -> list[dict]:
    """Rows as Dialogsum and SAMSum have them."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        (a, b), words = rng.sample(NAMES, 2), rng.sample(WORDS, 4)
        text = f"{a}: {words[0]} {words[1]}?\n{b}: {words[2]} {words[3]}."
        rows.append({"id": number, "dialogue": text, "summary": f"{a} asks {b} of {words[0]}.", "topic": words[0]})
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    return write_rows(tmp_path / "dialogues.jsonl", dialogues(60))


@pytest.fixture
def two(tmp_path) -> Path:
    (tmp_path / "two.txt").write_text(TWO)
    return tmp_path / "two.txt"


def contents(messages: list[dict]) -> list[tuple[str, str]]:
    return [(message["role"], str(message["content"])) for message in messages]


# --- templates


def test_plain_fields_and_jinja_write_the_same():
    values = {"dialogue": "Ann: hi.", "n": 3, "names": ["Ann", "Bob"], "text-en": "x"}
    assert Template('{"a": 1} {dialogue} {n} {text-en} { n } {}', False).render(values) == (
        '{"a": 1} Ann: hi. 3 x { n } {}'
    )
    assert Template("{{ dialogue }} {{ n }} {% for one in names %}{{ one }};{% endfor %}", True).render(values) == (
        "Ann: hi. 3 Ann;Bob;"
    )


def test_a_value_is_never_read_as_a_template():
    """Neither braces nor Jinja in a row's text mean anything."""
    text = "{n} {{ n }} {% raise %}"
    assert Template("{dialogue}|{n}", False).render({"dialogue": text, "n": 1}) == f"{text}|1"
    assert Template("{{ dialogue }}|{{ n }}", True).render({"dialogue": text, "n": 1}) == f"{text}|1"


def test_several_templates_stand_between_lines_of_dashes(two, tmp_path):
    texts = [template.text for template in read_templates(str(two))]
    assert texts == ["Summarize:\n{dialogue}", "{dialogue}\nTL;DR of {topic}:"]
    (tmp_path / "one.jinja").write_text("--- {{ dialogue }} ---\n- - -\n")
    (one,) = read_templates(str(tmp_path / "one.jinja"))
    assert one.is_jinja and one.fields == ("dialogue",) and one.text == "--- {{ dialogue }} ---\n- - -"


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("t.txt", "", "it is empty"),
        ("t.txt", "{a}\n---\n\n", "template 2 of 2 is empty"),
        ("t.txt", "Summarize.", "has no field"),
        ("t.txt", "{{ dialogue }}", "is written in Jinja, and its name says plain text"),
        ("t.txt", "{% if a %}{a}{% endif %}", "is written in Jinja"),
        ("t.jinja", "{{ a }", "unexpected '}'"),
        ("t.jinja", "{% include 'x' %}{{ a", "template"),
        ("t.jinja", "{dialogue}", "has no field"),
    ],
)
def test_a_wrong_template_is_one_line(name, text, says, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=says.replace("{", r"\{")):
        read_templates(str(tmp_path / name))


@pytest.mark.parametrize(
    "text, says",
    [
        ("{{ dialogue.__class__.__mro__ }}", "unsafe|undefined"),
        ("{{ tags.append(1) }}", "unsafe"),
        ("{{ 'a' * 10**11 }}{{ dialogue }}", "memory"),
        ("{{ none_there }}", "names none_there"),
        ("{{ nothing }}", "null"),
    ],
)
def test_jinja_runs_in_a_sandbox_with_limits(text, says):
    values = {"dialogue": "x", "tags": [1], "nothing": None}
    with pytest.raises(InputError, match=says):
        Template(text, True).render(values)
    assert values["tags"] == [1]


# --- conversations


def test_columns_alone_are_a_prompt_and_its_answer():
    row = {"q": "horse", "a": "esroh", "s": "Spell.", "n": 1}
    named = rendering_of(1, ["prompt=q", "answer=a", "system=s"])
    assert contents(named.conversations("row", row)[0]) == [
        ("system", "Spell."), ("user", "horse"), ("assistant", "esroh"),
    ]  # fmt: skip
    assert contents(named.conversations("row", {**row, "s": None})[0])[0] == ("user", "horse")
    turns = [{"role": role, "content": "horse"} for role in ("user", "assistant", "user")]
    assert len(named.conversations("row", {**row, "q": turns})[0]) == 5
    assert contents(named.conversations("row", {**row, "a": None}, answered=False)[0])[-1] == ("user", "horse")
    for wrong in ({"a": 7}, {"a": ""}, {"a": None}, {"q": None}, {"q": 5}, {"s": 1}):
        with pytest.raises(InputError, match="row"):
            named.conversations("row", {**row, **wrong})


def test_a_template_may_write_the_question_of_a_known_form():
    asks = Rendering((), (Template("Please: {prompt}", False),))
    for row in (
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "output": "a"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ):
        assert contents(asks.conversations("row", row)[0]) == [("user", "Please: q"), ("assistant", "a")]
    alpaca = Rendering((), (Template("{instruction} | {input}", False),))
    row = {"instruction": "Sort.", "input": "b a", "output": "a b"}
    assert contents(alpaca.conversations("row", row)[0])[0] == ("user", "Sort. | b a")
    several = {"messages": [{"role": role, "content": "q"} for role in ("user", "assistant") * 2]}
    with pytest.raises(InputError, match="rows of one question and one answer"):
        asks.conversations("row", several)


def test_one_template_serves_columns_of_other_names(two):
    first = rendering_of(42, ["answer=summary"], str(two))
    other = rendering_of(42, ["answer=label", "dialogue=text", "topic=of"], str(two))
    for row in dialogues(10):
        renamed = {"text": row["dialogue"], "label": row["summary"], "of": row["topic"]}
        assert contents(other.conversations("row", renamed)[0]) == contents(first.conversations("row", row)[0])


def test_what_is_drawn_follows_from_seed_and_row_alone(two):
    rows = [(f"row {row['id']}", row) for row in dialogues(60)]
    made = rendering_of(42, ["answer=summary"], str(two), num_shots=2).with_exemplars(rows, "rows")
    assert (
        made.exemplars
        == rendering_of(42, ["answer=summary"], str(two), num_shots=2).with_exemplars(rows[::-1], "rows").exemplars
    )
    assert made == from_record(json.loads(json.dumps(made.record())))
    forward = {source: made.conversations(source, row)[0] for source, row in rows}
    for source, row in rows[::-1]:
        changed = {**row, "id": "other", "summary": "Another answer."}
        assert contents(made.conversations(source, changed)[0][:-1]) == contents(forward[source][:-1])
    starts = Counter(messages[-2]["content"].startswith("Summarize:") for messages in forward.values())
    assert min(starts[True], starts[False]) > 15, starts
    other = replace(made, seed=43)
    assert any(other.conversations(source, row)[0] != forward[source] for source, row in rows)
    assert other.key != made.key and len(made.exemplars) == 15


def test_a_row_is_never_its_own_exemplar():
    """Nor is one that is equal but for case, white space and punctuation."""
    rows = [("row", {"q": text, "a": "yes"}) for text in ("One?", "Two?", "Three?")]
    made = rendering_of(1, ["prompt=q", "answer=a"], num_shots=2).with_exemplars(rows, "rows")
    for text in ("One?", "ONE", " two ?", "three"):
        messages = made.conversations("row", {"q": text, "a": "no"})[0]
        asked = [duplicates.normalised(str(message["content"])) for message in messages if message["role"] == "user"]
        assert len(set(asked)) == 3 == len(asked) and len(messages) == 6
    with pytest.raises(InputError, match="--shots 3 needs 4 different rows with answers, as none is"):
        rendering_of(1, ["prompt=q", "answer=a"], num_shots=3).with_exemplars([*rows, *rows], "rows")


def test_a_value_that_json_lacks_is_the_same_in_a_record():
    """A date of a table: the row is still not its own exemplar, and is known as one among the held-out rows."""
    rows = [("row", {"d": datetime.date(2026, 1, day), "a": "yes", "n": [day]}) for day in (1, 2)]
    template = Template("{{ d }} {{ n }}", True)
    made = Rendering((("answer", "a"),), (template,), num_shots=1).with_exemplars(rows, "rows")
    made = from_record(json.loads(json.dumps(made.record())))
    for _, row in rows:
        (messages,) = made.conversations("row", row)
        asked = [str(message["content"]) for message in messages if message["role"] == "user"]
        assert sorted(asked) == ["2026-01-01 [1]", "2026-01-02 [2]"]
        assert duplicates.hashes_of(messages)[0] in made.exemplar_hashes()


CELLS = st.text("ab \n.é", min_size=1, max_size=6).filter(lambda text: text.strip())
EXEMPLARS = tuple(Exemplar({"prompt": f"horse {n}"}, "apple fig") for n in range(5))


@settings(max_examples=40, deadline=None)
@given(
    question=CELLS, answer=CELLS, system=st.none() | CELLS, shots=st.integers(0, 3),
    key=st.sampled_from(sorted(TOKENIZERS)), max_length=st.integers(20, 200),
)  # fmt: skip
def test_only_the_rows_own_answer_is_learned(question, answer, system, shots, key, max_length):
    """Against a plain mask of the conversation's last answer; `all` is every token."""
    tokenizer = TOKENIZERS[key]
    columns = (("prompt", "q"), ("answer", "a"), ("system", "s"))
    made = Rendering(columns, (Template("Do {prompt}!", False),), num_shots=shots, exemplars=EXEMPLARS)
    (messages,) = made.conversations("row", {"q": question, "a": answer, "s": system})
    assert len(messages) == 2 + 2 * shots + (system is not None)
    plain = [{"role": message["role"], "content": str(message["content"])} for message in messages]
    expected = plain_mask(tokenizer, plain, "last", max_length)
    for labels in ("answers", "last", "all"):
        (table,) = tokenize_all([("row", messages)], tokenizer, max_length, new_counts(), labels=labels)
        assert table.num_rows == any(expected)
        for row in table.to_pylist():
            assert mask_of(row) == (plain_mask(tokenizer, plain, "all", max_length) if labels == "all" else expected)
    if shots:  # negative control: without the mark, exemplars are answers like others
        assert sum(plain_mask(tokenizer, plain, "answers", 999)) > sum(plain_mask(tokenizer, plain, "last", 999))


def test_a_row_has_one_hash_under_every_template(two):
    row = dialogues(1)[0]
    every = rendering_of(42, ["answer=summary", "system=id"], str(two), all_templates=True)
    first, second = every.conversations("row", {**row, "id": "Be short."})
    assert contents(first)[:1] == contents(second)[:1] == [("system", "Be short.")]
    assert first[1]["content"] != second[1]["content"]
    assert duplicates.hashes_of(first) == duplicates.hashes_of(second)
    assert isinstance(first[1]["content"], Rendered)
    third = every.conversations("row", {**row, "summary": "Another.", "id": None})[0]
    assert duplicates.hashes_of(third) != duplicates.hashes_of(first)


@pytest.mark.parametrize("all_templates, shots", [(True, 0), (False, 2), (True, 2)])
def test_no_row_stands_on_both_sides_and_no_exemplar_is_held_out(all_templates, shots, two, tmp_path):
    rows = [(f"row {row['id']}", row) for row in dialogues(60)]
    made = rendering_of(42, ["answer=summary"], str(two), all_templates, shots)
    made = made.with_exemplars(rows, "rows") if shots else made
    named = list(reading.conversations(rows, rendering=made))
    assert len(named) == 60 * (1 + all_templates)
    examples = build(iter(named), TOKENIZERS["tulu", False], 4096, "key", None)
    train, held_out = hold_out_groups(examples, 0.2, 500, 42, made.exemplar_hashes())
    assert len(train) + len(held_out) == len(examples) and abs(len(held_out) - 0.2 * len(examples)) <= 1
    assert not set(train.rows) & set(held_out.rows)
    assert not set(train.hashes[0]) & set(held_out.hashes[0])
    assert set(made.exemplar_hashes()) <= set(train.hashes[0]) and len(made.exemplar_hashes()) == 15 * bool(shots)
    plain_train, plain_held_out = hold_out(examples, 0.2, 500, 42)  # negative control
    both = set(plain_train.hashes[0]) & set(plain_held_out.hashes[0])
    assert both or set(made.exemplar_hashes()) & set(plain_held_out.hashes[0])
    assert hold_out_groups(examples, 0, 500, 42, [])[1] is None
    with pytest.raises(InputError, match="can't: give more rows"):
        hold_out_groups(examples, 0.2, 500, 42, np.unique(examples.hashes[0]).tolist())


# --- the flags


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """A model whose weights are refused when they are read."""
    folder = tmp_path_factory.mktemp("damaged") / "model"
    shutil.copytree(TINY_MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    weights[max(weights)][0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "words, says",
    [
        (["--columns", "dialogue"], "'dialogue' is not NAME=COLUMN"),
        (["--columns", "prompt=a", "prompt=b", "answer=c"], "the name prompt stands there twice"),
        (["--columns", "prompt=dialogue"], "names no answer"),
        (["--columns", "answer=summary"], "names no question"),
        ([*NAMED, "--sft_messages_key", "talk"], "without --sft_messages_key"),
        ([*NAMED, "about=topic"], "about=topic has no effect without a --template"),
        ([*NAMED, "--template", "{two}"], "prompt=dialogue has no effect, as no template has the field prompt"),
        (["--columns", "answer=dialogue", "--template", "{two}"], "writes dialogue, which holds the answer"),
        ([*NAMED, "--template", "{two}/none.txt"], "--template"),
        ([*NAMED, "--all_templates"], "without --template"),
        (["--columns", "answer=summary", "--template", "{one}", "--all_templates"], "no effect with one template"),
        (["--columns", "prompt=dialog", "answer=summary"], "no column `dialog` (columns: id, dialogue, summ"),
        (["--columns", "prompt=dialogue", "answer=label"], "no column `label` (columns: id, dialogue, summ"),
        (["--columns", "answer=summary", "--template", "{typo}"], "(columns: id, dialogue, topic): name one of these"),
        (["--columns", "answer=summary", "--template", "{jinja}"], "names dialog, and"),
        (["--columns", "answer=summary", "--template", "{typo}", "--shots", "2"], "names dialog, and"),
        ([], "with --columns prompt=COLUMN answer=COLUMN"),
        (["--shots", "64"], "at most 63"),
        (NAMED, "not finite"),  # control: only now weights are read
    ],
)  # fmt: skip
def test_wrong_flags_are_one_line_before_any_weight_is_read(words, says, train, data, two, tmp_path, damaged):
    files = {"two": two, **{name: tmp_path / f"{name}.txt" for name in ("one", "typo")}}
    files["one"].write_text("Sum up {dialogue}")
    files["typo"].write_text("Sum up {dialog}")
    files["jinja"] = tmp_path / "typo.jinja"
    files["jinja"].write_text("{% if topic %}{{ topic }}{% endif %}{{ dialog }}")
    run = train("run", "--use_lora", *(word.format(**files) for word in words), data=data, model=damaged)
    assert run.code == 2 and says in run.err and "Traceback" not in run.err, run.err
    assert len([line for line in run.err.splitlines() if line.startswith("error:")]) == 1
    assert not (run.folder / "run.json").exists()


def test_a_column_that_only_some_rows_lack_is_a_bad_row(train, data):
    rows = [{name: row[name] for name in row if name != "topic" or row["id"] % 20} for row in dialogues(60)]
    write_rows(data, [rows[1], *rows])
    words = ["--use_lora", "--max_train_steps", "1", "--columns", "prompt=topic", "answer=summary"]
    run = train("run", *words, data=data)
    assert run.code == 2 and "3 of 61 rows can't be used" in run.err and "no column `topic`" in run.err
    run = train("skip", *words, "--bad_rows", "skip", data=data)
    assert run.code == 0 and "58 conversations" not in run.err, run.err
    assert "3 of 61 rows" in json.loads((run.folder / "run.json").read_text())["bad_rows"]["training"]


# --- runs and tools


def trained_on(run) -> dict:
    return json.loads((run.folder / "run.json").read_text())["rendering"]


def test_a_run_with_templates_is_the_run_on_rows_written_by_hand(train, data, tmp_path):
    """The same losses as on conversations; the cache keeps templates apart, and finds the same one again."""
    template = tmp_path / "one.jinja"
    template.write_text("{{ topic | upper }}:\n{% if topic %}\n{{ dialogue }}\n{% endif %}\n")
    by_hand = [
        {
            "messages": [
                {"role": "user", "content": f"{row['topic'].upper()}:\n{row['dialogue']}\n"},
                {"role": "assistant", "content": row["summary"]},
            ]
        }
        for row in dialogues(60)
    ]
    plain = write_rows(tmp_path / "by_hand.jsonl", by_hand)
    words = ["--use_lora", "--lora_dropout", "0", "--max_train_steps", "2"]
    named = [*words, "--columns", "answer=summary", "--template", str(template)]
    runs = [train("a", *named, data=data), train("b", *words, data=plain), train("c", *named, data=data)]
    template.write_text("{{ dialogue }}\n")
    runs.append(train("d", *named, data=data))
    assert [run.code for run in runs] == [0] * 4, [run.err for run in runs]
    losses = [[row.get("loss") for row in run.metrics] for run in runs]
    assert losses[0] == losses[1] == losses[2] != losses[3]
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert trained_on(runs[1]) is None and trained_on(runs[0])["templates"][0]["text"].startswith("{{ topic | upper")


@pytest.mark.parametrize("kind", ["causal", "encoder-decoder"])
def test_dialogues_train_and_their_tools_ask_likewise(kind, train, data, two, tmp_path, capsys):
    """One command trains, one measures, one answers: with templates and exemplars, which only the run names."""
    model = TINY_MODEL if kind == "causal" else TINY_T5
    words = ["--use_lora", "--max_train_steps", "2", "--columns", "answer=summary", "--template", str(two)]
    run = train("run", *words, "--shots", "2", data=data, model=model)
    assert run.code == 0, run.err
    assert "2 templates, each with one of them, drawn by seed; 2 of 15 exemplars before each question" in run.out
    two.unlink()
    made = from_record(trained_on(run))
    assert made.num_shots == 2 and len(made.exemplars) == 15
    held_out = write_rows(tmp_path / "held_out.jsonl", dialogues(6, seed=9))
    files = ["--input_file", str(held_out), "--output_file", str(tmp_path / "answers.jsonl")]
    common = ["--adapter", str(run.folder), "--max_new_tokens", "4"]
    assert generate_main([*common, *files]) == 0
    assert "questions as in the adapter's training: columns answer=summary; 2 templates" in capsys.readouterr().err
    for line, row in zip((tmp_path / "answers.jsonl").read_text().splitlines(), dialogues(6, seed=9), strict=True):
        answer, messages = json.loads(line), made.conversations("row", row)[0]
        assert contents(answer["messages"]) == contents(messages[:-1]) and len(messages) == 6
        assert answer["reference"] == row["summary"]
    assert generate_main([*common, *files, "--resume", "--shots", "1"]) == 2
    assert "made with other settings" in capsys.readouterr().err
    results = {}
    as_they_are = ["--columns", "none", "--template", "none", "--shots", "0"]
    for name, more in {
        "run": ["--file", str(held_out)],
        "by hand": ["--file", str(tmp_path / "by_hand.jsonl"), *as_they_are],
    }.items():
        by_hand = [{"messages": made.conversations("row", row)[0]} for row in dialogues(6, seed=9)]
        write_rows(tmp_path / "by_hand.jsonl", by_hand)
        code = evaluate_main([*common, *more, "--metrics", "loss", "rouge", "--output_dir", str(tmp_path / name)])
        assert code == 0, capsys.readouterr().err
        results[name] = json.loads((tmp_path / name / "evaluation.json").read_text())
    rouge = [result["figures"]["run"]["rouge1"]["value"] for result in results.values()]
    losses = [result["figures"]["run"]["loss"]["value"] for result in results.values()]
    assert rouge[0] == rouge[1]
    # By hand, exemplars are answers like others, but for encoder–decoders, which learn the last answer alone.
    assert (losses[0] == pytest.approx(losses[1], rel=1e-6)) == (kind != "causal")
    assert results["run"]["questions"].startswith("columns answer=summary") and results["by hand"]["questions"] is None


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    """Adapters that were trained on rows of several forms, and data."""
    from accelerate.state import AcceleratorState

    from open_instruct.finetune_peft import main

    folder = tmp_path_factory.mktemp("adapters")
    data = write_rows(folder / "data.jsonl", dialogues(60))
    plain = write_rows(
        folder / "plain.jsonl", [{"prompt": row["dialogue"], "completion": row["summary"]} for row in dialogues(60)]
    )
    (folder / "two.txt").write_text(TWO)
    forms = {
        "named": NAMED,
        "shots": [*NAMED, "--shots", "1"],
        "two": ["--columns", "answer=summary", "--template", str(folder / "two.txt"), "--all_templates"],
        "plain": [],
    }
    for name, words in forms.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        source = plain if name == "plain" else data
        command = ["--model_name_or_path", str(TINY_MODEL), "--train_file", str(source), "--use_prompt_tuning", *words]
        command += ["--prompt_tuning_init", "sample_vocab", "--num_sample_answers", "0", "--max_train_steps", "1"]
        assert main([*command, "--dataset_skip_cache", "--output_dir", str(folder / name)]) == 0
    return {"data": data, "plain_rows": plain, **{name: folder / name for name in forms}}


@pytest.mark.parametrize(
    "names, words, says",
    [
        (["named", "plain"], [], "were trained on questions in different forms"),
        (["named", "shots"], ["--shots", "0"], "were trained on questions in different forms"),
        (
            ["named"],
            ["--shots", "2"],
            "needs rows to draw exemplars from: name a file of rows with --shots_file",
        ),
        (["shots"], ["--shots", "40"], "the adapter's training kept 15 exemplars"),
        (["shots"], ["--shots_file", "{data}", "--shots", "0"], "no effect with --shots 0"),
        (["named"], ["--shots_file", "{data}"], "no effect without --shots"),
        (
            ["shots"],
            ["--columns", "answer=summary", "--template", "{two}.txt"],
            "name a file of rows with --shots_file",
        ),
        (["named"], ["--columns", "prompt=dialog", "answer=summary"], "no column `dialog` (columns: id, dialogue"),
        (["named"], ["--columns", "prompt"], "'prompt' is not NAME=COLUMN"),
        (["plain"], ["--columns", "prompt=dialogue"], "names no answer"),
        (["plain"], ["--columns", "prompt=dialogue", "answer=label"], "no column `label`"),
    ],
)
def test_wrong_forms_of_the_tools_are_one_line(names, words, says, adapters, capsys):
    words = [word.format(**adapters) for word in words]
    command = [word for name in names for word in ("--adapter", str(adapters[name]))]
    try:
        code = evaluate_main([*command, "--file", str(adapters["data"]), *words])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and says in error and "Traceback" not in error, error


@pytest.mark.parametrize(
    "change",
    [{"shots": -1}, {"seed": -1}, {"columns": ["x"]}, {"templates": [{}]}, {"exemplars": [{"values": {}}] * 9}, 5],
)
def test_a_damaged_record_is_one_line(change, adapters, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    shutil.copytree(adapters["shots"], damaged)
    record = json.loads((damaged / "run.json").read_text())
    record["rendering"] = {**record["rendering"], **change} if isinstance(change, dict) else change
    (damaged / "run.json").write_text(json.dumps(record))
    assert evaluate_main(["--adapter", str(damaged), "--file", str(adapters["data"])]) == 2
    error = capsys.readouterr().err
    assert "can't be used" in error and error.count("error:") == 1 and "Traceback" not in error, error


def test_flags_of_a_tool_replace_those_of_the_training(adapters, tmp_path, capsys):
    def asked(name: str, *words: str) -> list[dict]:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        command = ["--adapter", str(adapters[name]), "--max_new_tokens", "1", "--output_file", str(out)]
        assert generate_main([*command, *words]) == 0
        return [json.loads(line)["messages"] for line in out.read_text().splitlines()]

    rows = dialogues(4)
    file = ["--input_file", str(write_rows(tmp_path / "rows.jsonl", rows))]
    plain = [[{"role": "user", "content": row["dialogue"]}] for row in rows]
    assert asked("named", *file) == plain
    assert "questions as in the adapter's training" in capsys.readouterr().err
    assert asked("shots", *file, "--shots", "0") == plain
    capsys.readouterr()
    assert asked("shots", *file, "--shots", "0", "--template", "none", "--columns", "prompt=dialogue") == plain
    assert "questions as" not in capsys.readouterr().err
    shots = asked("shots", *file)
    assert [len(messages) for messages in shots] == [3] * 4 and [messages[-1:] for messages in shots] == plain
    # The same rows and seed give the same exemplars, whoever draws them.
    assert asked("named", *file, "--shots", "1", "--shots_file", str(adapters["data"])) == shots
    two = asked("two", *file)
    assert [len(messages) for messages in two] == [1] * 4  # one of the templates, which all were trained
    texts = {
        message["content"].startswith("Summarize:")
        for (message,) in asked("two", "--input_file", str(adapters["data"]))
    }
    assert texts == {True, False}  # fmt: skip
    assert asked("plain", "--input_file", str(adapters["plain_rows"]))[:4] == plain
    capsys.readouterr()
    assert generate_main(["--adapter", str(adapters["shots"]), "--prompt", "horse", "--max_new_tokens", "1"]) == 0
    assert "asked as it is; the adapter was trained with columns prompt=dialogue" in capsys.readouterr().err


def test_a_prompt_is_inspected_on_questions_of_its_training(adapters, capsys):
    words = ["--adapter", str(adapters["shots"]), "--rows", "2", "--top", "1"]
    assert inspect_main([*words, "--file", str(adapters["data"])]) == 0
    output = capsys.readouterr()
    assert "questions as in the adapter's training" in output.err and "Attention to the virtual tokens" in output.out
    with pytest.raises(SystemExit):
        inspect_main([*words, "--shots", "0"])
    assert "are for rows of --file" in capsys.readouterr().err


def test_training_goes_on_with_a_warning_about_the_form(adapters, train):
    words = ["--adapter_name_or_path", str(adapters["shots"]), "--max_train_steps", "1"]
    run = train("on", *words, data=adapters["plain_rows"])
    assert run.code == 0 and "give these flags again to keep the form" in run.err, run.err
    run = train("same", *words, *NAMED, "--shots", "1", data=adapters["data"])
    assert run.code == 0 and "keep the form" not in run.err, run.err
    first = json.loads((adapters["shots"] / "run.json").read_text())["rendering"]
    assert trained_on(run)["exemplars"] == first["exemplars"]


def test_all_templates_make_an_example_each(train, data, two):
    words = ["--use_lora", "--max_train_steps", "1", "--columns", "answer=summary", "--template", str(two)]
    runs = [train("all", *words, "--all_templates", data=data), train("one", *words, data=data)]
    assert [run.code for run in runs] == [0, 0], runs[0].err
    assert "training: 96 conversations" in runs[0].out and "held out: 24 conversations" in runs[0].out
    assert "none of the 24 rows stands in the training data" in runs[0].out
    assert "training: 48 conversations" in runs[1].out


def test_questions_without_a_form_are_read_as_before(tmp_path):
    rows = [{"prompt": row["dialogue"], "completion": row["summary"]} for row in dialogues(3)]
    (first, *_) = read_questions(str(write_rows(tmp_path / "rows.jsonl", rows)), answered=True)
    assert first.reference == rows[0]["completion"] and not isinstance(first.messages[0]["content"], Rendered)
    assert own_spans(first.messages, [(1, 2), (3, 4)]) == [(1, 2), (3, 4)]
