"""Wrong inputs to all commands, drawn by seed: no traceback, no hang, nothing lost, nothing wrong accepted."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

DRAWS, SHARES = 2000, 2


@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
def test_wrong_inputs_are_one_line(share):
    """In a process that has run nothing else: a child that it forks inherits the locks of other threads."""
    first, count = share * DRAWS // SHARES, DRAWS // SHARES
    words = [sys.executable, "-m", "tests.hostile", "--first", str(first), "--draws", str(count)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
