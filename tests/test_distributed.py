"""Two processes and one give the same curve."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, TINY_MODEL, without_measurements


def run_processes(count: int, folder, data, per_device: int) -> tuple[list[dict], dict]:
    """Train prompt tuning on `count` CPU processes; asserts that there really were so many."""
    words = ["-m", "torch.distributed.run", "--nproc_per_node", str(count), "--standalone"] if count > 1 else []
    result = subprocess.run(
        [
            sys.executable, *words, str(ROOT / "open_instruct" / "finetune_peft.py"), "--model_name_or_path", str(TINY_MODEL),
            "--train_file", str(data), "--use_prompt_tuning", "--output_dir", str(folder), "--dataset_skip_cache",
            "--validation_fraction", "0.2",
            "--per_device_train_batch_size", str(per_device), "--num_train_epochs", "1", "--eval_steps", "4", "--num_sample_answers", "0",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads((folder / "run.json").read_text())["world_size"] == count
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return without_measurements(rows), json.loads((folder / "summary.json").read_text())


@pytest.mark.distributed
def test_two_processes_train_as_one(tmp_path, data_file):
    one, one_summary = run_processes(1, tmp_path / "one", data_file, 6)  # 64 examples: the last step is not full
    two, two_summary = run_processes(2, tmp_path / "two", data_file, 3)
    assert len(one) == len(two) > 8
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert one_summary["final_eval_loss"] == pytest.approx(two_summary["final_eval_loss"], rel=1e-4)
    assert one_summary["examples"] == two_summary["examples"] == 64


@pytest.mark.distributed
def test_bad_input_is_said_once_by_two_processes(tmp_path):
    result = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
            str(ROOT / "open_instruct" / "finetune_peft.py"), "--model_name_or_path", str(TINY_MODEL), "--train_file", "missing.jsonl",
        ],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode != 0
    assert result.stderr.count("no such file: missing.jsonl") == 1
