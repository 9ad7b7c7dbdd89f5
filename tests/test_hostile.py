"""Wrong inputs to all commands, drawn by seed: no traceback, no hang, nothing lost, nothing wrong accepted."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

DRAWS, SHARES = 600, 2
CASES = [631, 932]  # later seeds that once failed


def try_seeds(first: int, count: int) -> None:
    """Run draws in a process that has run nothing else: a child that it forks inherits the locks of other threads."""
    words = [sys.executable, "-m", "tests.hostile", "--first", str(first), "--draws", str(count)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("share", range(SHARES))
def test_wrong_inputs_are_one_line(share):
    try_seeds(share * DRAWS // SHARES, DRAWS // SHARES)


@pytest.mark.parametrize("seed", CASES)
def test_what_once_failed(seed):
    try_seeds(seed, 1)
