"""The estimate of `--dry_run` is near what a step takes."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PROGRAM = """
import gc, json, sys
from functools import partial
import numpy as np
from benchmarks.shared_prefix import METHODS, Packing, PackedModel, Path, blocked
from benchmarks.shared_prefix import draw, high_water_mark, make_model, packed_step
from open_instruct.model import memory

method, checkpointing = sys.argv[1], sys.argv[2] == "True"
model = make_model(method, 20, (512, 1408, 8, 8, 8, 2000), "float32", "cpu")
if method == "full":
    model.requires_grad_(True)
packed = PackedModel(model, partial(METHODS[method].soft_prompt, model), blocked)
packed.activate()
if checkpointing:
    packed.causal.gradient_checkpointing_enable({"use_reentrant": False})
examples = draw(np.random.default_rng(0), [512] * 4, 2000)
trains = {"full": "full", "lora": "layers"}.get(method, "soft prompt")
labelled = sum(end - start for start, end in (e["spans"] for e in examples))
estimate = memory.estimate_mb(model, packed.causal.config, 2048, labelled, checkpointing, False, 4, trains)
gc.collect()
Path("/proc/self/clear_refs").write_text("5")
before = high_water_mark()
packed_step(packed, Packing(4096), examples, "cpu")
measured = (high_water_mark() - before) * 1048576 / 1e6
print(json.dumps([measured, estimate["activations"] + estimate["logits"] + estimate["gradients"]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    "method, checkpointing", [("full", False), ("lora", False), ("prompt_tuning", False), ("prefix_tuning", True)]
)
def test_the_estimate_is_near_the_measured_growth(method, checkpointing):
    """Large blocks from the system, so that the peak counts what lives and not glibc's fragments."""
    variables = {
        "PYTHONPATH": str(ROOT),
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
    }
    command = [sys.executable, "-c", PROGRAM, method, str(checkpointing)]
    result = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    measured, estimate = json.loads(result.stdout.splitlines()[-1])
    assert 0.7 < estimate / measured < 1.5, (measured, estimate)
