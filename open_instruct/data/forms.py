"""The forms in which conversations are written down → one list of {"role", "content"} messages.

Known forms: `messages` (OpenAI, Tulu); `conversations` of {"from", "value"} (ShareGPT); `prompt` and `completion`;
`instruction`, `input`, `output` (Alpaca). A row's other columns are left out.
"""

from __future__ import annotations

from typing import Any

from open_instruct.errors import InputError

ROLES = ("system", "user", "assistant", "tool")
KNOWN = "messages: [{role, content}, …]; conversations: [{from, value}, …]; prompt and completion; instruction, input and output"
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


def form_of(place: str, row: dict[str, Any], key: str = "messages", answered: bool = True) -> str:
    """Name of the form that a row has. `answered`: with an answer.

    Raises:
        InputError: none; names the columns found and the forms known.
    """
    if row.get(key) is not None:
        return key
    if isinstance(row.get("conversations"), list):
        return "ShareGPT"
    if "prompt" in row and ("completion" in row or not answered):
        return "prompt and completion"
    if "instruction" in row and ("output" in row or not answered):
        return "Alpaca"
    raise InputError(f"{place}: no `{key}` (columns: {', '.join(row) or 'none'}): known forms are {KNOWN}")


def to_messages(place: str, row: dict[str, Any], key: str = "messages", answered: bool = True) -> list[dict[str, Any]]:
    """A row's conversation, checked.

    Args:
        place: of the row, for errors.
        row: its columns.
        key: column of the messages.
        answered: an assistant's turn must be there, as in training; else it may.

    Raises:
        InputError: naming the place, the value and the remedy.
    """
    form = form_of(place, row, key, answered)
    if form == "ShareGPT":
        messages = sharegpt(place, row)
    elif form == "Alpaca":
        question = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        messages = [{"role": "user", "content": question}, *optional(row.get("output"), answered)]
    elif form == "prompt and completion":
        messages = [*turns(row["prompt"], "user"), *optional(row.get("completion"), answered)]
    else:
        messages = row[key]
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise InputError(f"{place}: `{key}` must be a list of {{role, content}} objects that is not empty")
    messages = [
        check_message(f"{place}: message {number}", message) for number, message in enumerate(messages, start=1)
    ]
    roles = [message["role"] for message in messages]
    if answered and "assistant" not in roles:
        raise InputError(f"{place}: no assistant message: there is nothing to learn from it; remove the row")
    if next((role for role in roles if role != "system"), None) == "assistant":
        raise InputError(f"{place}: the assistant speaks first: a user message must come before it")
    return messages


def sharegpt(place: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """ShareGPT's turns; a `system` column becomes the first message."""
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for number, turn in enumerate(row["conversations"], start=1):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if speaker not in SHAREGPT_ROLES:
            raise InputError(
                f"{place}: message {number} is from {speaker!r}: known speakers are {', '.join(SHAREGPT_ROLES)}"
            )
        messages.append({"role": SHAREGPT_ROLES[speaker], "content": turn.get("value")})
    return messages


def optional(value: Any, answered: bool) -> list[Any]:
    """An answer that may be missing."""
    return turns(value, "assistant") if answered or value is not None else []


def turns(value: Any, role: str) -> list[Any]:
    """A prompt or completion: a text, or messages already."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def check_message(place: str, message: dict[str, Any]) -> dict[str, Any]:
    """Role and content of one message; content in text parts is joined."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InputError(f"{place} has role {role!r}: known roles are {', '.join(ROLES)}")
    if role == "assistant" and message.get("loss_weight") not in (None, 1):
        raise InputError(
            f"{place} has loss_weight {message['loss_weight']}: weights are not supported; remove the key or the row"
        )
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        other = [str(part.get("type")) for part in content if part.get("type") != "text"]
        if other:
            raise InputError(
                f"{place} ({role}) has a content part of type {other[0]}: only text parts are known; write it as text"
            )
        content = "".join(str(part.get("text", part.get("value", ""))) for part in content)
    if not isinstance(content, str) or not content.strip():
        seen = "null" if content is None else "empty" if isinstance(content, str) else f"a {type(content).__name__}"
        raise InputError(f"{place} ({role}) has content that is {seen}: give it text, or remove the row")
    if not content.isascii():
        try:
            content.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(
                f"{place} ({role}) has half of a surrogate pair (\\ud800 to \\udfff), which is no text: repair the row"
            ) from None
    return {**message, "content": content}
