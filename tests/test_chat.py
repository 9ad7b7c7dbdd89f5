"""Loss masks, against an independent and slow way to find them: counting the tokens of rendered prefixes."""

import pytest
from transformers import AutoTokenizer

from open_instruct.data import chat
from open_instruct.data.tokenising import new_counts, tokenize_all
from open_instruct.errors import InputError
from tests.conftest import TINY_MODEL

CONVERSATIONS = [
    [{"role": "user", "content": "horse apple"}, {"role": "assistant", "content": "apple horse"}],
    [
        {"role": "system", "content": "Reverse."},
        {"role": "user", "content": "wolf  fig\n\n"},
        {"role": "assistant", "content": "fig wolf"},
        {"role": "user", "content": "été ☂ 漢字"},
        {"role": "assistant", "content": "漢字 ☂ été"},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "tool", "content": "c"},
        {"role": "assistant", "content": "d"},
    ],
]
OWN_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MODEL)


def mask_by_counting(tokenizer, messages):
    """Return labelled positions, by tokenising each prefix (text before a turn ends on a token border here)."""

    def count(until, prompt=False):
        text = tokenizer.apply_chat_template(messages[:until], tokenize=False, add_generation_prompt=prompt)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    labelled = set()
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            labelled |= set(range(count(index, prompt=True), count(index + 1)))
    return labelled


def positions(spans):
    return {i for start, end in spans for i in range(start, end)}


@pytest.mark.parametrize("template", ["tulu", "own"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_labelled_tokens_are_those_of_counting(tokenizer, template, add_bos, tmp_path):
    if template == "own":
        template = str(tmp_path / "own.jinja")
        (tmp_path / "own.jinja").write_text(OWN_TEMPLATE)
    chat.set_chat_template(tokenizer, template, add_bos)
    ids, spans = chat.tokenize(tokenizer, CONVERSATIONS, 1000)
    for row_ids, row_spans, messages in zip(ids, spans, CONVERSATIONS, strict=True):
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert row_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        # A tulu turn that is not the last is followed by a line break that the prefix up to it lacks.
        assert positions(row_spans) == mask_by_counting(tokenizer, messages)


@pytest.mark.parametrize("template", ["tulu", "zephyr", "chatml", "simple_chat"])
def test_what_is_learned_is_the_answer_and_its_end(tokenizer, template):
    chat.set_chat_template(tokenizer, template)
    ids, spans = chat.tokenize(tokenizer, CONVERSATIONS, 1000)
    end = "<|im_end|>" if template == "chatml" else "</s>"
    for row_ids, row_spans, messages in zip(ids, spans, CONVERSATIONS, strict=True):
        learned = [tokenizer.decode(row_ids[start:stop]) for start, stop in row_spans]
        space = " " if template == "simple_chat" else ""
        assert learned == [space + m["content"] + end for m in messages if m["role"] == "assistant"]


def test_a_mask_shifted_by_one_token_is_noticed(tokenizer):
    chat.set_chat_template(tokenizer, "tulu")
    _, spans = chat.tokenize(tokenizer, CONVERSATIONS, 1000)
    shifted = positions([(start + 1, end + 1) for start, end in spans[0]])
    assert shifted != mask_by_counting(tokenizer, CONVERSATIONS[0])


def test_the_tokenizers_own_template_is_used_as_it_is(tokenizer):
    tokenizer.chat_template = OWN_TEMPLATE
    chat.set_chat_template(tokenizer, "tokenizer")
    assert tokenizer.chat_template == OWN_TEMPLATE


@pytest.mark.parametrize(
    "template, why",
    [
        ("{% for m in messages %}{{ m['content'] if loop.last else '…' }}{% endfor %}", "rewrites earlier turns"),
        ("{% for m in messages %}{{ m['content'] }", "can't be used .TemplateSyntaxError"),
    ],
)
def test_a_template_that_can_not_be_masked_is_refused(tokenizer, template, why, tmp_path):
    (tmp_path / "bad.jinja").write_text(template)
    with pytest.raises(InputError, match=why):
        chat.set_chat_template(tokenizer, str(tmp_path / "bad.jinja"))


def test_missing_templates_and_tokens_are_named(tokenizer):
    with pytest.raises(InputError, match="no chat template 'tullu'"):
        chat.set_chat_template(tokenizer, "tullu")
    tokenizer.bos_token = None
    with pytest.raises(InputError, match="no beginning-of-sequence"):
        chat.set_chat_template(tokenizer, "tulu", add_bos=True)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template: use"):
        chat.set_chat_template(tokenizer, "tokenizer")


def test_truncation_is_counted_and_rows_without_a_label_are_skipped(tokenizer):
    chat.set_chat_template(tokenizer, "tulu")
    ids, spans = chat.tokenize(tokenizer, CONVERSATIONS, 1000)
    named = [(str(i), messages) for i, messages in enumerate(CONVERSATIONS)]
    length = spans[1][0][0] + 1  # the second conversation keeps exactly one labelled token
    counts = new_counts()
    (table,) = tokenize_all(named, tokenizer, length, counts)
    assert counts["num_read"] == 3 and counts["first_label"] == min(row[0][0] for row in spans)
    assert counts["num_truncated"] == sum(len(row) > length for row in ids)
    assert table["spans"].to_pylist()[1 - counts["num_skipped"]] == [length - 1, length]
    counts = new_counts()
    list(tokenize_all(named, tokenizer, min(row[0][0] for row in spans), counts))
    assert counts["num_skipped"] == 3
