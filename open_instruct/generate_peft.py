r"""Answers of a base model and of adapters on it: a chat, or a file of questions.

    python open_instruct/generate_peft.py --adapter output/run                                        # chat
    python open_instruct/generate_peft.py --adapter a=output/a --adapter b=output/b \
        --input_file questions.jsonl --output_file answers.jsonl --batch_size 64                      # file

A file may have any form that training reads; an answer that a row has is kept as its reference. With several adapters each answers, and
--combine vote or concatenate makes one of their answers. What a question gets does not depend on the questions beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TextStreamer

import open_instruct.quiet  # noqa: F401 - before the libraries that it silences
from open_instruct.adapters.folders import BASE
from open_instruct.adapters.generation import Sampling
from open_instruct.adapters.served import Served, load
from open_instruct.command_line import OneLineArgumentParser, add_model_flags, at_least
from open_instruct.data import questions, reading
from open_instruct.data.questions import Question
from open_instruct.errors import InputError, exit_code
from open_instruct.files import write_json

HELP = "/use NAME   /compare TEXT   /system TEXT   /reset   /quit"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit code 0: done; 2: wrong input, said in one line; 130: interrupted."""
    a = parse(argv)
    return exit_code(lambda: run(a), "interrupted: finished answers are kept, --resume goes on")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = OneLineArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser, dtype="auto")
    parser.add_argument("--chat_template_name", help="as in finetune_peft.py; unset: the adapter's own")
    parser.add_argument("--input_file", metavar="FILE", help="questions; without it, a chat starts")
    parser.add_argument("--output_file", metavar="FILE", help="JSON Lines of answers")
    parser.add_argument("--resume", action="store_true", help="go on with an output file that was not finished")
    parser.add_argument(
        "--batch_size", type=at_least(1), default=32, help="answers computed at once at most (default: 32)"
    )
    parser.add_argument(
        "--combine",
        choices=["vote", "concatenate"],
        help="one answer from all adapters' answers: the most frequent, or all",
    )
    parser.add_argument("--system", help="system message before every conversation")
    group = parser.add_argument_group("sampling, as in transformers")
    group.add_argument(
        "--max_new_tokens", type=at_least(1), default=256, help="tokens of an answer at most (default: 256)"
    )
    group.add_argument("--do_sample", action="store_true", help="draw, instead of taking the likeliest token")
    group.add_argument("--temperature", type=float, default=1.0, help="scores are divided by it (default: 1.0)")
    group.add_argument(
        "--top_p", type=float, default=1.0, help="share of the probability that is drawn from (default: 1.0)"
    )
    group.add_argument("--top_k", type=at_least(0), default=0, help="tokens that are drawn from; 0: all (default: 0)")
    group.add_argument(
        "--repetition_penalty",
        type=float,
        default=1.0,
        help="above 1: repeated tokens become less likely (default: 1.0)",
    )
    group.add_argument(
        "--num_return_sequences",
        type=at_least(1),
        default=1,
        help="answers of each adapter to each question (default: 1)",
    )
    group.add_argument("--seed", type=int, default=42, help="of the draws (default: 42)")
    a = parser.parse_args(argv)
    drawing = a.temperature != 1.0 or a.top_p != 1.0 or a.top_k or a.num_return_sequences > 1
    checks = [
        (
            drawing and not a.do_sample,
            "--temperature, --top_p, --top_k and --num_return_sequences need --do_sample: greedy answers are all alike",
        ),
        (not a.temperature > 0, f"--temperature {a.temperature} must be above 0: drop --do_sample for greedy answers"),
        (not 0 < a.top_p <= 1, f"--top_p {a.top_p} must be above 0 and at most 1"),
        (not a.repetition_penalty > 0, f"--repetition_penalty {a.repetition_penalty} must be above 0; 1 is none"),
        (
            bool(a.input_file) != bool(a.output_file),
            "--input_file and --output_file go together: give both, or none for a chat",
        ),
        (
            not a.input_file and (a.combine or a.resume),
            "--combine and --resume belong to --input_file: drop them for a chat",
        ),
    ]
    problems = [text for wrong, text in checks if wrong]
    if problems:
        parser.error("; ".join(problems))
    return a


def run(a: argparse.Namespace) -> None:
    """Chat, or answer a file."""
    sampling = Sampling(**{field.name: getattr(a, field.name) for field in fields(Sampling)})
    asked, done = [], 0
    if a.input_file:
        asked = list(questions.questions(reading.read_files(reading.files_of(a.input_file))))
        done = prepare_output(a, sampling, asked)
    served = load(
        a.adapter, a.model_name_or_path, a.dtype, a.any_base, a.trust_remote_code, a.chat_template_name, a.allow_pickle
    )
    if a.input_file:
        answer_file(served, asked, done, a, sampling)
    else:
        chat(served, sampling, a.system)


