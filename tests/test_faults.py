"""Kills, signals, full disks, damaged files, NaN and missing memory: nothing is lost, nothing is silent."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from open_instruct.model.training_model import PackedModel
from open_instruct.training import loop
from open_instruct.training.checkpoint import complete_checkpoints, damage
from open_instruct.training.preemption import PREEMPTED
from tests import warm
from tests.conftest import ROOT, TINY_MODEL, modest_flags, without_measurements
from tests.warm import WarmProcess

ENTRY = ROOT / "open_instruct" / "finetune_peft.py"
SHORT = ["--max_train_steps", "6", "--eval_steps", "3", "--per_device_train_batch_size", "4"]


def command(folder: Path, data: Path, *flags: str) -> list[str]:
    """Flags of a run that saves a checkpoint each step."""
    return [
        "--model_name_or_path", str(TINY_MODEL), "--train_file", str(data), "--output_dir", str(folder),
        *([] if "--validation_file" in flags else ["--validation_fraction", "0.2"]),
        "--dataset_local_cache_dir", str(folder.parent / "cache"), "--num_sample_answers", "0", "--eval_steps", "20",
        "--checkpointing_steps", "1", "--per_device_train_batch_size", "4", *flags,
    ]  # fmt: skip


def start(folder: Path, data: Path, *flags: str, file_size: int | None = None) -> WarmProcess:
    """The entry point in a process of its own."""
    return warm.start(ENTRY, *command(folder, data, *flags), file_size=file_size)


def start_cold(folder: Path, data: Path, *flags: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """The entry point in a new process, or in several under a launcher."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *launcher, str(ENTRY), *command(folder, data, *flags)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


TWO = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")


