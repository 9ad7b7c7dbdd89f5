"""Conversation → token ids and the spans that count in the loss.

A conversation is rendered once, tokenised once, and the characters of the assistant's turns (their end-of-turn token
included) are mapped to tokens by the tokenizer's offsets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from open_instruct.data.sources import tools_of
from open_instruct.data.spans import NOT_LEARNED, Rewritten, Spans, own_spans, token_spans
from open_instruct.data.templates import is_before
from open_instruct.data.tools import has_calls
from open_instruct.errors import InputError
from open_instruct.limits import SECONDS, evaluating_input
from open_instruct.small_files import read_text

Messages = Sequence[dict[str, Any]]
PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
# For templates that begin answers with a thought.
THINKING_PROBE = [PROBE[0], {"role": "assistant", "content": "<think>\nthought\n</think>\n\nanswer"}]
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
    rewritten = Rewritten()
    try:
        (text,), _ = render(tokenizer, [PROBE], rewritten)
        learned = learned_probe(tokenizer)
    except InputError as error:
        raise InputError(f"chat template {name}: {error}") from None
    if not text.strip():
        raise InputError(f"chat template {name} writes nothing for a conversation: mend it, or use another")
    if not learned and rewritten.num_left_out:
        raise InputError(
            f"chat template {name} rewrites earlier turns when a conversation continues, a question even when it is "
            "answered, so no answer can be told from its question: add {% generation %} to it, or use "
            "--chat_template_name tulu"
        )
    if not learned:
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


def render(
    tokenizer: PreTrainedTokenizerBase, batch: Sequence[Messages], rewritten: Rewritten | None = None
) -> tuple[list[str], list[Spans]]:
    """Return the text of each conversation, and the character spans [start, end) of the assistant's turns.

    A template with a `generation` block marks the spans itself. Else they are found by `spans_by_prefix`.

    Args:
        tokenizer: with its chat template.
        batch: the conversations.
        rewritten: counts the answers that are not as they were asked for.

    Raises:
        InputError: as `render_texts`.
    """
    if re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template)):
        return render_texts(tokenizer, batch, marks_answers=True)
    texts, _ = render_texts(tokenizer, batch)
    rewritten = rewritten or Rewritten()
    return texts, [
        spans_by_prefix(tokenizer, messages, text, rewritten) for messages, text in zip(batch, texts, strict=True)
    ]


def spans_by_prefix(tokenizer: PreTrainedTokenizerBase, messages: Messages, text: str, rewritten: Rewritten) -> Spans:
    """Return the character span of each of the assistant's turns, from the end of its prompt to the end of the turn.

    When a turn is asked for, the model sees a prompt and is to write what follows it in the conversation up to the end
    of the turn. A template may write both otherwise when other turns follow, as those that drop earlier thoughts, end
    the last turn in a way of its own, or put tools before the last question. Learned is what stands in the whole text
    as the model is to write it, behind the prompt that it then sees: all of a turn; or, where a turn only ends
    otherwise, its content; or nothing, for which NOT_LEARNED stands. Turns that are not the row's own are left out.

    Args:
        tokenizer: with its chat template.
        messages: the conversation.
        text: the same as the template writes it.
        rewritten: counts what is not learned whole.
    """
    spans, own = [], Rewritten()
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or is_before(message):
            continue
        (prompt,), _ = render_texts(tokenizer, [messages[:index]], add_generation_prompt=True)
        (until,), _ = render_texts(tokenizer, [messages[: index + 1]])
        start, content = len(prompt), str(message["content"] or "").strip()
        if until.startswith(prompt) and text.startswith(until):
            spans.append((start, len(until)))
            continue
        common = text[: next((i for i, pair in enumerate(zip(until, text, strict=False)) if pair[0] != pair[1]), None)]
        found = common.find(content, start)
        # What a call is written as is not known: only text is looked for.
        if common.startswith(prompt) and content and found >= start and not has_calls(message):
            spans.append((start, found + len(content)))
            own.num_shortened += 1
        else:
            spans.append(NOT_LEARNED)
            own.num_left_out += 1
    own.num_conversations = int(own.num_shortened + own.num_left_out > 0)
    rewritten.add(own)
    return spans


def learned_probe(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what is learned of the answer of a sample conversation, "" if nothing is.

    Raises:
        InputError: as `render_texts`.
    """
    for probe in (PROBE, THINKING_PROBE):
        (text,), (spans,) = render(tokenizer, [probe])
        learned = text[slice(*spans[-1])] if spans else ""
        if PROBE[1]["content"] in learned:
            return learned
    return ""


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Messages],
    max_length: int,
    rewritten: Rewritten | None = None,
) -> tuple[list[list[int]], list[Spans]]:
    """Return the token ids of each conversation, cut at `max_length`, and the token spans [start, end) to be learned.

    The span of an answer that is not learned is NOT_LEARNED, which is empty.

    Args:
        tokenizer: with its chat template.
        batch: the conversations.
        max_length: tokens kept of each.
        rewritten: see `render`.

    Raises:
        InputError: the chat template can't hold a conversation, for example a system message, or two turns of one role.
    """
    if makes_pairs(tokenizer):
        from open_instruct.data.pairs import tokenize_pairs

        return tokenize_pairs(tokenizer, batch, max_length)
    texts, character_spans = render(tokenizer, batch, rewritten)
    encoded = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    ids = [row[:max_length] for row in encoded["input_ids"]]
    spans = [
        token_spans(offsets[:max_length], own_spans(messages, spans_of_text))
        for messages, offsets, spans_of_text in zip(batch, encoded["offset_mapping"], character_spans, strict=True)
    ]
    return ids, spans
