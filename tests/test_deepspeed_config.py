"""DeepSpeed's configurations: open-instruct's files with "auto", a user's own, and wrong ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from open_instruct.errors import InputError
from open_instruct.finetune_peft import main
from open_instruct.training.deepspeed_config import make_plugin
from tests.conftest import ROOT
from tests.test_distributed import adapter_of, flags, launch, rows_of

pytest.importorskip("deepspeed")

SHIPPED = sorted((ROOT / "configs" / "ds_configs").iterdir())
# What people have in theirs: other tools' optimizer and schedule, a batch of their own, clipping, half precision.
OWN: dict[str, Any] = {
    "fp16": {"enabled": True, "loss_scale": 0},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.1,
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 8,
    "steps_per_print": 1e5,
}


def write(path: Path, value: Any) -> Path:
    """Write JSON."""
    path.write_text(json.dumps(value))
    return path


def config_of(file: Path | str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The configuration that DeepSpeed gets for a file."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    plugin = make_plugin(128)
    assert plugin is not None
    return plugin.deepspeed_config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_file_is_filled_in(path, monkeypatch, capsys):
    config = config_of(path, monkeypatch)
    stage = json.loads(path.read_text())["zero_optimization"]["stage"]
    assert config["zero_optimization"]["stage"] == max(stage, 1)
    assert "auto" not in json.dumps(config)
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (1, 1)
    assert ("without effect" in capsys.readouterr().err) == ("clip1" in path.name or not stage)


def test_what_the_flags_decide_is_said_once(tmp_path, monkeypatch, capsys):
    config = config_of(write(tmp_path / "own.conf", OWN), monkeypatch)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for name in (
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
        "fp16", "optimizer", "scheduler",
    ):  # fmt: skip
        assert f"{name} (--" in said
    assert "bf16" not in said and "auto" not in json.dumps(config)
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == 1280
    assert config["zero_optimization"]["sub_group_size"] == 1e9


ZERO = OWN["zero_optimization"]
WRONG = {
    "no JSON": "{",
    "no object": [OWN],
    "no ZeRO": {"bf16": {"enabled": "auto"}},
    "ZeRO is no object": {"zero_optimization": True},
    "stage": {"zero_optimization": {"stage": 7}},
    "kind of stage": {"zero_optimization": {"stage": "three"}},
    "stage as a list": {"zero_optimization": {"stage": [3]}},
    "unknown name": {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket": 5}},
    "negative size": {"zero_optimization": {**ZERO, "stage3_max_live_parameters": -1}},
    "kind of size": {"zero_optimization": {**ZERO, "sub_group_size": "large"}},
    "device": {"zero_optimization": {"stage": 3, "offload_param": {"device": "moon"}}},
    "depth": "[" * 100_000,
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_configuration_is_one_line(case, tmp_path, monkeypatch):
    content, path = WRONG[case], tmp_path / "wrong.conf"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=r"wrong\.conf can't be used|is none of 1, 2 and 3"):
        config_of(path, monkeypatch)


@pytest.mark.parametrize("name", [".", "missing.conf"])
def test_a_configuration_that_is_no_file_is_one_line(name, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="can't be used"):
        config_of(tmp_path / name, monkeypatch)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["stage2_accelerate", "own"])
def test_such_files_train_as_one_process_does(name, tmp_path, data_file):
    """The same losses and norms, whatever the file says of batches and clipping; offloaded moments are restored."""
    engine = name if name != "own" else str(write(tmp_path / "own.conf", OWN))
    common = ["--max_train_steps", "4", "--eval_steps", "2", "--checkpointing_steps", "2"]
    common += ["--keep_last_n_checkpoints", "-1", "--clip_grad_norm", "2"]
    method = "lora" if name == "own" else "prefix_tuning"
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([*flags(tmp_path, data_file, method, "True", *common), "--per_device_train_batch_size", "6"]) == 0
    alone = tmp_path / f"{method}-True"
    there = tmp_path / "there"
    words = [*flags(tmp_path, data_file, method, "True", *common), "--per_device_train_batch_size", "3"]
    result = launch(engine, [[*words, "--output_dir", str(there)]], tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = rows_of(alone), rows_of(there)
    assert len(one) == len(two) and max(row.get("grad_norm", 0) for row in one) > 0.1
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert (adapter_of(alone) - adapter_of(there)).norm() / adapter_of(alone).norm() < 1e-5
    if name != "own":
        return
    expected = adapter_of(there)
    shutil.rmtree(there / "checkpoints" / "step_4")
    (there / "summary.json").unlink()
    resumed = launch(engine, [[*words, "--output_dir", str(there), "--resume_from_checkpoint"]], tmp_path)
    assert resumed.returncode == 0 and "resuming after step 2" in resumed.stdout, resumed.stderr[-3000:]
    assert (adapter_of(there) - expected).norm() / expected.norm() < 1e-6
