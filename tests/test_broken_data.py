"""Broken data ends with rows or with one line, on any bytes; `tests/broken_data.py` makes it."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

# Draws that once ended wrongly. 1782, 1830, 2396: ijson crashed on integers of more than 4,300 digits. 102352: a line
# that is only a byte order mark.
KEPT = [1782, 1830, 2396, 102352]


def run(*words):
    """The generator in a process of its own: a fork of one in which polars has computed would wait for its threads."""
    command = [sys.executable, "-m", "tests.broken_data", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_no_draw_goes_wrong():
    result = run("--draws", "400")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("seed", KEPT)
def test_draws_that_went_wrong_once_do_not(seed):
    result = run("--first", str(seed), "--draws", "1")
    assert result.returncode == 0, result.stdout + result.stderr


def test_without_the_checks_of_record_batches_a_draw_ends_the_process():
    """The negative control: these bytes do make Arrow read where nothing is."""
    result = run("--first", "421", "--draws", "1", "--without_checks")
    assert result.returncode == 1 and "the process ended with -11" in result.stdout
