"""2,000 wrong inputs to all commands: no traceback, no hang, nothing lost, nothing wrong accepted."""

import pytest

from tests.hostile import forks, sandbox
from tests.hostile.judge import try_seeds

DRAWS, SHARE = 2000, 50
CASES: list[int] = []  # seeds beyond the first 2,000 that once failed


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Good inputs, made once in each process of the tests."""
    forks.preload()
    return sandbox.build(tmp_path_factory.mktemp("hostile") / "sandbox", forks.fork)


@pytest.mark.parametrize("first", range(0, DRAWS, SHARE))
def test_wrong_inputs_are_one_line(first, good, tmp_path):
    failures = try_seeds(range(first, first + SHARE), good, tmp_path)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("seed", CASES)
def test_what_once_failed(seed, good, tmp_path):
    failures = try_seeds(range(seed, seed + 1), good, tmp_path)
    assert not failures, "\n".join(failures)