def wait_until(condition: Callable[[], object], process: WarmProcess | subprocess.Popen, seconds: float = 600) -> None:
    """Wait for a condition of a running process; the bound is for one that hangs, not for a slow machine."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def logged_steps(folder: Path) -> int:
    """Rows in metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def same_result(folder: Path, other: Path, exact: bool = True) -> None:
    """Equal curves, without a doubled or missing step, and equal adapters."""
    first, second = (
        [json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (folder, other)
    )
    steps = [row["step"] for row in first if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))
    if exact:
        assert without_measurements(first) == without_measurements(second)
        assert (folder / "adapter_model.safetensors").read_bytes() == (other / "adapter_model.safetensors").read_bytes()
        return
    for a, b in zip(without_measurements(first), without_measurements(second), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    expected = load_file(other / "adapter_model.safetensors")
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        # Adam divides by gradients that may be near zero, so a single number can be off although the tensor is not. A
        # missing step would make 4e-3 here.
        assert (tensor - expected[name]).norm() < 1e-5 * expected[name].norm()


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(tmp_path, data_file):
    """Some of them during a save: each step is followed by one."""
    flags = ["--use_prompt_tuning", "--max_train_steps", "100"]
    full, part = tmp_path / "full", tmp_path / "part"
    assert start(full, data_file, *flags).wait() == 0
    rng, kills, during_a_save = random.Random(1), 0, 0
    while kills < 20:
        process = start(part, data_file, *flags, "--resume_from_checkpoint")
        before = len(list((part / "checkpoints").glob("*"))) and max(
            int(p.name[5:]) for p in complete_checkpoints(part / "checkpoints")
        )
        wait_until(
            lambda before=before: any(int(p.name[5:]) > before for p in complete_checkpoints(part / "checkpoints")),
            process,
        )
        time.sleep(rng.uniform(0, 0.08))
        process.kill()
        process.wait()
        assert not (part / "summary.json").exists(), "the run was over before it was killed: make it longer"
        kills += 1
        during_a_save += bool(list((part / "checkpoints").glob(".step_*.writing")))
    print(f"{during_a_save} of {kills} kills hit a save")
    assert start(part, data_file, *flags, "--resume_from_checkpoint").wait() == 0
    same_result(part, full)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_preempted_run_saves_says_so_and_resumes(name, tmp_path, data_file):
    flags = ["--use_prefix_tuning", "--max_train_steps", "40", "--checkpointing_steps", "1000"]
    full, part = tmp_path / "full", tmp_path / "part"
    assert start(full, data_file, *flags).wait() == 0
    process = start(part, data_file, *flags)
    wait_until(lambda: logged_steps(part) > 3, process)
    process.send_signal(getattr(signal, name))
    _, error = process.communicate()
    assert process.returncode == PREEMPTED, error
    assert f"stopped by {name} after step" in error and "--resume_from_checkpoint" in error and "Traceback" not in error
    assert len(complete_checkpoints(part / "checkpoints")) == 1
    assert start(part, data_file, *flags, "--resume_from_checkpoint").wait() == 0
    same_result(part, full)


@pytest.fixture(scope="module")
def slow_answers(tmp_path_factory) -> Path:
    """Held-out conversations of many lengths, which share no batch, with long answers: they take seconds."""
    path = tmp_path_factory.mktemp("held-out") / "heldout.jsonl"
    turns = [("user", "a " * number) for number in range(1, 90)]
    rows = [{"messages": [{"role": "user", "content": text}, LONG]} for _, text in turns]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


LONG = {"role": "assistant", "content": "kiwi " * 60}


def test_a_signal_while_the_last_answers_are_computed_loses_nothing(tmp_path, data_file, slow_answers, train):
    """No checkpoint was asked for. Meanwhile a second run is refused."""
    flags = ["--use_prompt_tuning", *SHORT, "--validation_file", str(slow_answers)]
    part = tmp_path / "part"
    process = start(part, data_file, *flags, "--checkpointing_steps", "1000", "--num_sample_answers", "80")
    wait_until((part / "adapter_model.safetensors").exists, process)
    process.send_signal(signal.SIGSTOP)  # it would otherwise be over before the second run is refused
    second = train("part", *flags)
    process.send_signal(signal.SIGCONT)
    process.terminate()
    _, error = process.communicate()
    assert second.code == 2 and f"is in use by process {process.pid}" in second.err and second.err.count("\n") == 1
    assert process.returncode == PREEMPTED and error.splitlines()[-1].startswith(
        "stopped by SIGTERM after the last step"
    )
    assert [path.name for path in complete_checkpoints(part / "checkpoints")] == ["step_6"]
    assert not (part / "summary.json").exists()
    trained = load_file(part / "adapter_model.safetensors")
    rest = train(
        "part", *flags, "--checkpointing_steps", "1000", "--resume_from_checkpoint", "--num_sample_answers", "1"
    )
    assert rest.code == 0 and len(rest.summary["samples"]) == 1 and rest.summary["steps"] == 6
    for name, tensor in load_file(part / "adapter_model.safetensors").items():
        assert torch.equal(tensor, trained[name])


def is_loaded(process: subprocess.Popen, library: str) -> bool:
    """Whether a process has loaded a library."""
    maps = Path(f"/proc/{process.pid}/maps")
    return maps.exists() and library in maps.read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the moment is seen in /proc")
@pytest.mark.parametrize("moment", ["importing", "before the first step"])
def test_a_signal_before_anything_is_trained_says_so(moment, tmp_path, data_file):
    folder = tmp_path / "run"
    process = start_cold(folder, data_file, "--use_prompt_tuning", "--max_train_steps", "1000")
    wait_until(folder.exists if moment != "importing" else lambda: is_loaded(process, "libtorch"), process)
    process.send_signal(signal.SIGUSR1)
    _, error = process.communicate()
    line = "stopped by SIGUSR1 before the first step: nothing was trained yet\n"
    assert process.returncode == PREEMPTED and error.endswith(line) and "Traceback" not in error
    assert not folder.exists()


def test_an_answer_or_a_picture_that_fails_costs_nothing_else(train, monkeypatch):
    def fails(*inputs, **options):
        raise ValueError("no way")

    monkeypatch.setattr("open_instruct.training.output.plot_losses", fails)
    run = train("run", "--use_prompt_tuning", *SHORT)
    assert run.code == 0 and run.summary["steps"] == 6 and "loss.png could not be drawn (no way)" in run.err
    monkeypatch.setattr("open_instruct.training.sample_answers.SampleAnswers.compare", fails)
    run = train("other", "--use_prompt_tuning", *SHORT)
    assert run.code == 0 and run.summary["steps"] == 6 and "could not answer (no way)" in run.err


@pytest.mark.parametrize("name", [r"$\lr=1$", "$x^$", "名前"])
def test_any_name_can_be_drawn(name, train):
    run = train(name, "--use_prompt_tuning", *SHORT, "--max_train_steps", "1")
    assert run.code == 0 and (run.folder / "loss.png").stat().st_size > 5000 and not run.err


@pytest.mark.distributed
def test_a_killed_process_ends_the_other_and_the_run_resumes_on_one(tmp_path, data_file):
    flags = [*modest_flags("prompt_tuning"), "--max_train_steps", "60", "--timeout", "30"]
    full, part = tmp_path / "full", tmp_path / "part"
    assert start(full, data_file, *flags, "--per_device_train_batch_size", "8").wait() == 0
    process = start_cold(part, data_file, *flags, launcher=TWO)
    wait_until(lambda: logged_steps(part) > 4, process)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[-1], signal.SIGKILL)
    _, error = process.communicate(timeout=600)
    assert process.returncode != 0
    assert "lost contact with the others in step" in error or "stopped by SIGTERM" in error, error
    assert complete_checkpoints(part / "checkpoints")
    assert start(part, data_file, *flags, "--resume_from_checkpoint", "--per_device_train_batch_size", "8").wait() == 0
    same_result(part, full, exact=False)


