"""Chat templates that write earlier turns otherwise when others follow: what is learned of their answers.

The truth is a twin of each template with `generation` blocks, which mark what the assistant says in the final text.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from open_instruct.data import chat
from open_instruct.data.dataset import build
from open_instruct.data.sources import Conversation
from open_instruct.data.spans import NOT_LEARNED, Rewritten, learned_spans
from open_instruct.data.tokenising import new_counts, tokenize_all
from open_instruct.errors import InputError
from tests.conftest import TINY_MODEL

OPEN, CLOSE = "{% generation %}", "{% endgeneration %}"


def template(answer: str, before: str = "", user: str = "{{ m.content }}", prompt: str = "[assistant]\n") -> str:
    """A template from what it writes for an answer, before all turns, for a question, and as the prompt."""
    return (
        before + "{% for m in messages %}[{{ m.role }}]\n{% if m.role == 'assistant' %}" + OPEN + answer + CLOSE
        + "{% else %}" + user + "{% endif %}\n{% endfor %}{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )  # fmt: skip


LAST_QUESTION = "{% set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}"
MARKED = {
    "stable": template("{{ m.content + eos_token }}"),
    "drops earlier thoughts": template(
        "{{ (m.content if loop.last else m.content.split('</think>')[-1]) + eos_token }}"
    ),
    "gives a thought to the last": template(
        "{{ ('<think>\n\n</think>\n' if loop.last and '<think>' not in m.content else '') + m.content + eos_token }}"
    ),
    "ends the last otherwise": template("{{ m.content + (eos_token if loop.last else '[end]') }}"),
    "ends the last alone": template("{{ m.content + (eos_token if loop.last else '') }}"),
    "tools at the last question": template(
        "{{ m.content + eos_token }}", LAST_QUESTION, "{{ '(tools)' if m == last else '' }}{{ m.content }}"
    ),
    "begins with a thought": template("{{ m.content + eos_token }}", prompt="[assistant]\n<think>"),
    "says how many turns": template("{{ m.content + eos_token }}", "{{ messages | length }} turns\n"),
    "shortens the earlier": template("{{ (m.content if loop.last else m.content[:2]) + eos_token }}"),
}


def tokenizer_of(text: str):
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    tokenizer.chat_template = text
    return tokenizer


TWINS = {name: tokenizer_of(text) for name, text in MARKED.items()}
PLAIN = {name: tokenizer_of(text.replace(OPEN, "").replace(CLOSE, "")) for name, text in MARKED.items()}
ROLES = ("user", "assistant")
WORDS = st.sampled_from(
    ["horse", "apple  fig", "été ☂ 漢字", "a\n\nb", "<think>why</think>\nwolf", "0", "0 0", "[end]"]
)
CONVERSATIONS = st.builds(
    lambda turns, open_end: [
        *({"role": role, "content": text} for turn in turns for role, text in zip(ROLES, turn, strict=True)),
        *([{"role": "user", "content": open_end}] if open_end else []),
    ],
    st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4),
    st.none() | WORDS,
)


def plain_answers(tokenizer: Any, messages: list[dict[str, Any]]) -> list[tuple[str, set[int]]]:
    """For each answer whether it is learned ("whole", "content", "not"), and which characters: one by one, slowly."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    answers = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        until = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        alike = 0  # characters that the text, and the conversation up to this turn, begin with
        while alike < min(len(text), len(until)) and text[alike] == until[alike]:
            alike += 1
        is_asked = all(i < alike and text[i] == character for i, character in enumerate(prompt))
        if is_asked and alike == len(until):
            answers.append(("whole", set(range(len(prompt), len(until)))))
            continue
        content, ends = message["content"].strip(), []
        if is_asked:
            ends = [i + len(content) for i in range(len(prompt), alike) if text[i : i + len(content)] == content]
        ends = [end for end in ends if end <= alike]
        answers.append(("content", set(range(len(prompt), ends[0]))) if ends else ("not", set()))
    return answers


