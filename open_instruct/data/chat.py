"""Conversation → token ids and the spans that count in the loss.

A conversation is rendered once, tokenised once, and the characters of the assistant's turns (their end-of-turn token
included) are mapped to tokens by the tokenizer's offsets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from open_instruct.data.sources import tools_of
from open_instruct.data.templates import is_before
from open_instruct.errors import InputError
from open_instruct.limits import SECONDS, evaluating_input
from open_instruct.small_files import read_text

Messages = Sequence[dict[str, Any]]
Spans = list[tuple[int, int]]
Labels = Literal["answers", "last", "all"]  # what is learned of a conversation
PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
# Characters that a template may write: a long system message of its own, and its marks around each turn and word.
MOST_OWN_TEXT = 1_000_000
MOST_FOR_EACH_CHARACTER = 100

PAIRS = "makes_pairs"  # attribute of a tokenizer

# The formats are open-instruct's and Hugging Face's; `generation` marks the assistant's turns.
CHAT_TEMPLATES = {
    "tulu": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
        "{{ '' if loop.last else '\n' }}{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
        "{% else %}{{ message['content'] + eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "simple_chat": (
        "{% for message in messages %}{% if not loop.first %}{{ '\n\n' }}{% endif %}"
        "{{ message['role'].capitalize() + ':' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
        "{% else %}{{ ' ' + message['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
    ),
}


# For encoder–decoders: what they were pretrained on has no role tags.
PLAIN = "plain"
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
)


def set_chat_template(tokenizer: PreTrainedTokenizerBase, name: str, add_bos: bool = False) -> None:
    """Give a tokenizer its chat template.

    Args:
        tokenizer: the tokenizer to change.
        name: a name of CHAT_TEMPLATES, the path of a Jinja file, or "tokenizer": the template that the tokenizer has.
        add_bos: begin each conversation with the beginning-of-sequence token, where the template does not.

    Raises:
        InputError: there is no such template, it can't be rendered, or the tokenizer lacks a token that it needs.
    """
    if name == "tokenizer":
        template = tokenizer.chat_template
        if not isinstance(template, str):
            raise InputError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template: "
                "use --chat_template_name tulu or a Jinja file"
            )
    elif name in CHAT_TEMPLATES:
        template = CHAT_TEMPLATES[name]
    elif name == PLAIN and makes_pairs(tokenizer):
        template = PLAIN_TEMPLATE
    elif Path(name).exists() and not Path(name).is_dir():
        template = read_text(Path(name), f"chat template {name}", "name a Jinja file")
    else:
        raise InputError(
            f"no chat template {name!r}: use {', '.join(CHAT_TEMPLATES)}, tokenizer, or the path of a Jinja file"
        )
    if "eos_token" in template and tokenizer.eos_token is None:
        raise InputError(
            f"chat template {name} ends turns with the end-of-sequence token, and the tokenizer has none: "
            "use another template"
        )
    if add_bos and "bos_token" not in template:
        if tokenizer.bos_token is None:
            raise InputError("--add_bos is set, but the tokenizer has no beginning-of-sequence token: drop the flag")
        template = "{{ bos_token }}" + template
    tokenizer.chat_template = template
    if makes_pairs(tokenizer):  # it writes sources, which need no answer in them
        render_texts(tokenizer, [PROBE[:1]], add_generation_prompt=True)
        return
    try:
        (text,), (spans,) = render(tokenizer, [PROBE])
    except InputError as error:
        raise InputError(f"chat template {name}: {error}") from None
    if not text.strip():
        raise InputError(f"chat template {name} writes nothing for a conversation: mend it, or use another")
    if not any(PROBE[1]["content"] in text[start:end] for start, end in spans):
        raise InputError(
            f"chat template {name} writes no answer of the assistant that could be learned: mend it, or use another"
        )


def mark_pairs(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer make pairs of source and target from now on, as an encoder–decoder needs; see `pairs`."""
    setattr(tokenizer, PAIRS, True)


def makes_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer belongs to an encoder–decoder."""
    return getattr(tokenizer, PAIRS, False) is True


def render_texts(
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Messages],
    template: str | None = None,
    marks_answers: bool = False,
    **options: Any,
) -> tuple[list[str], list[Spans]]:
    """Return the text of each conversation. All rendering of chat templates is done here, with limits.

    The tools that a conversation offers are the template's variable `tools`.

    Args:
        tokenizer: gives the special tokens.
        batch: the conversations.
        template: the template; None: the tokenizer's own.
        marks_answers: the template has `generation` blocks, whose spans are returned.
        options: further variables of the template, as `add_generation_prompt`.

    Raises:
        InputError: the template is malformed, refuses a conversation, computes for ever or writes without end.
    """
    template = str(tokenizer.chat_template) if template is None else template
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    roles = ", ".join(dict.fromkeys(str(message.get("role"))[:20] for messages in batch for message in messages))
    what = f"chat template {template[:30]!r}… with turns of {roles}"
    remedy = "mend it, use another with --chat_template_name, or change the rows"
    with evaluating_input(what, remedy, SECONDS + len(batch)):
        texts: list[str] = []
        spans: list[Spans] = []
        for tools, group in groupby(batch, tools_of):  # one call takes one list of tools
            some_texts, some_spans = render_jinja_template(
                list(group),
                tools=list(tools) or None,
                chat_template=template,
                return_assistant_tokens_mask=marks_answers,
                **{**special, **options},
            )
            texts += some_texts
            spans += some_spans
        for text, messages in zip(texts, batch, strict=True):
            length = sum(len(str(message)) for message in (*messages, *tools_of(messages)))
            most = MOST_OWN_TEXT + MOST_FOR_EACH_CHARACTER * length
            if len(text) > most:
                raise ValueError(f"it writes {len(text):,} characters")
            text.encode()  # half of a surrogate pair can't be tokenised
    return texts, spans


def check_question(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a template that can't write a plain question, before a model is loaded.

    One that refuses it on purpose may take others, as those with a system message.

    Raises:
        InputError: as `render_texts`.
    """
    try:
        render_texts(tokenizer, [PROBE[:1]], add_generation_prompt=True)
    except InputError as error:
        if type(error.__cause__) is not TemplateError:
            raise


