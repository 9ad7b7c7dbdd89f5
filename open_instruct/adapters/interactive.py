"""A chat at the terminal with a base model and its adapters."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from transformers import TextStreamer

from open_instruct.adapters.folders import BASE
from open_instruct.adapters.generation import Sampling
from open_instruct.adapters.served import Served
from open_instruct.data.questions import prompt_ids, with_system
from open_instruct.errors import InputError, Terminated, one_line, visible

HELP = "/use NAME   /compare TEXT   /system TEXT   /reset   /quit"


class VisibleStreamer(TextStreamer):
    """Prints an answer as it comes, with its control characters as escapes: a model can write any."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print the next piece."""
        super().on_finalized_text(visible(text), stream_end)


def read_line(prompt: str) -> str | None:
    """Return a line of the user; None at the input's end. What can't be a text is said, and asked for again."""
    while True:
        try:
            line = input(prompt).strip()
            line.encode()
            return line
        except EOFError:
            return None
        except UnicodeError as error:
            print(f"this line is not UTF-8 ({one_line(error)}): write it again")


def chat(served: Served, sampling: Sampling, system: str | None) -> None:
    """Talk to one adapter at a time, with history, or compare all of them on one question, until the input ends."""
    names = [BASE, *served.names]
    active = names[min(1, len(names) - 1)]
    history: list[dict[str, Any]] = []
    print(f"talking to {active} (of {', '.join(names)}); {HELP}")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # one bad line is then one line, not the end of the input
    while (line := read_line(f"{active}> ")) is not None:
        command, _, rest = line.partition(" ")
        if not line:
            continue
        if command == "/quit":
            return
        if command == "/use" and rest in names:
            active = rest
        elif command == "/use":
            print(f"no adapter {rest!r}: there are {', '.join(names)}")
        elif command == "/system":
            system = rest or None
        elif command == "/reset":
            history = []
        elif command == "/compare" and rest:
            messages = with_system([*history, {"role": "user", "content": rest}], system)
            for name in names:
                with going_on():
                    print(f"{name}: {visible(served.answers([messages], name, sampling)[0][0])}")
        elif command.startswith("/"):
            print(HELP)
        else:
            with going_on():
                turns = [*history, {"role": "user", "content": line}]
                answer = answer_turn(served, active, with_system(turns, system), sampling)
                history = [*turns, {"role": "assistant", "content": answer}]


@contextmanager
def going_on() -> Iterator[None]:
    """Say what went wrong with one answer, or that Ctrl-C stopped it, and let the chat go on."""
    try:
        yield
    except Terminated:
        raise
    except KeyboardInterrupt:
        print("\n(stopped)")
    except InputError as error:
        print(one_line(error))


def answer_turn(served: Served, name: str, messages: Sequence[dict[str, Any]], sampling: Sampling) -> str:
    """Answer a conversation, and print the answer as it comes.

    Raises:
        InputError: the conversation fills the model's context, or the chat template refuses it.
    """
    prompt = prompt_ids(served.tokenizer, messages)
    max_length = served.max_length(name)
    if max_length and len(prompt) >= max_length:
        raise InputError(f"the conversation has {len(prompt)} tokens, and the model takes at most {max_length}: /reset")
    streamer = VisibleStreamer(served.tokenizer, skip_prompt=True, skip_special_tokens=True)
    single = replace(sampling, num_return_sequences=1)  # a streamer takes one answer
    ((_, answers),) = served.stream([prompt], name, single, streamer=streamer)
    return answers[0]
