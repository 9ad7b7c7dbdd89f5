"""Conversations in any of the known forms → one list of {"role", "content"} messages.

Known forms: `messages` (OpenAI, Tulu); `conversations` of {"from", "value"} (ShareGPT); `prompt` and `completion`;
`instruction`, `input`, `output` (Alpaca). A row's other columns are left out.
"""

from __future__ import annotations

from typing import Any

from open_instruct.data.texts import kind_of, plain, shown
from open_instruct.data.tools import CALLS, RESULT_ROLES, has_calls, without_nulls
from open_instruct.errors import InputError

ROLES = ("system", "user", "assistant", *RESULT_ROLES)
KNOWN_FORMS = (
    "messages: [{role, content}, …]; conversations: [{from, value}, …]; prompt and completion; "
    "instruction, input and output"
)
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def form_of(source: str, row: dict[str, Any], key: str = "messages", answered: bool = True) -> str:
    """Return the name of the form that a row has.

    Args:
        source: where the row stands, for errors.
        row: the row's columns.
        key: column of the messages.
        answered: whether the row must have an answer, as in training.

    Raises:
        InputError: the row has no known form; the error names its columns and the known forms.
    """
    if row.get(key) is not None:
        return key
    if isinstance(row.get("conversations"), list):
        return "ShareGPT"
    if "prompt" in row and ("completion" in row or not answered):
        return "prompt and completion"
    if "instruction" in row and ("output" in row or not answered):
        return "Alpaca"
    columns = plain(", ".join(row)) or "none"
    raise InputError(f"{source}: no `{plain(key)}` (columns: {columns}): known forms are {KNOWN_FORMS}")


def to_messages(source: str, row: dict[str, Any], key: str = "messages", answered: bool = True) -> list[dict[str, Any]]:
    """Return a row's conversation, checked, as a list of {"role", "content"} messages.

    Args:
        source: where the row stands, for errors.
        row: the row's columns.
        key: column of the messages.
        answered: whether an assistant's turn must be there, as in training.

    Raises:
        InputError: the row has no known form, or a message can't be used.
    """
    form = form_of(source, row, key, answered)
    if form == "ShareGPT":
        messages = sharegpt(source, row)
    elif form == "Alpaca":
        parts = [optional_text(source, row, "instruction"), optional_text(source, row, "input")]
        question = "\n\n".join(part for part in parts if part)
        messages = [{"role": "user", "content": question}, *optional(row.get("output"), answered)]
    elif form == "prompt and completion":
        messages = [*turns(row["prompt"], "user"), *optional(row.get("completion"), answered)]
    else:
        messages = row[key]
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise InputError(f"{source}: `{plain(key)}` must be a list of {{role, content}} objects that is not empty")
    messages = [
        check_message(f"{source}: message {number}", message) for number, message in enumerate(messages, start=1)
    ]
    roles = [message["role"] for message in messages]
    if answered and "assistant" not in roles:
        raise InputError(f"{source}: no assistant message: there is nothing to learn from it; remove the row")
    if next((role for role in roles if role != "system"), None) == "assistant":
        raise InputError(f"{source}: the assistant speaks first: a user message must come before it")
    return messages


def sharegpt(source: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of ShareGPT's turns; a `system` column becomes the first message."""
    system = optional_text(source, row, "system")
    messages = [{"role": "system", "content": system}] if system else []
    for number, turn in enumerate(row["conversations"], start=1):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            raise InputError(
                f"{source}: message {number} is from {shown(speaker)}: known speakers are {', '.join(SHAREGPT_ROLES)}"
            )
        messages.append({"role": SHAREGPT_ROLES[speaker], "content": turn.get("value")})
    return messages


def optional_text(source: str, row: dict[str, Any], name: str) -> str:
    """Return the text of a column; "" where it is null or missing.

    Raises:
        InputError: it holds something else. A number is not converted: 1.0 and 1, or true, could be meant otherwise.
    """
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{source}: `{name}` is {kind_of(value)}: give it text")
    return value or ""


def optional(value: Any, answered: bool) -> list[Any]:
    """Return the turns of an answer; none where it is missing and may be."""
    return turns(value, "assistant") if answered or value is not None else []


def turns(value: Any, role: str) -> list[Any]:
    """Return a prompt or completion as messages, which it may be already."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def check_message(source: str, message: dict[str, Any]) -> dict[str, Any]:
    """Return one message, checked; content that is a list of text parts is joined.

    Its other entries stay as they are, for the chat template, but for nulls, which a table fills in where an entry is
    missing. An assistant that calls tools may say nothing; its content is then the row's, or null.

    Raises:
        InputError: the role is unknown, or the content is no text.
    """
    message = {key: value for key, value in message.items() if value is not None}
    message |= {key: without_nulls(message[key]) for key in CALLS if key in message}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InputError(f"{source} has role {shown(role)}: known roles are {', '.join(ROLES)}")
    if role == "assistant" and message.get("loss_weight") not in (None, 1):
        raise InputError(
            f"{source} has loss_weight {shown(message['loss_weight'])}: weights are not supported; "
            "remove the key or the row"
        )
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        content = "".join(part_text(f"{source} ({role})", part) for part in content)
    may_be_empty = role in RESULT_ROLES or has_calls(message)
    if content is None and has_calls(message):
        return {**message, "content": None}
    if not isinstance(content, str) or not (content.strip() or may_be_empty):
        raise InputError(f"{source} ({role}) has content that is {kind_of(content)}: give it text, or remove the row")
    if not content.isascii():
        try:
            content.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(
                f"{source} ({role}) has half of a surrogate pair (\\ud800 to \\udfff), which is no text: repair the row"
            ) from None
    return {**message, "content": content}


def part_text(source: str, part: dict[str, Any]) -> str:
    """Return the text of one part of a message's content.

    Raises:
        InputError: the part is an image or the like, or its text is none.
    """
    if part.get("type") != "text":
        raise InputError(
            f"{source} has a content part of type {shown(part.get('type'))}: only text parts are known; "
            "write it as text"
        )
    text = part.get("text") if part.get("text") is not None else part.get("value")  # Arrow fills what is missing
    if not isinstance(text, str):
        raise InputError(f"{source} has a text part that is {kind_of(text)}: give it text, or remove the row")
    return text
