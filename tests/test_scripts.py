"""Every launcher is checked by shellcheck, and composes the command that it should."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from open_instruct import study_peft
from open_instruct.command_line import parse
from open_instruct.flags import check_flags
from tests.conftest import ROOT, TINY_MODEL

SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), *ROOT.glob("scripts/slurm/*"), ROOT / ".ci" / "run"])
SAMPLE = ROOT / "data" / "sample" / "train.jsonl"
LAUNCHERS = [path for path in sorted(ROOT.glob("scripts/*finetune_*.sh")) if path.name != "test_finetune_t5.sh"]


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
    needed = (
        {"MODEL": str(TINY_MODEL), "TRAIN_FILE": str(SAMPLE), "OUTPUT_DIR": "out"}
        if "accelerate" in script.name
        else {}
    )
    words = composed(script, *(["--num_virtual_tokens", "7"] if "lora" not in script.name else []), **needed)
    entry = next(i for i, word in enumerate(words) if word.endswith("finetune_peft.py"))
    arguments, given = parse(words[entry + 1 :])
    check_flags(arguments, given)
    assert words[:2] == ["python3", str(ROOT / "open_instruct" / "finetune_peft.py")]
    assert composed(script, NUM_PROCESSES="2", **needed)[:2] == ["accelerate", "launch"]
    assert arguments.method in script.name
    assert Path(arguments.model_name_or_path).is_dir() and Path(arguments.train_file[0]).is_file()
    assert arguments.overwrite_output_dir == (not needed)
    if needed:  # the same command starts and continues a run
        assert arguments.resume_from_checkpoint == "newest" and arguments.checkpointing_steps == "100"


def test_a_launcher_passes_one_line_and_the_exit_code_on(tmp_path):
    """The first command of the README, with a mistake."""
    script = ROOT / "scripts" / "test_finetune_prompt_tuning.sh"
    words = ["bash", str(script), "--num_virtual_tokens", "99999"]
    environment = {**os.environ, "OUTPUT_DIR": str(tmp_path / "out"), "NUM_PROCESSES": "1"}
    result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and "99999" in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert not (tmp_path / "out").exists()


def test_a_launcher_for_real_runs_asks_for_what_it_needs():
    script = ROOT / "scripts" / "finetune_lora_with_accelerate.sh"
    result = subprocess.run(
        ["bash", str(script)], env={**os.environ, "PRINT_COMMAND": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 2 and "error: MODEL is not set" in result.stderr


WRONG_COUNTS = [
    (name, value)
    for name in ("NUM_PROCESSES", "TOTAL_BATCH_SIZE", "BATCH_SIZE_PER_GPU")
    for value in ("0", "-1", "abc", "2x", "1e3", "08", "x[$(exit)]")
]
ENGINES = {"ddp": "--multi_gpu", "zero2": "--use_deepspeed", "zero3": "--use_deepspeed", "fsdp": "--use_fsdp"}


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engine_of_several_gpus_can_be_chosen(engine, tmp_path):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\nfor i in 0 1 2 3 4 5 6 7; do echo GPU $i; done\n")
    fake.chmod(0o755)
    needed = {
        "MODEL": "m",
        "TRAIN_FILE": "t",
        "OUTPUT_DIR": "o",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "ENGINE": engine,
    }
    command = composed(ROOT / "scripts" / "finetune_lora_with_accelerate.sh", **needed)
    assert set(ENGINES.values()) & set(command) == {ENGINES[engine]}
    launch_command_parser().parse_args(command[2:])
    if engine.startswith("zero"):
        config = json.loads(Path(command[command.index("--deepspeed_config_file") + 1]).read_text())
        assert config["zero_optimization"]["stage"] == int(engine[-1])
    assert command[command.index("--num_processes") + 1] == "8"
    assert command[command.index("--per_device_train_batch_size") + 1 :][:3] == [
        "16",
        "--gradient_accumulation_steps",
        "1",
    ]


def test_the_batch_job_gives_each_task_its_rank_and_resumes():
    words = composed(
        ROOT / "scripts" / "slurm" / "finetune.sbatch", "--use_lora", "--model_name_or_path", "m", "--train_file", "t"
    )
    assert words[:4] == ["srun", "--kill-on-bad-exit=1", "bash", "-c"]
    entry = next(i for i, word in enumerate(words) if word.endswith("finetune_peft.py"))
    arguments, given = parse(words[entry + 1 :])
    check_flags(arguments, given)
    assert arguments.resume_from_checkpoint == "newest"
    show = [*words[2:5], "task", "bash", "-c", "echo $RANK $LOCAL_RANK $WORLD_SIZE"]
    variables = {
        **os.environ,
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "4",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    assert subprocess.run(show, env=variables, capture_output=True, text=True).stdout.split() == ["3", "1", "4"]


def test_an_array_of_jobs_shares_a_study():
    job = ROOT / "scripts" / "slurm" / "study.sbatch"
    words = composed(job, "s.yaml", SLURM_ARRAY_TASK_ID="5", SLURM_ARRAY_TASK_MIN="4", SLURM_ARRAY_TASK_COUNT="8")
    entry = next(i for i, word in enumerate(words) if word.endswith("study_peft.py"))
    parsed = study_peft.build_parser().parse_args(words[entry + 1 :])
    assert str(parsed.config) == "s.yaml" and study_peft.parse_shard(parsed.shard) == (1, 8)


def test_environment_variables_override_and_accumulation_is_derived():
    words = composed(
        ROOT / "scripts" / "test_finetune_prompt_tuning.sh",
        MODEL="m", TRAIN_FILE="t.jsonl", OUTPUT_DIR="o", NUM_PROCESSES="2", TOTAL_BATCH_SIZE="32",
        BATCH_SIZE_PER_GPU="4", LEARNING_RATE="0.5", SEED="3",
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


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"TOTAL_BATCH_SIZE": "10", "BATCH_SIZE_PER_GPU": "4"}, "TOTAL_BATCH_SIZE 10 is no multiple"),
        *(({name: value}, f"{name} {value} is no positive number") for name, value in WRONG_COUNTS),
    ],
)
def test_a_wrong_batch_is_refused(variables, words):
    """Bash would compute with words as if they were 0, and divide by it."""
    result = subprocess.run(
        ["bash", str(ROOT / "scripts" / "test_finetune_lora.sh")],
        env={**os.environ, "PRINT_COMMAND": "1", **variables},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and words in result.stderr


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/accelerate/*.yaml")), ids=lambda path: path.name)
def test_accelerate_accepts_the_configurations(path):
    config = load_config_from_file(str(path))
    nodes = 4 if "multinode" in path.name else 1
    assert (config.num_machines, config.num_processes) == (nodes, 8 * nodes)
    engine = path.name.split("_")[0]
    if engine.startswith("zero"):
        assert config.distributed_type == "DEEPSPEED"
        assert config.deepspeed_config["deepspeed_config_file"] == f"configs/ds_configs/{engine}.json"
    else:
        assert config.distributed_type == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}[engine]


def test_configurations_parse():
    for path in ROOT.glob("configs/**/*"):
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".yaml":
            assert isinstance(yaml.safe_load(path.read_text()), dict)
