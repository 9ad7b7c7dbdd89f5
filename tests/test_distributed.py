"""Two processes and one give the same curve, under every engine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from open_instruct.errors import InputError
from open_instruct.finetune_peft import main
from open_instruct.methods.facts import DEFAULT_TEXT
from open_instruct.training import engines
from tests import warm
from tests.conftest import ROOT, TINY_MODEL, without_measurements

SOFT = ["--num_virtual_tokens", "20"]
VARIANTS = {  # at rates that let rounding grow little in 11 steps
    "lora": ["--learning_rate", "3e-3", "--lora_dropout", "0"],
    "prompt_tuning": ["--learning_rate", "0.06", "--prompt_tuning_init", "text", *SOFT],
    "p_tuning": ["--learning_rate", "3e-3", *SOFT],
    "prefix_tuning": ["--learning_rate", "0.03", "--prefix_init", "text", *SOFT],
}
ENGINES = {"ddp": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP"}


def flags(folder: Path, data: Path, variant: str, packing: str, *more: str) -> list[str]:
    """A run whose last step holds one example, so that one of two processes has nothing left."""
    return [
        "--model_name_or_path", str(TINY_MODEL), "--train_file", str(data), f"--use_{variant}", "--packing", packing,
        "--output_dir", str(folder / f"{variant}-{packing}"), "--dataset_skip_cache", "--validation_fraction", "0.2",
        "--max_train_samples", "61", "--num_train_epochs", "1", "--eval_steps", "4", "--num_sample_answers", "0",
        *VARIANTS[variant], *more,
    ]  # fmt: skip


def launch(engine: str, runs: list[list[str]], folder: Path, processes: int = 2) -> subprocess.CompletedProcess:
    """All runs, one after another, on CPU processes."""
    folder.mkdir(exist_ok=True)
    listed = folder / "runs.json"
    listed.write_text(json.dumps(runs))
    return joined(warm.run_together(ROOT / "tests" / "engines.py", [[engine, str(listed)]] * processes))


def joined(results: list[subprocess.CompletedProcess]) -> subprocess.CompletedProcess:
    """The results of all processes as one."""
    codes = [result.returncode for result in results]
    outputs = ["".join(texts) for texts in zip(*((result.stdout, result.stderr) for result in results), strict=True)]
    return subprocess.CompletedProcess([], max(codes, key=abs), *outputs)


def rows_of(folder: Path) -> list[dict]:
    """metrics.jsonl without measurements."""
    return without_measurements([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])


def adapter_of(folder: Path) -> torch.Tensor:
    """All trained numbers that were saved."""
    return torch.cat(
        [tensor.flatten() for _, tensor in sorted(load_file(folder / "adapter_model.safetensors").items())]
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data_file) -> Path:
    """Every variant, packed and padded, on one process."""
    folder = tmp_path_factory.mktemp("alone")
    for variant in VARIANTS:
        for packing in ("True", "False"):
            AcceleratorState._reset_state(reset_partial_state=True)
            assert main(flags(folder, data_file, variant, packing, "--per_device_train_batch_size", "6")) == 0
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one(engine, alone, tmp_path, data_file):
    """Ragged label counts; a last step of one example; packed and padded."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    per_device = ("--per_device_train_batch_size", "3")
    runs = [
        flags(tmp_path, data_file, variant, packing, *per_device)
        for variant in VARIANTS
        for packing in ("True", "False")
    ]
    result = launch(engine, runs, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    for variant in VARIANTS:
        for packing in ("True", "False"):
            name = f"{variant}-{packing}"
            record = json.loads((tmp_path / name / "run.json").read_text())
            assert (record["world_size"], record["engine"]) == (2, ENGINES[engine])
            one, two = rows_of(alone / name), rows_of(tmp_path / name)
            assert len(one) == len(two) == 11 + 4
            for a, b in zip(one, two, strict=True):
                assert a == pytest.approx(b, rel=1e-4)
                assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-5, abs=2e-6)
            first, second = adapter_of(alone / name), adapter_of(tmp_path / name)
            assert (first - second).norm() / first.norm() < 1e-5, name


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_distil_as_one(engine, tmp_path, data_file):
    """Each process has the whole context, computed by a model that some engines have cut into pieces."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    text = tmp_path / "context.txt"
    text.write_text("Sort the words. wolf fig hammer")
    distil = ["--max_train_steps", "6", "--distill_context", str(text)]
    variants = ("lora", "prefix_tuning")
    runs = [
        flags(tmp_path / "two", data_file, variant, "True", "--per_device_train_batch_size", "3", *distil)
        for variant in variants
    ]
    result = launch(engine, runs, tmp_path / "launch")
    assert result.returncode == 0, result.stderr[-3000:]
    for variant in variants:
        words = flags(tmp_path / "one", data_file, variant, "True", "--per_device_train_batch_size", "6", *distil)
        if variant == "prefix_tuning" and ENGINES[engine] in ("ZeRO-3", "FSDP"):  # which start from the usual text
            words += ["--prompt_tuning_init_text", DEFAULT_TEXT]
        AcceleratorState._reset_state(reset_partial_state=True)
        assert main(words) == 0
        one, two = (rows_of(tmp_path / name / f"{variant}-True") for name in ("one", "two"))
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert a == pytest.approx(b, rel=1e-4)
        first, second = (adapter_of(tmp_path / name / f"{variant}-True") for name in ("one", "two"))
        assert (first - second).norm() / first.norm() < 1e-5


@pytest.mark.distributed
def test_processes_agree_on_start_and_rate(tmp_path, data_file):
    """Screened starts and --auto_lr are judged on the same examples on one process and on two."""
    words = ["--prompt_tuning_init", "screened", "--auto_lr", "--max_train_steps", "1"]
    common = [
        word for word in flags(tmp_path, data_file, "prompt_tuning", "True") if word not in ("--learning_rate", "0.06")
    ]
    result = launch("ddp", [[*common, *words, "--per_device_train_batch_size", "3"]], tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    alone = [*common, *words, "--per_device_train_batch_size", "6", "--output_dir", str(tmp_path / "alone")]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(alone) == 0
    folders = [tmp_path / "prompt_tuning-True", tmp_path / "alone"]
    starts = [load_file(folder / "soft_prompt_start.safetensors")["embeddings"] for folder in folders]
    assert torch.equal(*starts)
    tests = [json.loads((folder / "auto_lr.json").read_text()) for folder in folders]
    assert tests[0]["chosen"] == pytest.approx(tests[1]["chosen"], rel=2e-2)
    assert tests[0]["losses"] == pytest.approx(tests[1]["losses"], rel=1e-2)


def test_another_global_batch_would_be_noticed(alone, tmp_path, data_file):
    """Negative control of the comparison above."""
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(flags(tmp_path, data_file, "lora", "True", "--per_device_train_batch_size", "5")) == 0
    first, second = adapter_of(alone / "lora-True"), adapter_of(tmp_path / "lora-True")
    assert (first - second).norm() / first.norm() > 1e-3


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_goes_on_where_it_stopped(engine, alone, tmp_path, data_file):
    """Under the same engine; under DDP on another number of processes, too."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    saving = ("--per_device_train_batch_size", "3", "--checkpointing_steps", "5", "--keep_last_n_checkpoints", "-1")
    first = flags(tmp_path, data_file, "p_tuning", "True", *saving)
    assert launch(engine, [first], tmp_path).returncode == 0
    full = tmp_path / "p_tuning-True"
    part = tmp_path / "part"
    shutil.copytree(full, part)
    shutil.rmtree(part / "checkpoints" / "step_10")
    (part / "summary.json").unlink()
    again = [*first, "--output_dir", str(part), "--resume_from_checkpoint"]
    result = launch(engine, [again], tmp_path)
    assert result.returncode == 0 and "resuming after step 5" in result.stdout, result.stderr[-3000:]
    assert rows_of(part) == rows_of(full)
    assert torch.equal(adapter_of(part), adapter_of(full))
    if engine in ("ddp", "fsdp2"):
        (part / "summary.json").unlink()
        shutil.rmtree(part / "checkpoints" / "step_10")
        AcceleratorState._reset_state(reset_partial_state=True)
        assert main([*again, "--per_device_train_batch_size", "6"]) == 0
        first_adapter = adapter_of(full)
        assert (adapter_of(part) - first_adapter).norm() / first_adapter.norm() < 1e-5


