"""Figures of one's own: a Python function that is called with an answer and its references, and returns a number."""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_instruct.errors import InputError, one_line

FLAG = "--metric"


@dataclass(frozen=True)
class OwnMetric:
    """A user's function.

    Args:
        name: of the function, and of its figure.
        path: its file.
        function: takes an answer and the list of its references, and returns a number.
        flag: what named it, for errors.
    """

    name: str
    path: Path
    function: Callable[[str, list[str]], Any]
    flag: str = FLAG

    def value(self, answer: str, references: Sequence[str], where: str) -> float:
        """Return the function's number for one answer.

        Args:
            answer: the answer.
            references: its references.
            where: the answer's row and model, for errors.

        Raises:
            InputError: the function raised an error, or returned what is no finite number.
        """
        flag = f"{self.flag} {self.path}:{self.name}"
        try:
            value = self.function(answer, list(references))
        except (Exception, SystemExit) as error:
            raise InputError(f"{flag} failed at {where}: {fault(error, self.path)}: repair the function") from error
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if isinstance(value, str) or not math.isfinite(number):
            shown = one_line(repr(value), 80)
            raise InputError(f"{flag} returned {shown} at {where}: let it return a finite number")
        return number


def load_metric(word: str, flag: str = FLAG) -> OwnMetric:
    """Import a function; this runs the file's code.

    Args:
        word: FILE.py:FUNCTION.
        flag: what named it, for errors.

    Raises:
        InputError: there is no such file or function, the file can't be imported, or the function doesn't take an
            answer and its references.
    """
    file, _, name = word.rpartition(":")
    path = Path(file).expanduser()
    if path.suffix != ".py" or not name.isidentifier():
        raise InputError(f"{flag} {word} is no FILE.py:FUNCTION: name a file of Python and a function in it")
    if not path.is_file():
        raise InputError(f"{flag} {word}: no such file: {path}")
    sys.path.append(str(path.resolve().parent))  # for modules beside it, also those that the function imports later
    spec = importlib.util.spec_from_file_location(f"metric_of_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"{flag} {word} can't be imported: {fault(error, path)}: repair the file") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{flag} {word}: {path} has no function {name}: name one that it defines")
    try:
        inspect.signature(function).bind("", [])
    except TypeError:
        raise InputError(f"{flag} {word} does not take an answer and its references: let it take two values") from None
    except ValueError:  # a function in C has no signature to look at
        pass
    return OwnMetric(name, path, function, flag)


def fault(error: BaseException, path: Path) -> str:
    """Return an error of a user's code in one line, with the last line of the user's file that it went through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = frames[-1].lineno if frames else getattr(error, "lineno", None)
    place = f" ({path}:{line})" if line else ""
    return f"{type(error).__name__}: {one_line(error)}{place}"
