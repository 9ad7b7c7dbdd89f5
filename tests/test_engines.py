"""The line that a run starts with, and what it says of accelerate's own settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from open_instruct.training import engines, output
from open_instruct.training.engines import ProcessSettings
from tests.conftest import ROOT, TINY_MODEL

GIVEN = {  # what `accelerate launch` sets, and what is said of it in a float32 run on one CPU process
    "MIXED_PRECISION": ("bf16", "--mixed_precision bf16 (--dtype decides: float32)"),
    "GRADIENT_ACCUMULATION_STEPS": ("4", "--gradient_accumulation_steps before the script (give it after the script)"),
    "GRADIENT_CLIPPING": ("0.5", "--gradient_clipping (--clip_grad_norm decides)"),
    "DYNAMO_BACKEND": ("INDUCTOR", "--dynamo_backend (--compile decides)"),
    "USE_FSDP": ("true", "--use_fsdp (not on cpu: this run is one process without it)"),
}
DEFAULTS = {
    "MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "GRADIENT_ACCUMULATION_STEPS": "1", "USE_FSDP": "false",
    "DYNAMO_MODE": "default",
}  # fmt: skip


def accelerator(dtype: torch.dtype) -> Any:
    """Start this process's engine anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return engines.make_accelerator(ProcessSettings(dtype, 0, 60, (), "out"))


@pytest.mark.parametrize("names", [[name] for name in GIVEN] + [[*GIVEN], []], ids=lambda names: "+".join(names))
def test_settings_of_the_launcher_that_are_not_followed_are_said_once(names, monkeypatch, capsys):
    for name, value in DEFAULTS.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    for name in names:
        monkeypatch.setenv(f"ACCELERATE_{name}", GIVEN[name][0])
    accelerator(torch.float32)
    said = capsys.readouterr().err
    assert said.count("\n") == bool(names)
    assert [name for name in GIVEN if GIVEN[name][1] in said] == names


def test_the_run_s_own_precision_is_not_said(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    started = accelerator(torch.bfloat16)
    assert capsys.readouterr().err == ""
    in_full = engines.describe(started, torch.float32, None, torch.bfloat16)
    assert in_full == "1 process on cpu, base in float32, computed in bfloat16"
    assert engines.describe(started, torch.float16, None, torch.float16) == "1 process on cpu, base in float16"
    quantised = engines.describe(started, torch.bfloat16, "4bit", torch.bfloat16)
    assert quantised == "1 process on cpu, base in 4-bit, computed in bfloat16"


@pytest.mark.distributed
def test_deepspeed_that_becomes_ddp_on_cpus_is_said(tmp_path, data_file):
    pytest.importorskip("deepspeed")
    words = ["--model_name_or_path", str(TINY_MODEL), "--train_file", str(data_file), "--use_lora", "--dry_run"]
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2", "--use_deepspeed"]
    launcher += ["--deepspeed_config_file", str(ROOT / "configs" / "ds_configs" / "stage2_accelerate.conf")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    script = str(ROOT / "open_instruct" / "finetune_peft.py")
    result = subprocess.run(
        [sys.executable, *launcher, script, *words, "--dataset_skip_cache"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.count("--use_deepspeed (not on cpu: this run is DDP)") == 1
    assert "LoRA: 2 processes (DDP) on cpu, base in float32" in result.stdout


def test_an_upload_makes_its_branch(tmp_path, monkeypatch, capsys):
    calls: list[tuple[str, dict[str, Any]]] = []

    class Hub:
        def create_repo(self, name: str, **options: Any) -> Any:
            return type("Repository", (), {"repo_id": f"user/{name}"})

        def create_branch(self, name: str, **options: Any) -> None:
            calls.append((name, options))

        def upload_folder(self, **options: Any) -> None:
            calls.append((options["repo_id"], options))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    output.upload(Path(tmp_path), "adapter", "run-1")
    assert calls[0] == ("user/adapter", {"branch": "run-1", "exist_ok": True})
    assert calls[1][1]["revision"] == "run-1" and "uploaded to user/adapter" in capsys.readouterr().out
    output.upload(Path(tmp_path), "adapter", None)
    assert len(calls) == 3
