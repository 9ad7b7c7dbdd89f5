"""Files of answers that exist already → questions with every model's answers and the references.

A row has a question (a conversation in any form that training reads, or the text `question`) or an `id`, mostly both;
`answers`, which is {NAME: [texts]}, {NAME: text}, [texts] or a text; and `reference` or `references`, a text or a list.
`generate_peft.py --output_file` writes such rows. docs/answers.md has the whole form.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from open_instruct.adapters.named_files import named_file
from open_instruct.data import forms, reading
from open_instruct.data.bad_rows import BadRows, note
from open_instruct.data.texts import kind_of, plain, shown
from open_instruct.errors import InputError, warn

COMBINED = ("vote", "concatenate")  # columns in which generate_peft.py --combine writes one answer of all models
UNNAMED = ""  # model of a row's answers that have no name
NAMED = 3  # questions that a message names


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question with the answers of models to it.

    Args:
        source: file and line of the row, for errors.
        id: what tells the question from others, or None.
        messages: the conversation up to the turn that is to be answered; empty where the row has none.
        answers: of each model one or more texts; empty where the row has none.
        references: right answers; empty where the row has none.
    """

    source: str
    id: str | None
    messages: tuple[dict[str, Any], ...]
    answers: Mapping[str, tuple[str, ...]]
    references: tuple[str, ...]

    @property
    def text(self) -> str:
        """Return the last message, or else the id, for tables."""
        return str(self.messages[-1]["content"]) if self.messages else f"id {self.id}"

    @property
    def key(self) -> str:
        """Return the conversation as one text, which is the same wherever the question stands."""
        return json.dumps([[message["role"], message["content"]] for message in self.messages], ensure_ascii=False)


def read_answers(words: Sequence[str], file: str | None = None, bad_rows: str = "error") -> list[AnsweredQuestion]:
    """Return the questions of answer files with all models' answers, in the first file's order.

    Args:
        words: the files, each as FILE or NAME=FILE; the name is that of answers without one.
        file: questions with references, for rows that have none.
        bad_rows: "error", or "skip": leave out rows that can't be used, and questions that a file lacks.

    Raises:
        InputError: a row can't be used, the files hold different questions, or a name is used twice.
    """
    files = [answer_rows(*named_file(word), bad_rows) for word in words]
    rows = files[0]
    for word, more in zip(words[1:], files[1:], strict=True):
        same = next((name for name in rows[0].answers if name in more[0].answers), None)
        if same is not None:
            raise InputError(f"two files have answers of {same!r}: give names, --answers NAME={named_file(word)[1]}")
        pairs = joined(rows, more, named_file(words[0])[1], named_file(word)[1], bad_rows)
        rows = [
            replace(a, answers={**a.answers, **b.answers}, references=a.references or b.references) for a, b in pairs
        ]
    if file:
        if all(row.references for row in rows):
            raise InputError(f"--file {file} has no effect: every row of --answers has a reference; drop it")
        pairs = joined(rows, reference_rows(file, bad_rows), named_file(words[0])[1], file, bad_rows)
        rows = [replace(a, references=a.references or b.references) for a, b in pairs]
    return rows


def answer_rows(name: str | None, file: str, bad_rows: str) -> list[AnsweredQuestion]:
    """Return the rows of one answer file; each has answers of the same models.

    Raises:
        InputError: as `read_answers`.
    """
    rows, bad = usable_rows(file, True, bad_rows)
    models = list(dict.fromkeys(model for row in rows for model in row.answers))
    if name is not None and len(models) > 1:
        names = {model: f"{name}/{model}" if model else name for model in models}
    else:
        names = {model: model if name is None else name for model in models}
    if UNNAMED in models and name is None:
        names[UNNAMED] = Path(file).name.split(".")[0] or "answers"
    for model in names.values():
        check_name(model, file)
    if len(set(names.values())) < len(names):
        raise InputError(f"{file}: rows without names and rows of a model {names[UNNAMED]!r}: name the answers of all")
    whole = []
    for row in rows:
        missing = next((names[model] for model in models if model not in row.answers), None)
        if missing is None:
            whole.append(replace(row, answers={names[model]: row.answers[model] for model in models}))
        else:
            bad.reject(InputError(f"{row.source}: no answer of {missing}, which answers other questions: add it"))
    check_bad(bad)
    return whole


