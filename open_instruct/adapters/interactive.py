"""A chat at the terminal with a base model and its adapters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import TextStreamer

from open_instruct.adapters.answering import with_system
from open_instruct.adapters.folders import BASE
from open_instruct.adapters.generation import Sampling
from open_instruct.adapters.served import Served
from open_instruct.data.questions import prompt_ids

HELP = "/use NAME   /compare TEXT   /system TEXT   /reset   /quit"


def chat(served: Served, sampling: Sampling, system: str | None) -> None:
    """Talk to one adapter at a time, with history, or compare all of them on one question, until the input ends."""
    names = [BASE, *served.names]
    active = names[min(1, len(names) - 1)]
    history: list[dict[str, Any]] = []
    print(f"talking to {active} (of {', '.join(names)}); {HELP}")
    while True:
        try:
            line = input(f"{active}> ").strip()
        except EOFError:
            return
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
        elif command == "/compare":
            messages = with_system([*history, {"role": "user", "content": rest}], system)
            for name in names:
                print(f"{name}: {served.answers([messages], name, sampling)[0][0]}")
        elif command.startswith("/"):
            print(HELP)
        else:
            history.append({"role": "user", "content": line})
            prompt = prompt_ids(served.tokenizer, with_system(history, system))
            max_length = served.max_length(active)
            if max_length and len(prompt) >= max_length:
                print(f"the conversation has {len(prompt)} tokens, and the model takes at most {max_length}: /reset")
                history.pop()
                continue
            streamer = TextStreamer(served.tokenizer, skip_prompt=True, skip_special_tokens=True)
            single = replace(sampling, num_return_sequences=1)  # a streamer takes one answer
            ((_, answers),) = served.stream([prompt], active, single, streamer=streamer)
            history.append({"role": "assistant", "content": answers[0]})
