"""Rows that can't be used: counted, named, left out on request; wrong types in every field of every form."""

import itertools
import json

import pyarrow as pa
import pytest

from open_instruct.data import forms, questions, reading
from open_instruct.data.bad_rows import BadRows
from open_instruct.errors import InputError

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
GOOD = {"messages": TALK}
EMPTY = {"messages": [TALK[0], {"role": "assistant", "content": ""}]}
WRONG = [
    None,
    True,
    5,
    1.5,
    "",
    " ",
    [],
    {},
    ["human"],
    [None],
    {"a": 1},
    [[]],
    "\ud800",
    "x" * 10**6,
    [{"type": "text"}],
]


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path, skip=False):
    bad = BadRows(skip)
    rows = list(reading.conversations(reading.read_files(reading.files_of(str(path)), bad), bad=bad))
    bad.check()
    return rows, bad


def test_bad_rows_are_counted_and_the_first_three_named(tmp_path):
    path = write(tmp_path / "f.jsonl", [GOOD, EMPTY, "{oops", GOOD, "[1]", EMPTY, EMPTY, GOOD])
    with pytest.raises(InputError) as error:
        read(path)
    text = str(error.value)
    assert text.startswith("5 of 8 rows can't be used (") and text.endswith("pass --bad_rows skip to leave them out")
    named = [text.index(part) for part in ("f.jsonl:2: message 2", "f.jsonl:3: malformed", "f.jsonl:5 is a list")]
    assert named == sorted(named) and "f.jsonl:6" not in text and "\n" not in text


def test_bad_rows_are_left_out_on_request(tmp_path):
    path = write(tmp_path / "f.jsonl", [GOOD, EMPTY, "{oops", GOOD])
    rows, bad = read(path, skip=True)
    assert [source for source, _ in rows] == [f"{path}:1", f"{path}:4"]
    assert bad.num_bad == 2 and bad.summary().startswith("2 of 4 rows can't be used (")


@pytest.mark.parametrize("skip", [False, True])
def test_a_file_of_bad_rows_only_is_an_error_that_does_not_propose_to_skip(skip, tmp_path):
    with pytest.raises(InputError, match=r"no row of 3 can be used .*give rows of a known form"):
        read(write(tmp_path / "f.jsonl", [EMPTY] * 3), skip)


def test_a_wrong_file_is_not_read_to_its_end(tmp_path):
    with pytest.raises(InputError, match="no row of the first 1,000 can be used"):
        read(write(tmp_path / "f.jsonl", ["{oops"] * 5000))


@pytest.mark.parametrize("kind", ["array.json", "t.arrow", "l.jsonl"])
def test_every_format_leaves_the_same_rows_out(kind, tmp_path):
    rows, path = [GOOD, EMPTY, GOOD], tmp_path / kind
    if kind == "array.json":
        path.write_text(json.dumps(rows))
    elif kind == "t.arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        write(path, rows)
    kept, bad = read(path, skip=True)
    assert len(kept) == 2 and bad.num_bad == 1


def test_a_mixture_counts_its_bad_rows_once(tmp_path):
    path = write(tmp_path / "f.jsonl", [GOOD, "{oops", GOOD, GOOD])
    bad = BadRows(skip=True)
    rows = list(reading.conversations(reading.read_mixture([(str(path), "2")], ["train"], 0, bad), bad=bad))
    assert len(rows) == 2 and bad.num_bad == 1


FORMS = {
    "messages": {"messages": TALK},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, TALK[1]]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
    "prompt": {"prompt": "q", "completion": "a"},
    "prompt of messages": {"prompt": TALK[:1], "completion": TALK[1:]},
    "Alpaca": {"instruction": "q", "input": "i", "output": "a"},
}


def places(value, above=()):
    """The paths of all parts of a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [above, *itertools.chain.from_iterable(places(part, (*above, key)) for key, part in items)]


def replaced(value, path, new):
    """A copy of a value with another part."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("answered", [True, False])
def test_a_wrong_value_anywhere_is_refused_in_one_short_line_or_the_messages_are_text(form, answered):
    for path, wrong in itertools.product(places(FORMS[form])[1:], WRONG):
        row = replaced(FORMS[form], path, wrong)
        try:
            messages = forms.to_messages("f:1", row, answered=answered)
        except InputError as error:
            assert len(str(error)) < 500 and str(error).isprintable() and ": " in str(error)
        else:
            texts = [message["content"] for message in messages]
            assert all(isinstance(text, str) and text.strip() and text.encode() for text in texts), row
            # What is accepted is a longer text, or a field that may be empty.
            assert isinstance(wrong, str | None) or not answered, (row, messages)


def test_a_number_in_place_of_a_text_is_refused():
    with pytest.raises(InputError, match="`instruction` is a number: give it text"):
        forms.to_messages("f:1", {"instruction": 1, "output": "a"})


@pytest.mark.parametrize(
    "text, says",
    [
        ('{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('{"n": ' + "9" * 5000 + "}", "4300 digits|4,300 digits"),
        ('{"n": 1, "n": 1}', "the key 'n' stands there twice"),
        ('{"messages": 1e400}', "must be a list"),
    ],
)
@pytest.mark.parametrize("name", ["f.jsonl", "f.json"])
def test_rows_that_python_can_not_hold_are_named(text, says, name, tmp_path):
    (tmp_path / name).write_text(f"[{text}]" if name == "f.json" else text)
    with pytest.raises(InputError, match=says) as error:
        list(reading.conversations(reading.read_rows(tmp_path / name)))
    assert name in str(error.value)


def test_questions_without_an_answer_count_as_bad_where_one_is_needed(tmp_path, capsys):
    path = write(tmp_path / "f.jsonl", [GOOD, {"messages": TALK[:1]}, EMPTY])
    with pytest.raises(InputError, match=r"2 of 3 rows can't be used .*no answer to compare with"):
        questions.read_questions(str(path), answered=True)
    assert len(questions.read_questions(str(path), "skip", answered=True)) == 1
    assert "left out, as --bad_rows skip says" in capsys.readouterr().err
    assert len(questions.read_questions(str(path), "skip")) == 2


def test_a_run_says_and_records_what_it_left_out(train, tmp_path):
    rows = [json.dumps({"messages": TALK}) for _ in range(12)]
    path = write(tmp_path / "f.jsonl", [*rows[:6], EMPTY, *rows[6:]])
    short = ["--use_prompt_tuning", "--max_train_steps", "1", "--validation_fraction", "0.2"]
    run = train("error", *short, data=path)
    assert run.code == 2 and "1 of 13 rows can't be used" in run.err and run.err.count("\n") == 1
    for name in ("skip", "from the cache"):
        run = train(name, *short, "--bad_rows", "skip", data=path)
        assert run.code == 0, run.err
        assert "training: 1 of 13 rows can't be used" in run.out
        assert "1 of 13" in json.loads((run.folder / "run.json").read_text())["bad_rows"]["training"]


def test_rows_that_the_chat_template_refuses_are_bad_rows(train, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    system = {"messages": [{"role": "system", "content": "s"}, *TALK]}
    path = write(tmp_path / "f.jsonl", [*[GOOD] * 8, system])
    short = ["--use_prompt_tuning", "--max_train_steps", "1", "--chat_template_name", str(template)]
    run = train("error", *short, data=path)
    assert run.code == 2 and "1 of 9 rows can't be used" in run.err and "f.jsonl:9" in run.err
    assert train("skip", *short, "--bad_rows", "skip", data=path).code == 0