def reference_rows(file: str, bad_rows: str) -> list[AnsweredQuestion]:
    """Return the questions of a file with their references.

    Raises:
        InputError: as `read_answers`.
    """
    rows, bad = usable_rows(file, False, bad_rows)
    check_bad(bad)
    return rows


def usable_rows(file: str, answered: bool, bad_rows: str) -> tuple[list[AnsweredQuestion], BadRows]:
    """Return the rows of a file that can be used, and the collector of the others.

    Raises:
        InputError: there is no row, or the file can't be read.
    """
    bad = BadRows(bad_rows == "skip")
    rows, first = [], dict[str, str]()
    for source, row in reading.read_files(reading.files_of(file), bad):
        try:
            made = parse_row(source, row, answered)
            if made.id is not None and first.setdefault(made.id, source) != source:
                raise InputError(
                    f"{source}: id {plain(made.id)} stands at {first[made.id]} already: put all answers to a question "
                    "into one row, as a list"
                )
        except InputError as error:
            note(bad, error)
            continue
        bad.keep()
        rows.append(made)
    if not rows:
        bad.check()
        raise InputError(f"{file} holds no row: name another file")
    return rows, bad


def check_bad(bad: BadRows) -> None:
    """Raise the error of rows that can't be used, or warn of those that are left out."""
    bad.check()
    if bad.num_bad:
        warn(bad.summary())


def parse_row(source: str, row: dict[str, Any], answered: bool) -> AnsweredQuestion:
    """Return one row's question, answers and references.

    Args:
        source: where the row stands, for errors.
        row: the row's columns.
        answered: it is a row of --answers; else of --file, where `answer` and `answers` are references, too.

    Raises:
        InputError: a column has none of the known forms, or the row has no question, no answer or no reference.
    """
    number = row.get("id")
    if isinstance(number, bool) or not isinstance(number, (str, int, type(None))) or number == "":
        raise InputError(f"{source}: `id` is {kind_of(number)}: give it a text or a whole number")
    messages, turn = question_and_turn(source, row)
    if not messages and number is None:
        columns = plain(", ".join(row)) or "none"
        raise InputError(
            f"{source}: no question (`messages`, `prompt`, `question` …) and no `id` (columns: {columns}): add one"
        )
    references = texts(source, row, ("reference", "references"))
    given: dict[str, tuple[str, ...]] = {}
    if answered:
        given = answers_of(source, row)
        if not given and turn is not None:
            given, turn = {UNNAMED: (turn,)}, None
        if not given:
            columns = plain(", ".join(row))
            raise InputError(f"{source}: no `answers` and no assistant's turn at the end (columns: {columns}): add one")
    elif not references and turn is None:
        references = texts(source, row, ("answer", "answers"))
    if not references and turn is not None:
        references = (turn,)
    if not answered and not references:
        raise InputError(f"{source}: no reference: add `reference` or `references`, or end with the assistant's turn")
    blank = next((text for text in references if not text.strip()), None)
    if blank is not None:
        raise InputError(f"{source}: an empty reference: there is nothing to compare with; give it text")
    return AnsweredQuestion(source, None if number is None else str(number), tuple(messages), given, references)