def prepare_output(a: argparse.Namespace, sampling: Sampling, asked: Sequence[Question]) -> int:
    """Start an output file, or find how many answers a former run left in it. What it was asked stands beside it.

    Raises:
        InputError: a file exists and --resume is not given, or it was made with other settings.
    """
    path = Path(a.output_file)
    settings = {
        "adapter": a.adapter or [],
        "model_name_or_path": a.model_name_or_path,
        "input_file": str(a.input_file),
        "questions": hashlib.sha256(json.dumps([question.messages for question in asked]).encode()).hexdigest(),
        "chat_template_name": a.chat_template_name,
        "dtype": a.dtype,
        "system": a.system,
        "combine": a.combine,
        **asdict(sampling),
    }
    record = path.with_name(f"{path.name}.run.json")
    if not path.exists() or not path.stat().st_size:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, settings)
        path.touch()
        return 0
    if not a.resume:
        raise InputError(f"--output_file {path} exists: name another, or pass --resume to go on with it")
    before = json.loads(record.read_text()) if record.exists() else {}
    different = [
        f"{name} was {before.get(name)!r} and is now {value!r}"
        for name, value in settings.items()
        if before.get(name) != value
    ]
    if different:
        raise InputError(
            f"--output_file {path} was made with other settings ({'; '.join(different)}): give the same, or name another file"
        )
    whole = path.read_bytes().rpartition(b"\n")
    os.truncate(path, len(whole[0]) + len(whole[1]))  # a kill may have left half a line
    return whole[0].count(b"\n") + (1 if whole[1] else 0)


def answer_file(
    served: Served, asked: Sequence[Question], done: int, a: argparse.Namespace, sampling: Sampling
) -> None:
    """Write one line for each question, in their order, a few batches at a time."""
    names = served.names or [BASE]
    size = 4 * a.batch_size
    room = min((room for room in map(served.room, names) if room), default=None)
    unanswered = 0
    with (
        Path(a.output_file).open("a", encoding="utf-8") as file,
        tqdm(total=len(asked), initial=done, unit="question", disable=None) as bar,
    ):
        for start in range(done, len(asked), size):
            chosen = asked[start : start + size]
            prompts = [
                questions.prompt_ids(served.tokenizer, with_system(question.messages, a.system)) for question in chosen
            ]
            unanswered += sum(len(prompt) >= room for prompt in prompts) if room else 0
            answers: dict[str, list[list[str]]] = {}
            for name in names:
                answers[name] = [found for _, found in sorted(served.stream(prompts, name, sampling, a.batch_size))]
            for number, question in enumerate(chosen):
                given = {name: answers[name][number] for name in names}
                row: dict[str, Any] = {"number": start + number, "messages": question.messages, "answers": given}
                if a.combine:
                    row[a.combine] = combined(a.combine, given)
                if question.reference is not None:
                    row["reference"] = question.reference
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(chosen))
    without = f"; {unanswered} fill the context and have no answer" if unanswered else ""
    print(f"{len(asked)} questions answered by {', '.join(names)}: {a.output_file}{without}")


def combined(how: str, given: dict[str, list[str]]) -> str:
    """One answer of many: the most frequent (the earliest of equals), or all, one after another."""
    answers = [answer for found in given.values() for answer in found]
    return Counter(answers).most_common(1)[0][0] if how == "vote" else "\n".join(answers)


def with_system(messages: list[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    """A conversation with a system message, unless it has one."""
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def chat(served: Served, sampling: Sampling, system: str | None) -> None:
    """Talk to one adapter at a time, with history; or compare all on one question."""
    names = [BASE, *served.names]
    active = names[min(1, len(names) - 1)]
    history: list[dict[str, Any]] = []
    print(f"talking to {active} (of {', '.join(names)}); {HELP}")
    while True:
        try:
            line = input(f"{active}> ").strip()
        except EOFError:
            return
        word, _, rest = line.partition(" ")
        if not line:
            continue
        if word == "/quit":
            return
        if word == "/use" and rest in names:
            active = rest
        elif word == "/use":
            print(f"no adapter {rest!r}: there are {', '.join(names)}")
        elif word == "/system":
            system = rest or None
        elif word == "/reset":
            history = []
        elif word == "/compare":
            messages = with_system([*history, {"role": "user", "content": rest}], system)
            for name in names:
                print(f"{name}: {served.answers([messages], name, sampling)[0][0]}")
        elif word.startswith("/"):
            print(HELP)
        else:
            history.append({"role": "user", "content": line})
            prompt = questions.prompt_ids(served.tokenizer, with_system(history, system))
            room = served.room(active)
            if room and len(prompt) >= room:
                print(f"the conversation has {len(prompt)} tokens, and there is room for {room}: /reset")
                history.pop()
                continue
            single = Sampling(**{**asdict(sampling), "num_return_sequences": 1})
            streamer = TextStreamer(served.tokenizer, skip_prompt=True, skip_special_tokens=True)
            ((_, found),) = served.stream([prompt], active, single, streamer=streamer)
            history.append({"role": "assistant", "content": found[0]})


if __name__ == "__main__":
    sys.exit(main())