def token_mask(tokenizer: Any, text: str, characters: set[int]) -> list[bool]:
    """Whether each token has one of these characters."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [any(character in characters for character in range(start, end)) for start, end in offsets]


def mask_of(spans, num_tokens: int) -> list[bool]:
    return [any(start <= i < end for start, end in spans) for i in range(num_tokens)]


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(sorted(MARKED)), messages=CONVERSATIONS)
def test_masks_are_those_of_a_plain_reading_and_never_more_than_the_assistants(name, messages):
    plain, twin = PLAIN[name], TWINS[name]
    counts = Rewritten()
    (ids,), (spans,) = chat.tokenize(plain, [messages], 10_000, counts)
    (text,), (said,) = chat.render(twin, [messages])
    assert text == plain.apply_chat_template(messages, tokenize=False)
    answers = plain_answers(plain, messages)
    kinds = [kind for kind, _ in answers]
    assert (counts.num_shortened, counts.num_left_out) == (kinds.count("content"), kinds.count("not"))
    assert counts.num_conversations == (set(kinds) > {"whole"} or "whole" not in kinds)
    assert [span == NOT_LEARNED for span in spans] == [kind == "not" for kind in kinds]
    learned = set().union(*(characters for _, characters in answers))
    row = learned_spans("answers", spans, len(ids))
    assert mask_of(row, len(ids)) == token_mask(plain, text, learned)
    # A line break that ends a turn stands outside the twin's block.
    of_the_assistant = {i for start, end in said for i in range(start, end + 1)}
    assert learned <= of_the_assistant
    given_by_prompt = len("<think>") if name == "begins with a thought" else 0
    for (start, _), (kind, characters) in zip(said, answers, strict=True):
        assert kind == "not" or min(characters) == start + given_by_prompt
    last = learned_spans("last", spans, len(ids))
    expected = answers[-1][1]
    assert mask_of(last, len(ids)) == token_mask(plain, text, expected)
    if name == "stable":
        assert set(kinds) == {"whole"}
    if messages[-1]["role"] == "assistant" and name not in ("begins with a thought", "says how many turns"):
        assert kinds[-1] == "whole"  # the last answer is always asked for as it stands


def test_masks_by_the_length_of_prefixes_are_noticed():
    """The negative control: what counting characters of prefixes would learn is not the assistant's alone."""
    messages = [
        {"role": "user", "content": "horse"},
        {"role": "assistant", "content": "<think>why</think>\nwolf"},
        {"role": "user", "content": "apple"},
        {"role": "assistant", "content": "fig"},
    ]
    name = "drops earlier thoughts"
    plain, counted = PLAIN[name], set()
    for number in (1, 3):
        prompt = plain.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        until = plain.apply_chat_template(messages[: number + 1], tokenize=False)
        counted |= set(range(len(prompt), len(until)))
    _, (said,) = chat.render(TWINS[name], [messages])
    assert not counted <= {i for start, end in said for i in range(start, end + 1)}
    assert [kind for kind, _ in plain_answers(plain, messages)] == ["not", "whole"]


LONG = [
    {"role": "user", "content": "horse"},
    {"role": "assistant", "content": "<think>why</think>\nwolf"},
    {"role": "user", "content": "apple"},
    {"role": "assistant", "content": "fig"},
]


def test_rows_are_counted_and_said(tmp_path):
    """Also from the cache; a row of which no answer is left is skipped, and `last` never means an earlier answer."""
    rows = [("1", Conversation(LONG)), ("2", Conversation(LONG[2:])), ("3", Conversation([*LONG[:2], LONG[2]]))]
    tokenizer = PLAIN["drops earlier thoughts"]
    for _ in range(2):
        examples = build(rows, tokenizer, 1000, "a", tmp_path)
        assert len(examples) == 2 and examples.num_skipped == 1
        assert "in 2 of 3 conversations: 2 answers are not learned" in examples.by_template
    counts = new_counts()
    list(tokenize_all([("1", Conversation([*LONG, LONG[0]]))], PLAIN["ends the last otherwise"], 1000, counts))
    assert "0 answers are not learned" in counts["by_template"] and "2 are learned without" in counts["by_template"]
    open_end = [*LONG[2:], *LONG[:2], LONG[0]]
    tokenizer = PLAIN["drops earlier thoughts"]
    only_last = build([("1", Conversation(open_end)), rows[1]], tokenizer, 1000, "b", None, labels="last")
    assert only_last.label_counts.tolist()[0] == 0 < only_last.label_counts.tolist()[1]
    with pytest.raises(InputError, match="rewrites answers when other turns follow, in 1 of 1 conversations"):
        build(rows[2:], tokenizer, 1000, "c", None)


def test_a_beginning_left_out_moves_what_is_learned_and_nothing_else():
    """The beginning-of-sequence token, where a hard prompt has it."""
    tokenizer = PLAIN["drops earlier thoughts"]
    counts = new_counts()
    for labels in ("answers", "last"):
        named = [("1", Conversation([*LONG[:2], *LONG[:1], *LONG[3:], LONG[0], LONG[1], LONG[0]]))]
        tables = [
            next(iter(tokenize_all(named, tokenizer, 1000, counts, labels=labels, num_left_out=n))) for n in (0, 1)
        ]
        whole, less = (table.to_pylist()[0] for table in tables)
        assert whole["input_ids"][1:] == less["input_ids"]
        moved = [bound - 1 for bound in whole["spans"]]
        assert less["spans"] == moved


def test_a_template_that_begins_with_a_thought_can_be_used(train, tmp_path):
    """Answers with one are learned; without one, the model is not asked for them so."""
    path = tmp_path / "thinks.jinja"
    path.write_text(MARKED["begins with a thought"].replace(OPEN, "").replace(CLOSE, ""))
    rows = [LONG[:2], LONG[:2], LONG[:2], LONG[2:]] * 2
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    run = train("thinks", "--use_prompt_tuning", "--max_train_steps", "1", "--chat_template_name", str(path), data=data)
    assert run.code == 0, run.err
    line = "training: the chat template rewrites answers when other turns follow, in 2 of 8 conversations: 2 answers"
    assert run.out.count(line) == 1
    (recorded,) = json.loads((run.folder / "run.json").read_text())["by_template"]["training"]
    assert recorded.startswith(line.removeprefix("training: "))
