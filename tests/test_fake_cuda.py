"""Whole training steps with shapes, types and devices of a GPU, on machines without one: see `fake_cuda/steps.py`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils import cpp_extension

from open_instruct.flags import METHOD_NAMES
from tests.conftest import ROOT

# Each method, back end, type and checkpointing at least once; all combinations: `python -m tests.fake_cuda LIBRARY`.
CASES = [
    "full,flash_attn,bfloat16,True",
    "full,varlen,bfloat16,False",
    "full,sdpa,float32,False",
    "lora,varlen,bfloat16,True",
    "lora,flash_attn,float16,False",
    "vera,sdpa,bfloat16,False",
    "ia3,varlen,float16,False",
    "prompt_tuning,flash_attn,bfloat16,False",
    "prompt_tuning,sdpa,float32,True",
    "p_tuning,varlen,bfloat16,False",
    "prefix_tuning,flash_attn,bfloat16,True",
    "prefix_tuning,sdpa,float16,False",
    "projected_prefix,blocked,bfloat16,True",
]
MISTAKES = {  # what the steps must notice
    "full,flash_attn,bfloat16,False,no autocast": "q is torch.float32, not 16 bits",
    "lora,flash_attn,bfloat16,False,float32": "q is torch.float32, not 16 bits",
    "prompt_tuning,sdpa,bfloat16,False,mask on the CPU": "found at least two devices, cuda:0 and cpu",
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Run all cases in one process, which believes in a GPU; gives the error of each."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler (g++, or CXX)")
    if torch.backends.cuda.is_built():
        pytest.skip("this build of torch has CUDA of its own")
    library = tmp_path_factory.mktemp("fake_cuda") / "device.so"
    folders = [f"-I{path}" for path in cpp_extension.include_paths()]
    for path in cpp_extension.library_paths():
        folders += [f"-L{path}", f"-Wl,-rpath,{path}"]
    source = ROOT / "tests" / "fake_cuda" / "device.cpp"
    command = [compiler, "-std=c++20", "-shared", "-fPIC", *folders, str(source), "-o", str(library)]
    built = subprocess.run([*command, "-lc10", "-ltorch_cpu"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "tests.fake_cuda", str(library), *CASES, *MISTAKES]
    result = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == len(CASES) + len(MISTAKES), result.stderr[-2000:]
    return {row["case"]: row["error"] for row in rows}


@pytest.mark.parametrize("case", CASES)
def test_a_step_fits_a_gpu(case, errors):
    assert errors[case] is None


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_noticed(case, errors):
    assert MISTAKES[case] in str(errors[case])


def test_every_method_is_among_the_cases():
    assert {case.split(",")[0] for case in CASES} >= {*METHOD_NAMES, "full"} - {"qlora", "peft"}


def test_every_back_end_type_and_checkpointing_is_among_the_cases():
    for column, values in ((1, 4), (2, 3), (3, 2)):
        assert len({case.split(",")[column] for case in CASES}) == values
