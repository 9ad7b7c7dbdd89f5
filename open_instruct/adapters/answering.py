"""A file of questions answered by adapters: one JSON line for each question, which a killed run can continue."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from open_instruct.adapters.folders import BASE
from open_instruct.adapters.generation import Sampling
from open_instruct.adapters.served import Served
from open_instruct.data.context import Context
from open_instruct.data.questions import Question, prompt_ids, with_system
from open_instruct.data.sources import Conversation
from open_instruct.data.tools import TOOLS
from open_instruct.errors import InputError, input_faults
from open_instruct.files import check_path, write_json
from open_instruct.locks import LOCK, locked


def locked_output(path: Path) -> AbstractContextManager[None]:
    """Lock an output file against other processes that would answer into it; see `locks.locked`.

    Raises:
        InputError: no file can be written under its name.
    """
    what = f"--output_file {path}"
    if os.path.lexists(path) and not path.is_file():
        raise InputError(f"{what} is no file: name another")
    check_path(path.parent, what)
    return locked(path.with_name(f".{path.name}{LOCK}"), what)


def prepare_output(path: Path, settings: dict[str, Any], resume: bool) -> int:
    """Start an output file, or return how many answers a former run left in it.

    The settings are kept beside the file, so that a later run can compare its own with them.

    Args:
        path: the output file.
        settings: all on which the answers depend, as JSON.
        resume: continue an existing file.

    Raises:
        InputError: a file exists and `resume` is not set, or it was made with other settings.
    """
    record = path.with_name(f"{path.name}.run.json")
    if not path.exists() or not path.stat().st_size:
        if os.path.lexists(record) and settings.keys() - recorded_settings(record).keys():
            raise InputError(f"--output_file {path} needs the file {record}, which is not of such a run: name another")
        write_json(record, settings)
        path.touch()
        return 0
    if not resume:
        raise InputError(f"--output_file {path} exists: name another, or pass --resume to continue it")
    before = recorded_settings(record)
    different = [
        f"{name} was {before.get(name)!r} and is now {value!r}"
        for name, value in settings.items()
        if before.get(name) != value
    ]
    if different:
        raise InputError(
            f"--output_file {path} was made with other settings ({'; '.join(different)}): "
            "give the same, or name another file"
        )
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    os.truncate(path, len(complete))  # a kill may have left half a line
    return complete.count(b"\n")


def recorded_settings(record: Path) -> dict[str, Any]:
    """Return the settings of the run that made an output file; empty where there are none."""
    if not record.is_file():
        return {}
    with input_faults(f"{record}", "name another --output_file"):
        content = json.loads(record.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def answer_file(
    served: Served,
    questions: Sequence[Question],
    path: Path,
    num_done: int,
    sampling: Sampling,
    batch_size: int,
    system: str | None,
    combine: str | None,
    context: Context | None = None,
    as_conversations: bool = False,
) -> int:
    """Write one line for each question, in their order, a few batches at a time.

    Args:
        served: base and adapters.
        questions: all of them, those included that have an answer already.
        path: the output file, which holds `num_done` lines.
        num_done: number of questions that have an answer already.
        sampling: how answers are drawn.
        batch_size: most answers computed at once.
        system: system message of conversations that have none; None: leave them so.
        combine: "vote", "concatenate", or None.
        context: stands before each conversation.
        as_conversations: write the answer as the conversation's last turn, in the form that training reads; for one
            model and one answer.

    Returns:
        How many questions have no answer because they fill the model's context.
    """
    names = served.names or [BASE]
    # What is written at once: a kill loses no more. vLLM forms its batches itself, and fills them better from many.
    size = (64 if served.engine else 4) * batch_size
    max_length = served.max_length(*names)
    num_unanswered = 0
    with (
        path.open("a", encoding="utf-8") as file,
        tqdm(total=len(questions), initial=num_done, unit="question", disable=None) as bar,
    ):
        for start in range(num_done, len(questions), size):
            block = questions[start : start + size]
            prompts = [prompt_ids(served.tokenizer, with_system(question.messages, system)) for question in block]
            if context:
                prompts = [context.before(prompt)[0] for prompt in prompts]
            num_unanswered += sum(len(prompt) >= max_length for prompt in prompts) if max_length else 0
            answers: dict[str, list[list[str]]] = {}
            for name in names:
                answers[name] = [texts for _, texts in sorted(served.stream(prompts, name, sampling, batch_size))]
            for i, question in enumerate(block):
                by_adapter = {name: answers[name][i] for name in names}
                if as_conversations:
                    turn = {"role": "assistant", "content": by_adapter[names[0]][0]}
                    conversation = {
                        "number": start + i,
                        "messages": [*question.messages, turn],
                        **tools_entry(question),
                    }
                    file.write(json.dumps(conversation, ensure_ascii=False) + "\n")
                    continue
                row: dict[str, Any] = {"number": start + i, "messages": question.messages, "answers": by_adapter}
                if combine:
                    row[combine] = combined(combine, by_adapter)
                if question.reference is not None:
                    row["reference"] = question.reference
                row |= tools_entry(question)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(block))
    return num_unanswered


def answer_one(
    served: Served, question: str, sampling: Sampling, system: str | None, context: Context | None = None
) -> str:
    """Return the answer of the adapter, or of the base where there is none, to one question.

    Raises:
        InputError: the question fills the model's context, or the chat template refuses it.
    """
    name = (served.names or [BASE])[0]
    prompt = prompt_ids(served.tokenizer, with_system(Conversation([{"role": "user", "content": question}]), system))
    if context:
        prompt = context.before(prompt)[0]
    max_length = served.max_length(name)
    if max_length and len(prompt) >= max_length:
        raise InputError(
            f"the question has {len(prompt):,} tokens, and the model takes at most {max_length:,}: shorten it"
        )
    ((_, (answer,)),) = served.stream([prompt], name, sampling)
    return answer


def combined(how: str, answers: dict[str, list[str]]) -> str:
    """Return one answer made of all adapters' answers.

    Args:
        how: "vote": the most frequent one, the earliest of equals; "concatenate": all, one after another.
        answers: the answers of each adapter.
    """
    texts = [text for adapter_answers in answers.values() for text in adapter_answers]
    return Counter(texts).most_common(1)[0][0] if how == "vote" else "\n".join(texts)


def tools_entry(question: Question) -> dict[str, Any]:
    """Return the entry of a line that holds the tools of a question's row, if it has some."""
    return {TOOLS: list(question.messages.tools)} if question.messages.tools else {}