@pytest.mark.distributed
def test_bad_input_is_said_once_by_two_processes(tmp_path):
    result = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
            str(ROOT / "open_instruct" / "finetune_peft.py"), "--model_name_or_path", str(TINY_MODEL),
            "--train_file", "missing.jsonl",
        ],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode != 0
    assert result.stderr.count("no such file: missing.jsonl") == 1


def launched(ranks: list[list[str]], cwd: Path, **environment: str) -> list[subprocess.CompletedProcess]:
    """One run whose processes are started by hand, each with its own flags."""
    return warm.run_together(ROOT / "open_instruct" / "finetune_peft.py", ranks, cwd, **environment)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "kind, says",
    [
        ("seed", "--seed is 42 in process 0 and 7 in process 1"),
        ("data", "training and held-out data is"),
    ],
)
def test_processes_that_differ_are_refused_by_all(kind, says, tmp_path, data_file):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(data_file.read_text().splitlines(keepends=True)[:-1]))
    first = flags(tmp_path, data_file, "lora", "True")
    second = [*first, "--seed", "7"] if kind == "seed" else flags(tmp_path, other, "lora", "True")
    results = launched([first, second], tmp_path, ACCELERATE_USE_CPU="true")
    assert [result.returncode for result in results] == [2, 2], results
    for rank, result in enumerate(results):
        (line,) = [line for line in result.stderr.splitlines() if "error: " in line]
        assert says in line and line.startswith("error: process 1: ") == (rank == 1)
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "lora-True").exists()


