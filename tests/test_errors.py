"""What becomes one line, what keeps its traceback, and what is stopped."""

import json
import os
import re
import threading
from pathlib import Path

import pytest

from open_instruct.errors import InputError, exit_code, input_faults
from open_instruct.limits import limited_time


def deep(levels):
    return json.loads("[" * levels + "]" * levels)


FAULTS = {
    "permissions": (lambda: Path("/").write_text(""), "can't be used"),
    "encoding": (lambda: b"ab\xff".decode(), "byte 2 is not UTF-8"),
    "depth": (lambda: deep(100_000), "it is nested too deeply"),
    "a missing key": (lambda: {}["name"], "'name' is missing"),
    "a wrong type": (lambda: len(5), "TypeError: object of type 'int' has no len()"),
    "a regular expression": (lambda: re.compile("("), "missing ), unterminated subpattern at position 0"),
    "division": (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_whatever_an_input_raises_is_one_line(name):
    work, reason = FAULTS[name]
    with pytest.raises(InputError) as caught, input_faults("--value 5", "give another"):
        work()
    text = str(caught.value)
    assert text.startswith("--value 5 can't be used (") and text.endswith("): give another") and reason in text
    assert "\n" not in text


def test_a_bug_keeps_its_traceback():
    with pytest.raises(NameError), input_faults("--value 5", "give another"):
        nothing_of_that_name  # noqa: B018, F821
    with pytest.raises(TypeError):
        exit_code(lambda: len(5))


def test_an_input_error_passes_unchanged():
    with pytest.raises(InputError, match=r"^as it was$"), input_faults("--value 5", "give another"):
        raise InputError("as it was")


@pytest.mark.parametrize("name", ["no/such/folder/file", "a" * 300])
def test_a_refusal_of_the_system_is_one_line(capsys, name):
    assert exit_code(lambda: open(name).close()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {name}: ") and error.count("\n") == 1


def test_memory_is_one_line(capsys):
    assert exit_code(lambda: bytearray(1 << 60)) == 2
    assert "out of memory" in capsys.readouterr().err


def endless():
    while True:
        pass


@pytest.mark.parametrize("work", [endless, lambda: re.match(r"(a+)+$", "a" * 64 + "b")])
def test_what_computes_for_ever_is_stopped(work):
    with pytest.raises(InputError, match=r"still computing after 0\.2 s"), limited_time("--value", "simplify it", 0.2):
        work()


def test_nothing_of_a_limit_remains():
    with limited_time("--value", "simplify it", 0.05):
        pass
    start = os.times().user
    while os.times().user - start < 0.2:  # the alarm would ring here
        pass


def test_other_threads_are_not_limited():
    seen = []

    def work():
        with limited_time("--value", "simplify it", 0.01):
            seen.append(sum(range(1_000_000)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen
