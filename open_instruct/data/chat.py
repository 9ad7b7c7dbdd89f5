"""Conversation → token ids and the spans that count in the loss.

A conversation is rendered once, tokenised once, and the characters of the assistant's turns (their end-of-turn token
included) are mapped to tokens by the tokenizer's offsets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from open_instruct.errors import InputError

Messages = Sequence[dict[str, Any]]
Spans = list[tuple[int, int]]

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
    elif Path(name).is_file():
        template = Path(name).read_text(encoding="utf-8")
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
    probe = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        render(tokenizer, [probe])
    except TemplateError as error:
        raise InputError(f"chat template {name} can't be rendered: {error}") from None


def render(tokenizer: PreTrainedTokenizerBase, batch: Sequence[Messages]) -> tuple[list[str], list[Spans]]:
    """Return the text of each conversation, and the character spans [start, end) of the assistant's turns.

    A template with a `generation` block marks the spans itself. Any other must extend a conversation without changing
    what stands before; then the spans are the differences between its prefixes.

    Raises:
        InputError: the template has no `generation` block and rewrites earlier turns.
    """
    template = str(tokenizer.chat_template)
    if re.search(r"\{%-?\s*generation\s*-?%\}", template):
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        texts, spans = render_jinja_template(
            list(batch), chat_template=template, return_assistant_tokens_mask=True, **special
        )
        return texts, spans
    texts = [tokenizer.apply_chat_template(list(messages), tokenize=False) for messages in batch]
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
        prompt = tokenizer.apply_chat_template(list(messages[:index]), tokenize=False, add_generation_prompt=True)
        until = tokenizer.apply_chat_template(list(messages[: index + 1]), tokenize=False)
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
    try:
        texts, character_spans = render(tokenizer, batch)
    except TemplateError as error:
        raise InputError(
            f"the chat template refuses a conversation ({error}): change the rows, or --chat_template_name"
        ) from None
    encoded = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    ids = [row[:max_length] for row in encoded["input_ids"]]
    spans = [
        token_spans(offsets[:max_length], spans_of_text)
        for offsets, spans_of_text in zip(encoded["offset_mapping"], character_spans, strict=True)
    ]
    return ids, spans


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