def question_and_turn(source: str, row: dict[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """Return the conversation up to the assistant's last turn, if the row has one, and that turn, if it ends with it.

    Raises:
        InputError: it has content that is no text.
    """
    known = ("messages", "conversations", "prompt", "instruction")
    if any(row.get(name) is not None for name in known):
        messages = forms.to_messages(source, row, answered=False)
    elif row.get("question") is not None:
        messages = [forms.check_message(f"{source}: question", {"role": "user", "content": row["question"]})]
    else:
        return [], None
    if messages[-1]["role"] == "assistant":
        return messages[:-1], str(messages[-1]["content"] or "")
    return messages, None


def answers_of(source: str, row: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the answers of each model; empty where the row has none.

    Raises:
        InputError: they have none of the known forms.
    """
    if not isinstance(row.get("answers"), dict):
        given = texts(source, row, ("answers", "answer"))
        return {UNNAMED: given} if given else {}
    if row.get("answer") is not None:
        raise InputError(f"{source}: `answers` and `answer`: drop one")
    by_name = {
        str(name): as_texts(f"{source}: `answers` of {shown(name)}", value) for name, value in row["answers"].items()
    }
    if not by_name:
        raise InputError(f"{source}: `answers` is an empty object: give it NAME and texts")
    for column in COMBINED:
        if isinstance(row.get(column), str) and column not in by_name:
            by_name[column] = (row[column],)
    return by_name


def texts(source: str, row: dict[str, Any], names: tuple[str, str]) -> tuple[str, ...]:
    """Return the text or texts of one of two columns; empty where the row has neither.

    Raises:
        InputError: it has both, or other values than texts.
    """
    found = [name for name in names if row.get(name) is not None]
    if len(found) == 2:
        raise InputError(f"{source}: `{names[0]}` and `{names[1]}`: drop one")
    return as_texts(f"{source}: `{found[0]}`", row[found[0]]) if found else ()


def as_texts(what: str, value: Any) -> tuple[str, ...]:
    """Return a text, or a list of texts that is not empty, as a tuple.

    Raises:
        InputError: it is something else. A number is not converted: 1.0 and 1 could be meant otherwise.
    """
    listed = value if isinstance(value, list) else [value]
    wrong = next((item for item in listed if not isinstance(item, str)), None)
    if not listed or any(not isinstance(item, str) for item in listed):
        found = "an empty list" if not listed else kind_of(wrong)
        raise InputError(f"{what} is or holds {found}: give a text, or a list of texts")
    return tuple(listed)


def check_name(name: str, file: str) -> None:
    """Refuse a model's name that does not fit into a table.

    Raises:
        InputError: it is empty, long, or has characters that don't fit.
    """
    if not name.strip() or not name.isprintable() or "|" in name or len(name) > 60:
        raise InputError(
            f"{file}: a model is named {shown(name)}: a name has 1 to 60 characters, no line break and no |"
        )


def joined(
    rows: Sequence[AnsweredQuestion], others: Sequence[AnsweredQuestion], file: str, other_file: str, bad_rows: str
) -> list[tuple[AnsweredQuestion, AnsweredQuestion]]:
    """Return pairs of rows of two files that have the same question, in the first file's order.

    The question is compared by `id` if all rows of both files have one, else by conversation. Of equal conversations,
    the first of one file belongs to the first of the other.

    Args:
        rows: of the first file.
        others: of the second file.
        file: name of the first file, for errors.
        other_file: name of the second file.
        bad_rows: "error", or "skip": leave out rows without a partner.

    Raises:
        InputError: rows can't be compared, a row has no partner, or none has one.
    """
    everything = [*rows, *others]
    by_id = all(row.id is not None for row in everything)
    if not by_id and not all(row.messages for row in everything):
        raise InputError(
            f"{file} and {other_file} have no question in every row, and no `id` in every row: add one of them to both"
        )
    waiting: dict[str | None, deque[AnsweredQuestion]] = defaultdict(deque)
    for other in others:
        waiting[other.id if by_id else other.key].append(other)
    pairs, alone = [], []
    for row in rows:
        partners = waiting[row.id if by_id else row.key]
        if partners:
            pairs.append((row, partners.popleft()))
        else:
            alone.append(row)
    left = {id(other) for partners in waiting.values() for other in partners}
    parts = [
        f"{len(only):,} of {len(total):,} only in {name} ({first_few(only, by_id)})"
        for only, total, name in (
            (alone, rows, file),
            ([other for other in others if id(other) in left], others, other_file),
        )
        if only
    ]
    if parts:
        what = f"{file} and {other_file} don't hold the same questions: {'; '.join(parts)}"
        if bad_rows != "skip" or not pairs:
            remedy = ", or pass --bad_rows skip to leave these out" if pairs else ""
            raise InputError(f"{what}: give files that belong together{remedy}")
        warn(f"{what}: left out, as --bad_rows skip says")
    return pairs


def first_few(rows: Sequence[AnsweredQuestion], by_id: bool) -> str:
    """Return source and question of the first few rows."""
    first = [
        f"{row.source} {f'id {plain(row.id or str())}' if by_id else shown(row.text[:60])}" for row in rows[:NAMED]
    ]
    return "; ".join(first) + ("; …" if len(rows) > NAMED else "")
