"""The one exception that means "the user can mend this", what becomes one, and how a tool ends."""

from __future__ import annotations

import errno
import os
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from open_instruct.interrupts import as_python_does, former
from open_instruct.streams import standard_streams

BUGS = (AssertionError, NameError, ImportError)  # no input raises them: they keep their traceback
PANIC = "PanicException"  # of libraries in Rust, as tokenizers and safetensors are; it is no Exception
LONGEST_LINE = 2500  # characters of an error on the terminal
REMEDIES = {
    errno.ENOSPC: "free disk space, or name another place",
    errno.EDQUOT: "free disk space, or name another place",
    errno.EFBIG: "raise the limit on file sizes, or name another place",
    errno.EACCES: "change its permissions, or name another path",
    errno.EPERM: "change its permissions, or name another path",
    errno.EROFS: "name a path that can be written",
}


class InputError(ValueError):
    """Wrong input; the message names the value, the reason and the remedy. Entry points print it and exit with 2."""


def visible(text: str) -> str:
    """Return a text whose control characters, and halves of surrogate pairs, are written as escapes.

    A file's name or a model's answer could otherwise move the cursor, or rename the window of a terminal. Line breaks
    and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs")
        else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in text
    )


def one_line(error: BaseException | str, longest: int = 300) -> str:
    """Return an error's text without line breaks and control characters, cut at `longest` characters."""
    text = visible(" ".join(str(error).split()))
    return text if len(text) <= longest else text[: longest - 1] + "…"


def for_terminal(error: BaseException | str) -> str:
    """Return an error as one line; of a very long one, as with a value of a megabyte, both ends."""
    text = one_line(error, sys.maxsize)
    half = LONGEST_LINE // 2
    return text if len(text) <= LONGEST_LINE else f"{text[:half]} … {text[-half:]}"


def reason_of(error: BaseException) -> str:
    """Return in a few words why an input can't be used, from whatever a library raised about it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not {error.encoding.upper()}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    text = one_line(error)
    if type(error).__name__ == PANIC:
        return f"its reader gave up: {text}"
    return text if text and isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


@contextmanager
def input_faults(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever a block raises about one input into an InputError: "`what` can't be used (reason): `remedy`".

    The block does nothing but read, parse or evaluate that input, so each error is the input's: wrong types, missing
    keys, depth, size, encoding, permissions, a library's refusal. An InputError passes as it is, and so do `BUGS`.

    Args:
        what: the input as the user knows it, with its value: "--answer_regex 'a('", "chat template t.jinja".
        remedy: what the user can do.

    Raises:
        InputError: the block raised an error.
    """
    try:
        yield
    except (InputError, *BUGS):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        raise InputError(f"{what} can't be used ({reason_of(error)}): {remedy}") from error


def system_fault(error: OSError | MemoryError) -> str:
    """Return one line for what the operating system refused outside of `input_faults`: rights, space, memory."""
    if isinstance(error, MemoryError):
        return "the machine is out of memory: choose smaller sizes, or end other programs"
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{reason_of(error)}: {REMEDIES.get(error.errno or 0, 'check the path, or name another')}"


def warn(text: str) -> None:
    """Print a warning on the error stream."""
    print(f"warning: {for_terminal(text)}", file=sys.stderr, flush=True)


class Terminated(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C, but never meant for one answer alone."""


def exit_code(
    work: Callable[[], None],
    interrupted: str = "interrupted: nothing half-written remains",
    without_reader: bool = False,
) -> int:
    """Do a tool's work.

    Args:
        work: the work.
        interrupted: line printed after an interruption (Ctrl-C or SIGTERM).
        without_reader: go on when whoever read the output has closed it; else stop.

    Returns:
        The exit code. 0: done; 2: wrong input, or a refusal of the operating system, reported in one line; 130:
        interrupted; 141: whoever read the output has closed it.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        with as_python_does(), standard_streams(without_reader):
            work()
            sys.stdout.flush()
    except InputError as error:
        print(f"error: {for_terminal(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more at its end
        return 128 + signal.SIGPIPE
    except (OSError, MemoryError) as error:
        print(f"error: {for_terminal(system_fault(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, former(before))
    return 0