@pytest.mark.distributed
def test_processes_that_do_not_find_each_other_are_refused(tmp_path, data_file):
    """Without ACCELERATE_USE_CPU, torchrun on CPUs starts as many runs as processes, all into one folder."""
    words = flags(tmp_path, data_file, "lora", "True")
    for result in launched([words, words], tmp_path, ACCELERATE_USE_CPU="false"):
        assert result.returncode == 2 and "WORLD_SIZE=2 says that 2 processes" in result.stderr, result.stderr
        assert "set ACCELERATE_USE_CPU=true" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "lora-True").exists()


@pytest.mark.parametrize("variables, refused", [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2"),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4"),
    ({"PMI_SIZE": "2"}, "PMI_SIZE=2"),
    ({"WORLD_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "4"}, None),
    ({"WORLD_SIZE": "text"}, None),
    ({"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}, None),
    ({"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}, None),
    (
        {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        "torchrun --nproc_per_node N",
    ),
])  # fmt: skip
def test_a_launch_of_one_process_is_told_from_a_failed_one_of_several(variables, refused, monkeypatch):
    for name in (*engines.LAUNCHED, "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if refused is None:
        engines.check_launch(1)
        return
    with pytest.raises(InputError, match=refused):
        engines.check_launch(1)


@pytest.mark.distributed
def test_accumulation_in_a_deepspeed_file_divides_nothing(tmp_path, data_file, monkeypatch):
    """The number would divide the gradient once more. accelerate's own variable for it is set in both runs."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("TEST_ACCUMULATION", "4")
    two = flags(tmp_path, data_file, "lora", "True", "--per_device_train_batch_size", "3", "--max_train_steps", "2")
    result = launch("zero2", [two], tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    AcceleratorState._reset_state(reset_partial_state=True)
    one = flags(
        tmp_path / "one", data_file, "lora", "True", "--per_device_train_batch_size", "6", "--max_train_steps", "2"
    )
    assert main(one) == 0
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([*one, "--overwrite_output_dir", "--output_dir", str(tmp_path / "plain")]) == 0
    norms = [[row["grad_norm"] for row in rows_of(path) if "loss" in row] for path in (
        tmp_path / "lora-True", tmp_path / "one" / "lora-True", tmp_path / "plain"
    )]  # fmt: skip
    assert norms[0] == pytest.approx(norms[2], rel=1e-3) and norms[1] == norms[2]


SHARES = """
import gc, sys, torch
from tests.engines import make_run
make_run(sys.argv[1])
from accelerate import DistributedType, PartialState
from transformers import AutoConfig, AutoTokenizer
from open_instruct.command_line import parse
from open_instruct.training import base_model, engines, forward, settings, sharding

if sys.argv[1] == "fsdp2":
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
flags, _ = parse(["--model_name_or_path", sys.argv[2], "--train_file", "t.jsonl", "--use_lora"])
config, tokenizer = AutoConfig.from_pretrained(sys.argv[2]), AutoTokenizer.from_pretrained(sys.argv[2])
run_settings = settings.before_data(flags, {}, config)
accelerator = engines.make_accelerator(run_settings.processes)
model = base_model.load_base(run_settings.model, config, tokenizer, accelerator)
assert {p.device.type for p in model.parameters()} == {"cpu" if accelerator.is_main_process else "meta"}
before = {name: value.clone() for name, value in model.state_dict().items()} if accelerator.is_main_process else {}
number = sum(p.numel() for p in model.parameters())
broadcast_params, live = sharding.broadcast_params, []

def watched(unit, accelerator):
    broadcast_params(unit, accelerator)
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type == "cpu"]
    live.append(sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()) / 4)

sharding.broadcast_params = watched
sharding.shard(model, forward.decoder_layers(model), accelerator)
embedding = model.get_input_embeddings().weight
root = embedding.numel() if sys.argv[1] == "fsdp2" else embedding.ds_numel
layer = (number - root) / len(forward.decoder_layers(model))
if not accelerator.is_main_process:  # its share so far, and the part at work: never the weights of all layers
    for done, numbers in enumerate(live):
        assert numbers <= done * layer / 2 + max(layer, root) + 10_000, (done, numbers, layer, root)
assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
held = sum((p.ds_tensor if hasattr(p, "ds_id") else p.to_local()).numel() for p in model.parameters())
assert abs(held - number / 2) < 1000, (held, number)
gathered = sharding.gather_full(dict(model.named_parameters()), accelerator)
assert all(torch.equal(value, before[name]) for name, value in gathered.items())
assert bool(gathered) == accelerator.is_main_process
"""


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_each_process_keeps_its_share_of_the_weights(engine, tmp_path):
    """Only the main process reads them; put together again, they are what it read."""
    if engine == "zero3":
        pytest.importorskip("deepspeed")
    program = tmp_path / "program.py"
    program.write_text(SHARES)
    result = joined(warm.run_together(program, [[engine, str(TINY_MODEL)]] * 2))
    assert result.returncode == 0, result.stderr[-3000:]
