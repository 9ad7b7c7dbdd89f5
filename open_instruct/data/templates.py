"""Templates of questions: texts with fields, which the columns of a row fill.

A file whose name ends in .jinja, .jinja2 or .j2 holds Jinja; any other holds plain text with fields as `{dialogue}`.
Several templates in one file are separated by lines that hold nothing but `---`. A template is text and nothing else:
Jinja runs in its immutable sandbox, with limits on time and memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_instruct.data.texts import kind_of, plain
from open_instruct.errors import InputError, input_faults
from open_instruct.limits import evaluating_input
from open_instruct.small_files import read_text

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

SUFFIXES = (".jinja", ".jinja2", ".j2")
SEPARATOR = re.compile(r"^---[ \t]*$", re.MULTILINE)
FIELD = re.compile(r"\{([^\W\d][\w-]*)\}")  # other braces stay, so that JSON can be written as it is
REMEDY = "mend the template"


class Rendered(str):
    """A message's text that was made from a row, with what it was made of.

    Attributes:
        own: the row's own values in it, which tell rows apart whatever the template; None: it was put before the row's
            question, as part of an exemplar, or as a system message.
    """

    own: str | None

    def __new__(cls, text: str, own: str | None) -> Rendered:
        """Return the text with its origin."""
        made = super().__new__(cls, text)
        made.own = own
        return made


def is_before(message: Mapping[str, Any]) -> bool:
    """Return whether a message was put before a row's own question: it is asked with, and not learned."""
    content = message["content"]
    return isinstance(content, Rendered) and content.own is None


class MissingField(InputError):
    """A template has a field that there is no value for."""


@dataclass(frozen=True)
class Template:
    """One template."""

    text: str
    is_jinja: bool

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Names that it looks up.

        Raises:
            InputError: it is no valid template.
        """
        if not self.is_jinja:
            return tuple(dict.fromkeys(FIELD.findall(self.text)))
        from jinja2 import meta

        environment = jinja_environment()
        with evaluating_input(self.described, REMEDY):
            tree = environment.parse(self.text)
            compiled(self.text)
        return tuple(sorted(meta.find_undeclared_variables(tree) - set(environment.globals)))

    @property
    def described(self) -> str:
        """The template as an error names it."""
        return f"the template {self.shown}"

    @property
    def shown(self) -> str:
        """The text on one line, shortened."""
        return f"'{plain(self.text)}'"

    def render(self, values: Mapping[str, Any]) -> str:
        """Return the text.

        Args:
            values: by name; texts, numbers, and in Jinja lists and objects, too.

        Raises:
            MissingField: there is no value for a field.
            InputError: a value can't be written, or the template computes for ever.
        """
        if not self.is_jinja:
            return FIELD.sub(lambda match: written(self.described, match[1], values), self.text)
        from jinja2 import UndefinedError

        missing = [name for name in self.fields if name not in values]
        with evaluating_input(self.described, REMEDY):
            try:
                return compiled(self.text).render(dict(values))
            except UndefinedError as error:
                if missing:  # else something else is undefined, as a member of an object
                    raise MissingField(f"{self.described} names {', '.join(map(plain, missing))}") from error
                raise


def written(what: str, name: str, values: Mapping[str, Any]) -> str:
    """Return the text of a plain field.

    Raises:
        MissingField: there is no such value.
        InputError: it is neither text nor number.
    """
    if name not in values:
        raise MissingField(f"{what} names {name}")
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise InputError(
            f"{what} names {name}, which is {kind_of(value)}: give text or a number, or write the template in Jinja"
        )
    return str(value)


def refuse_null(value: Any) -> Any:
    """Return a value that a Jinja template writes; "None" would be written in silence.

    Raises:
        ValueError: it is null.
    """
    if value is None:
        raise ValueError("it writes a value that is null")
    return value


@cache
def jinja_environment() -> ImmutableSandboxedEnvironment:
    """Return the sandbox, which treats blocks as chat templates do: they leave no empty lines."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, finalize=refuse_null
    )


@cache
def compiled(text: str) -> Any:
    """Return a Jinja template, ready to be rendered."""
    return jinja_environment().from_string(text)


def read_templates(file: str) -> tuple[Template, ...]:
    """Return the templates of a file.

    Raises:
        InputError: it can't be read, or holds no template, one that is empty, or one that is wrong.
    """
    what = f"--template {file}"
    is_jinja = Path(file).suffix in SUFFIXES
    texts = split_templates(read_text(Path(file), what, "name a text file"))
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            which = "it is empty" if len(texts) == 1 else f"template {number} of {len(texts)} is empty"
            raise InputError(f"{what}: {which}: write one, or remove a line of ---")
        if not is_jinja and ("{%" in text or re.search(r"\{\{\s*[^\W\d]\w*", text)):
            raise InputError(f"{what} is written in Jinja, and its name says plain text: name it with {SUFFIXES[0]}")
    templates = tuple(Template(text, is_jinja) for text in texts)
    for number, template in enumerate(templates, start=1):
        with input_faults(f"{what}: template {number}", REMEDY):
            no_field = not template.fields
        if no_field:
            raise InputError(
                f"{what}: {template.described} has no field, so every question would be the same: write one, as "
                f"{'{{ dialogue }}' if is_jinja else '{dialogue}'}"
            )
    return templates


def split_templates(text: str) -> Sequence[str]:
    """Return the templates of a file's text, without line breaks around them."""
    return [part.strip("\r\n") for part in SEPARATOR.split(text)]