@pytest.mark.distributed
def test_a_hanging_process_is_said_with_rank_and_step(tmp_path, data_file):
    flags = ["--use_prompt_tuning", "--max_train_steps", "100000", "--timeout", "10"]
    words = command(tmp_path / "run", data_file, *flags)
    waiting, hanging = warm.start_together(ENTRY, [words, words], ACCELERATE_USE_CPU="true")
    wait_until(lambda: logged_steps(tmp_path / "run") > 4, waiting)
    hanging.send_signal(signal.SIGSTOP)
    try:
        _, error = waiting.communicate()
    finally:
        hanging.kill()
    assert waiting.returncode != 0
    assert "of 2 lost contact with the others in step" in error and "--timeout" in error, error


def children(pid: int) -> list[int]:
    """Processes that another one started, in order."""
    pids = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return sorted(map(int, pids))


def test_a_full_disk_costs_a_checkpoint_but_not_the_run(tmp_path, data_file):
    """A limit on the size of files stands for the full disk: the optimizer's state does not fit, the adapter does."""
    flags = ["--use_lora", "--max_train_steps", "3", "--lora_dropout", "0"]
    full = tmp_path / "full"
    assert start(full, data_file, *flags).wait() == 0
    size = (full / "adapter_model.safetensors").stat().st_size
    process = start(tmp_path / "run", data_file, *flags, file_size=size * 3 // 2)
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert error.count("could not be written") == 3
    assert not list((tmp_path / "run" / "checkpoints").glob("*step*"))
    same_result(tmp_path / "run", full)


def test_a_result_that_can_not_be_saved_is_put_elsewhere(train, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    folder = tmp_path / "run"
    (folder / "adapter_model.safetensors.d").mkdir(parents=True)
    fit = loop.fit

    def obstructed(*inputs):
        fit(*inputs)
        (folder / "adapter_model.safetensors").mkdir()  # what stands in the way of the last rename

    monkeypatch.setattr("open_instruct.training.run.fit", obstructed)
    run = train("run", "--use_prompt_tuning", *SHORT)
    assert run.code == 2 and "could not be saved in" in run.err
    elsewhere = Path(run.err.split("it is in ")[1].split(",")[0])
    assert load_file(elsewhere / "adapter_model.safetensors") and (elsewhere / "adapter_config.json").exists()


@pytest.mark.parametrize("kind", ["truncated", "flipped", "missing", "unmarked"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(kind, train):
    flags = ["--use_p_tuning", *SHORT, "--checkpointing_steps", "2"]
    full = train("full", *flags)
    part = full.folder.parent / "part"
    shutil.copytree(full.folder, part)
    (part / "summary.json").unlink()
    newest = complete_checkpoints(part / "checkpoints")[-1]
    path = newest / ("COMPLETED" if kind == "unmarked" else "optimizer.pt")
    content = bytearray(path.read_bytes())
    if kind == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif kind == "truncated":
        path.write_bytes(content[:-10])
    else:
        path.unlink()
    assert damage(newest)
    resumed = train("part", *flags, "--resume_from_checkpoint")
    assert resumed.code == 0, resumed.err
    assert ("is damaged" in resumed.err) == (kind != "unmarked") and "resuming after step 4" in resumed.out
    assert without_measurements(resumed.metrics) == without_measurements(full.metrics)
    named = train(
        "other",
        *flags,
        "--resume_from_checkpoint",
        str(newest.parent.parent.parent / "full" / "checkpoints" / "step_9"),
    )
    assert named.code == 2 and "it does not exist" in named.err and named.err.count("\n") == 1


def failing(monkeypatch: pytest.MonkeyPatch, at: set[int], fault: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Let the loss of some training micro-batches, counted from 1, go through `fault`."""
    calls, own = [], PackedModel.loss

    def loss(self, *inputs):
        value = own(self, *inputs)
        if torch.is_grad_enabled() and self.training:
            calls.append(1)
            return fault(value) if len(calls) - 1 in at else value  # the probe's call is the first
        return value

    monkeypatch.setattr(PackedModel, "loss", loss)


def test_a_step_that_is_not_finite_is_left_out_and_named(train, monkeypatch):
    clean = train("clean", "--use_prompt_tuning", *SHORT)
    failing(monkeypatch, {3}, lambda loss: loss * float("nan"))
    run = train("run", "--use_prompt_tuning", *SHORT)
    assert run.code == 0, run.err
    rows = {row["step"]: row for row in run.metrics if "eval_loss" not in row}
    assert (
        sorted(rows) == [1, 2, 3, 4, 5, 6] and "loss nan" in rows[3]["skipped"] and len(rows[3]["example_indices"]) == 4
    )
    assert rows[2]["loss"] == next(row["loss"] for row in clean.metrics if row["step"] == 2 and "loss" in row)
    assert rows[4]["loss"] > 0 and "not applied" in run.out
    assert all(torch.isfinite(tensor).all() for tensor in load_file(run.folder / "adapter_model.safetensors").values())


def test_steps_that_stay_infinite_end_the_run(train, monkeypatch):
    failing(monkeypatch, {3, 4, 5}, lambda loss: loss * float("inf"))
    run = train("run", "--use_prompt_tuning", *SHORT, "--checkpointing_steps", "1")
    assert run.code == 2 and "3 in a row" in run.err and "step_4" in run.err and run.err.count("\n") == 1


def out_of_memory(loss: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_rows_of_an_evaluation_are_halved_when_memory_runs_out(train, monkeypatch):
    """The result is that of longer rows."""
    flags = ["--use_prompt_tuning", *SHORT, "--per_device_train_batch_size", "8"]
    full = train("full", *flags)
    measured, failures = loop.held_out_loss, iter([True, False, True])

    def short_of_memory(*arguments: Any, **options: Any) -> tuple[float, int]:
        if next(failures, False):
            out_of_memory(torch.zeros(()))
        return measured(*arguments, **options)

    monkeypatch.setattr(loop, "held_out_loss", short_of_memory)
    run = train("run", *flags)
    assert run.code == 0 and run.out.count("out of memory: continuing with rows of") == 2
    for a, b in zip(without_measurements(run.metrics), without_measurements(full.metrics), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    failures = iter([True] * 20)
    run = train("padded", *flags, "--packing", "False")
    assert run.code == 2 and "out of memory in step 1 on process 0: set --gradient_checkpointing" in run.err


def test_rows_are_halved_once_when_memory_runs_out(train, monkeypatch):
    flags = ["--use_prompt_tuning", *SHORT, "--per_device_train_batch_size", "8"]
    full = train("full", *flags)
    failing(monkeypatch, {2}, out_of_memory)
    run = train("run", *flags)
    assert run.code == 0 and "out of memory: continuing with rows of" in run.out
    for a, b in zip(without_measurements(run.metrics), without_measurements(full.metrics), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize(
    "flags, at", [([], {2, 3}), (["--max_train_samples", "1", "--per_device_train_batch_size", "1"], {2})]
)
def test_memory_that_is_missing_for_good_is_one_line_with_remedies(flags, at, train, monkeypatch):
    failing(monkeypatch, at, out_of_memory)
    run = train("run", "--use_prompt_tuning", *SHORT, *flags)
    assert run.code == 2 and run.err.count("\n") == 1
    for remedy in ("--gradient_checkpointing", "--max_tokens_per_microbatch", "--max_seq_length"):
        assert remedy in run.err


def test_resuming_where_nothing_was_saved_keeps_a_models_folder(train, tmp_path):
    """Jobs that may be preempted pass --resume_from_checkpoint from their first start on."""
    folder = tmp_path / "model"
    shutil.copytree(TINY_MODEL, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run = train("model", "--use_prompt_tuning", *SHORT, "--resume_from_checkpoint")
    assert run.code == 2 and "holds a model" in run.err and run.err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_damaged_checkpoints_are_no_reason_to_start_anew(train):
    flags = ["--use_prompt_tuning", *SHORT, "--checkpointing_steps", "2"]
    full = train("run", *flags)
    (full.folder / "summary.json").unlink()
    for path in complete_checkpoints(full.folder / "checkpoints"):
        (path / "trained.safetensors").write_bytes(b"torn")
    run = train("run", *flags, "--resume_from_checkpoint")
    assert run.code == 2 and "are damaged: drop --resume_from_checkpoint and start anew" in run.err
    assert len(complete_checkpoints(full.folder / "checkpoints")) == 3


@pytest.mark.parametrize("flags", [["--use_vera", "--vera_rank"], ["--use_lora", "--lora_rank"]])
def test_an_adapter_that_no_memory_holds_is_one_line(flags, train):
    run = train("run", *flags, "1000000000000", *SHORT)
    assert run.code == 2 and "1000000000000 is out of range" in run.err
    assert run.err.count("\n") == 1