def render(tokenizer: PreTrainedTokenizerBase, batch: Sequence[Messages]) -> tuple[list[str], list[Spans]]:
    """Return the text of each conversation, and the character spans [start, end) of the assistant's turns.

    A template with a `generation` block marks the spans itself. Any other must extend a conversation without changing
    what stands before; then the spans are the differences between its prefixes.

    Raises:
        InputError: as `render_texts`; or the template has no `generation` block and rewrites earlier turns.
    """
    if re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template)):
        return render_texts(tokenizer, batch, marks_answers=True)
    texts, _ = render_texts(tokenizer, batch)
    return texts, [spans_by_prefix(tokenizer, messages, text) for messages, text in zip(batch, texts, strict=True)]


def spans_by_prefix(tokenizer: PreTrainedTokenizerBase, messages: Messages, text: str) -> Spans:
    """Return the character spans of the assistant's turns, from the end of the prompt to the end of the turn.

    Raises:
        InputError: the template rewrites earlier turns when the conversation continues.
    """
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        (prompt,), _ = render_texts(tokenizer, [messages[:index]], add_generation_prompt=True)
        (until,), _ = render_texts(tokenizer, [messages[: index + 1]])
        if not until.startswith(prompt) or not text.startswith(until):
            raise InputError(
                "this chat template rewrites earlier turns when the conversation continues, so the loss mask can't "
                "be derived: add {% generation %} to it, or use --chat_template_name tulu"
            )
        spans.append((len(prompt), len(until)))
    return spans


def tokenize(
    tokenizer: PreTrainedTokenizerBase, batch: Sequence[Messages], max_length: int
) -> tuple[list[list[int]], list[Spans]]:
    """Return the token ids of each conversation, cut at `max_length`, and the token spans [start, end) to be learned.

    Raises:
        InputError: the chat template can't hold a conversation, for example a system message, or two turns of one role.
    """
    if makes_pairs(tokenizer):
        from open_instruct.data.pairs import tokenize_pairs

        return tokenize_pairs(tokenizer, batch, max_length)
    texts, character_spans = render(tokenizer, batch)
    encoded = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    ids = [row[:max_length] for row in encoded["input_ids"]]
    spans = [
        token_spans(offsets[:max_length], own_spans(messages, spans_of_text))
        for messages, offsets, spans_of_text in zip(batch, encoded["offset_mapping"], character_spans, strict=True)
    ]
    return ids, spans


def own_spans(messages: Messages, answers: Spans) -> Spans:
    """Return the spans of a conversation's own answers: exemplars before it are not learned."""
    return answers[-1:] if any(is_before(message) for message in messages) else answers


def learned_spans(labels: Labels, answers: Spans, num_tokens: int) -> Spans:
    """Return the token spans [start, end) that are learned of a conversation cut at `num_tokens`.

    Args:
        labels: "answers": all of the assistant's turns; "last": the last one, an empty span where it is cut away;
            "all": every token but the first, which nothing predicts.
        answers: spans of the assistant's turns in the whole conversation, at least one.
        num_tokens: tokens that are kept.
    """
    if labels == "all":
        return [(1, num_tokens)]
    if labels == "last":
        start, end = answers[-1]
        return [(min(start, num_tokens), min(end, num_tokens))]
    return [(start, min(end, num_tokens)) for start, end in answers if start < num_tokens]


def token_spans(offsets: Sequence[tuple[int, int]], character_spans: Spans) -> Spans:
    """Return the token spans [start, end) of the tokens that have a character in a character span.

    Args:
        offsets: the characters [start, end) of each token, in order.
        character_spans: the spans, in order and without overlap.
    """
    spans, position = [], 0  # one pass: no token is looked at for a span before those of an earlier one
    for start, end in character_spans:
        while position < len(offsets) and offsets[position][1] <= start:
            position += 1
        first = position
        while position < len(offsets) and offsets[position][0] < end:
            position += 1
        if position > first:
            spans.append((first, position))
    return spans
