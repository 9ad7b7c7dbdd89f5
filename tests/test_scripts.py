"""Every launcher is checked by shellcheck, and composes the command that it should."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from open_instruct.arguments import check_arguments
from open_instruct.command_line import parse
from tests.conftest import ROOT

SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), *ROOT.glob("scripts/slurm/*"), ROOT / ".ci" / "run"])
LAUNCHERS = sorted(ROOT.glob("scripts/*finetune_*.sh"))


def composed(script: Path, *flags: str, **environment: str) -> list[str]:
    """The command that a launcher would run."""
    variables = {**os.environ, "PRINT_COMMAND": "1", **environment}
    result = subprocess.run(["bash", str(script), *flags], env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    shellcheck = Path(sys.executable).parent / "shellcheck"
    result = subprocess.run([str(shellcheck), "-x", "-P", "SCRIPTDIR", str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", LAUNCHERS, ids=lambda path: path.name)
def test_a_launcher_composes_flags_that_the_trainer_accepts(script):
    words = composed(script, "--num_virtual_tokens", "7") if "lora" not in script.name else composed(script)
    entry = next(i for i, word in enumerate(words) if word.endswith("finetune_peft.py"))
    arguments, _ = parse(words[entry + 1 :])
    check_arguments(arguments)
    assert words[:2] == ["accelerate", "launch"]
    assert arguments.method in script.name
    assert Path(arguments.model_name_or_path).is_dir() and Path(arguments.train_file[0]).is_file()
    assert arguments.overwrite_output_dir


def test_environment_variables_override_and_accumulation_is_derived():
    words = composed(
        ROOT / "scripts" / "test_finetune_prompt_tuning.sh",
        MODEL="m", TRAIN_FILE="t.jsonl", OUTPUT_DIR="o", NUM_PROCESSES="2", TOTAL_BATCH_SIZE="32", BATCH_SIZE_PER_GPU="4",
        LEARNING_RATE="0.5", SEED="3",
    )  # fmt: skip
    entry = next(i for i, word in enumerate(words) if word.endswith("finetune_peft.py"))
    arguments, _ = parse(words[entry + 1 :])
    assert words[words.index("--num_processes") + 1] == "2"
    assert (arguments.model_name_or_path, arguments.train_file, arguments.output_dir) == ("m", ["t.jsonl"], "o")
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (4, 4)
    assert (arguments.learning_rate, arguments.seed, arguments.validation_file) == (0.5, 3, None)
    assert not arguments.overwrite_output_dir


def test_several_gpus_take_the_deepspeed_configuration(tmp_path):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho GPU 0\necho GPU 1\n")
    fake.chmod(0o755)
    words = composed(ROOT / "scripts" / "test_finetune_lora.sh", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert words[words.index("--num_processes") + 1] == "2"
    config = Path(words[words.index("--deepspeed_config_file") + 1])
    assert json.loads(config.read_text())["zero_optimization"]["stage"] == 2


def test_a_batch_that_does_not_divide_is_refused():
    variables = {**os.environ, "PRINT_COMMAND": "1", "TOTAL_BATCH_SIZE": "10", "BATCH_SIZE_PER_GPU": "4"}
    result = subprocess.run(["bash", str(ROOT / "scripts" / "test_finetune_lora.sh")], env=variables, capture_output=True, text=True)
    assert result.returncode == 2 and "TOTAL_BATCH_SIZE 10 is no multiple" in result.stderr


def test_configurations_parse():
    for path in ROOT.glob("configs/**/*"):
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".yaml":
            assert isinstance(yaml.safe_load(path.read_text()), dict)
