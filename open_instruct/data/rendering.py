"""Rows → conversations by named columns, templates and exemplars: what --columns, --template and --shots say.

Without --columns a row must have a known form, of one question and one answer; its question is then `prompt`. With
them, `answer=COLUMN` names the answer, `system=COLUMN` a system message, `prompt=COLUMN` the question, and any other
NAME=COLUMN gives a column another name, so that one template serves several data sets.

What is drawn for a row (its template, its exemplars) follows from the seed and the row's own values, whatever stands
before it: a row looks the same wherever it stands, in training and in every tool.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from open_instruct.data import duplicates, forms
from open_instruct.data.reading import Row
from open_instruct.data.templates import MissingField, Rendered, Template
from open_instruct.data.texts import kind_of, plain
from open_instruct.data.tools import TOOLS, has_calls, tools_in
from open_instruct.errors import InputError

PROMPT, ANSWER, SYSTEM = "prompt", "answer", "system"  # names that --columns gives a meaning
MAX_EXEMPLARS = 64  # rows from which exemplars are drawn: they stand in run.json
MOST_OF_THE_ROWS = 4  # a quarter of them: none of these is held out
OF_ANSWERS = (ANSWER, "completion", "output", "messages", "conversations")  # where rows of a known form have theirs

Messages = list[dict[str, Any]]


def value_text(value: Any) -> str:
    """Return a value as a text, which is the same before and after it has been written as JSON."""
    if isinstance(value, str):
        return value
    text = json.dumps(value, default=str)
    read = json.loads(text)
    return read if isinstance(read, str) else text


@dataclass(frozen=True)
class Exemplar:
    """A training row that may stand before others, with its answer."""

    values: Mapping[str, Any]  # of the fields, as texts and numbers of JSON
    answer: str

    def messages(self, question: str) -> Messages:
        """Return its turns."""
        return [
            {"role": "user", "content": Rendered(question, None)},
            {"role": "assistant", "content": Rendered(self.answer, None)},
        ]


@dataclass(frozen=True)
class Parts:
    """What a row says: the values for templates, and its system message and answer."""

    values: dict[str, Any]
    system: str
    answer: str | None


@dataclass(frozen=True)
class Rendering:
    """How rows become conversations.

    Args:
        columns: (name, column) pairs of --columns; empty: rows have a known form.
        templates: of the question; empty: it is `prompt`.
        all_templates: a row makes a conversation with each template; else with one that is drawn.
        num_shots: exemplars before each question.
        seed: of what is drawn.
        exemplars: rows from which they are drawn.
        messages_key: column of the messages, in rows of that form.
    """

    columns: tuple[tuple[str, str], ...] = ()
    templates: tuple[Template, ...] = ()
    all_templates: bool = False
    num_shots: int = 0
    seed: int = 42
    exemplars: tuple[Exemplar, ...] = ()
    messages_key: str = "messages"

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the values that a question is made of."""
        names = {name for template in self.templates for name in template.fields}
        return tuple(sorted(names)) or (PROMPT,)

    @property
    def is_drawn(self) -> bool:
        """Whether anything depends on the seed."""
        return bool(self.num_shots) or (len(self.templates) > 1 and not self.all_templates)

    @property
    def groups_rows(self) -> bool:
        """Whether some conversations must not be divided between training and held-out rows."""
        return self.all_templates or bool(self.num_shots)

    @property
    def key(self) -> str:
        """A hash of all on which the conversations depend, beside the rows."""
        record = {**self.record(), "seed": self.seed if self.is_drawn else None, "messages_key": self.messages_key}
        return "rendered " + hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """Return the entry of run.json, from which `from_record` makes the same rendering."""
        return {
            "columns": dict(self.columns),
            "templates": [asdict(template) for template in self.templates],
            "all_templates": self.all_templates,
            "shots": self.num_shots,
            "seed": self.seed,
            "exemplars": [asdict(exemplar) for exemplar in self.exemplars],
        }

    def describe(self) -> str:
        """Return in a few words what it does."""
        parts = [f"columns {' '.join(f'{name}={plain(column)}' for name, column in self.columns)}"] * bool(self.columns)
        if self.templates:
            number, text = len(self.templates), self.templates[0].shown
            how = "each with all" if self.all_templates else "each with one of them, drawn by seed"
            parts.append(f"template {text}" if number == 1 else f"{number} templates, {how}")
        if self.num_shots:
            parts.append(f"{self.num_shots} of {len(self.exemplars)} exemplars before each question")
        return "; ".join(parts)

    def conversations(self, source: str, row: dict[str, Any], answered: bool = True) -> list[Messages]:
        """Return the conversations of a row: one, or one for each template.

        Args:
            source: where the row stands, for errors.
            row: the row's columns.
            answered: whether an answer must be there, as in training.

        Raises:
            MissingField: there is no such column.
            InputError: the row can't be used.
        """
        if not self.templates and not self.num_shots:
            return [self.by_columns(source, row, answered)]
        parts = self.parts(source, row, answered)
        own = self.own_text(parts.values)
        generator = random.Random(duplicates.hash_of(duplicates.normalised(own), self.seed))
        templates: Sequence[Template | None] = self.templates or [None]
        if not self.all_templates:
            templates = [generator.choice(templates)]
        exemplars = self.drawn(own, generator)
        return [self.conversation(source, parts, own, exemplars, template) for template in templates]

    def by_columns(self, source: str, row: dict[str, Any], answered: bool) -> Messages:
        """Return a row's conversation by its columns alone; question and answer may be lists of messages."""
        values = self.named(source, row, answered)
        form = {"prompt": values[PROMPT], "completion": values.get(ANSWER)}
        if not answered and form["completion"] in (None, ""):
            del form["completion"]
        messages = forms.to_messages(source, form, answered=answered)
        system = forms.optional_text(source, values, SYSTEM)
        return [{"role": "system", "content": system}, *messages] if system.strip() else messages

    def conversation(
        self, source: str, parts: Parts, own: str, exemplars: Sequence[Exemplar], template: Template | None
    ) -> Messages:
        """Return a row's conversation with one template, checked."""
        messages: Messages = []
        if parts.system.strip():
            messages.append({"role": "system", "content": Rendered(parts.system, None)})
        for exemplar in exemplars:
            messages += exemplar.messages(self.question(f"an exemplar for {source}", exemplar.values, template))
        question = self.question(source, parts.values, template)
        messages.append({"role": "user", "content": Rendered(question, own)})
        if parts.answer is not None:
            messages.append({"role": "assistant", "content": parts.answer})
        return forms.to_messages(source, {"messages": messages}, answered=False)

    def question(self, source: str, values: Mapping[str, Any], template: Template | None) -> str:
        """Return the text of a question.

        Raises:
            MissingField: there is no value for a field.
            InputError: the template can't write one.
        """
        if template is None:
            value = values[PROMPT]
            if not isinstance(value, str):
                raise InputError(f"{source}: the question is {kind_of(value)}: give text")
            return value
        try:
            return template.render(values)
        except MissingField as error:
            there = plain(", ".join(values)) or "none"
            raise MissingField(
                f"{error}, and {source} has no such column (columns: {there}): name one of these, or give a column "
                "this name with --columns NAME=COLUMN"
            ) from None
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    def named(self, source: str, row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
        """Return the values of a row under the names of --columns.

        Raises:
            MissingField: a column is not there; that of the answer may be missing where none is needed.
        """
        values = {}
        for name, column in self.columns:
            if column not in row and (answered or name != ANSWER):
                there = plain(", ".join(row)) or "none"
                raise MissingField(
                    f"--columns {name}={column}: {source} has no column `{plain(column)}` (columns: {there}): "
                    "name one of these"
                )
            values[name] = row.get(column)
        return values

    def parts(self, source: str, row: dict[str, Any], answered: bool) -> Parts:
        """Return what a row says.

        Raises:
            MissingField: a column is not there.
            InputError: it has no answer where it must, or is a conversation of several questions.
        """
        if self.columns:
            values, columns = self.named(source, row, answered), dict(self.columns)
            answer = forms.optional_text(source, values, ANSWER) or None
            if answered and answer is None:
                raise InputError(f"{source}: no answer in `{plain(columns.get(ANSWER, ANSWER))}`: remove the row")
            system = forms.optional_text(source, values, SYSTEM)
            hidden = (ANSWER, columns.get(ANSWER), SYSTEM)
            return Parts({k: v for k, v in {**row, **values}.items() if k not in hidden}, system, answer)
        messages = forms.to_messages(source, row, self.messages_key, answered)
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        turns = messages[1:] if system else messages
        if [turn["role"] for turn in turns] not in (["user"], ["user", "assistant"]):
            raise InputError(
                f"{source}: its turns are {', '.join(turn['role'] for turn in turns)[:80]}: templates and exemplars "
                "are for rows of one question and one answer"
            )
        if any(map(has_calls, turns)):
            raise InputError(f"{source}: its answer calls tools: templates and exemplars are for answers of text alone")
        others = {name: value for name, value in row.items() if name not in (*OF_ANSWERS, self.messages_key)}
        answer = turns[1]["content"] if len(turns) == 2 else None
        return Parts({**others, PROMPT: turns[0]["content"]}, system, answer)

    def own_text(self, values: Mapping[str, Any]) -> str:
        """Return what tells a row from others: the values of its fields."""
        own = [values[name] for name in self.fields if name in values]
        return duplicates.BETWEEN.join(value_text(value) for value in own)

    def drawn(self, own: str, generator: random.Random) -> list[Exemplar]:
        """Return the exemplars of a row: never one whose values are the row's, but for case and punctuation."""
        if not self.num_shots:
            return []
        row_key = duplicates.normalised(own)
        others = [exemplar for exemplar, key in zip(self.exemplars, self.exemplar_keys, strict=True) if key != row_key]
        return generator.sample(others, self.num_shots)

    @cached_property
    def exemplar_keys(self) -> list[bytes]:
        """What the exemplars are compared with rows by."""
        return [duplicates.normalised(self.own_text(exemplar.values)) for exemplar in self.exemplars]

    def with_exemplars(self, rows: Iterable[Row], what: str) -> Rendering:
        """Return the same with exemplars from rows, which are drawn by their hashes: their order changes nothing.

        Args:
            rows: those from which they are taken. Rows that can't be used, or offer tools, are left out.
            what: the rows, for errors.

        Raises:
            MissingField: no row has the columns.
            InputError: there are too few rows.
        """
        kept: dict[int, Exemplar] = {}
        smallest: list[int] = []  # a heap of negated hashes: the largest of them comes first
        first_error, num_rows = None, 0
        for source, row in rows:
            try:
                parts = self.parts(source, row, True)
                if TOOLS not in self.fields and tools_in(source, row):
                    raise InputError(f"{source}: it offers tools, which no other row's text would describe")
                for template in self.templates or [None]:
                    self.question(source, parts.values, template)
            except InputError as error:
                first_error = first_error or error
                if not num_rows and isinstance(error, MissingField):
                    raise
                continue
            num_rows += 1
            number = duplicates.hash_of(duplicates.normalised(self.own_text(parts.values)), self.seed)
            if number in kept or (len(smallest) == MAX_EXEMPLARS and number > -smallest[0]):
                continue
            values = {name: parts.values[name] for name in self.fields if name in parts.values}
            plain_values = json.loads(json.dumps(values, default=str))  # as run.json gives them back
            kept[number] = Exemplar(plain_values, str(parts.answer))
            heapq.heappush(smallest, -number)
            if len(smallest) > MAX_EXEMPLARS:
                del kept[-heapq.heappop(smallest)]
        if not kept and first_error:
            raise first_error
        number = max(self.num_shots + 1, min(len(kept), num_rows // MOST_OF_THE_ROWS))
        chosen = [kept[value] for value in sorted(kept)[:number]]
        if len(chosen) <= self.num_shots:
            raise InputError(
                f"--shots {self.num_shots} needs {self.num_shots + 1} different rows with answers, as none is its own "
                f"exemplar: {what} has {len(chosen)}"
            )
        return replace(self, exemplars=tuple(chosen))

    def exemplar_hashes(self) -> list[int]:
        """Return the hashes of the exemplars' rows, as tokenised rows have them."""
        hashes = []
        for exemplar in self.exemplars:
            question = Rendered("", self.own_text(exemplar.values))
            answer = {"role": "assistant", "content": exemplar.answer}
            hashes.append(duplicates.hashes_of([{"role": "user", "content": question}, answer])[0])
        return hashes
