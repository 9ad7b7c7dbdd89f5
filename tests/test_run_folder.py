"""A run owns its folder: one process at a time, and nothing that others put there is replaced or removed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from open_instruct.finetune_peft import main
from open_instruct.locks import LOCK
from open_instruct.training.run_folder import RunFolder
from tests.conftest import ROOT, TINY_MODEL, without_measurements, write_conversations

SHORT = ["--use_prompt_tuning", "--max_train_steps", "6", "--eval_steps", "3", "--per_device_train_batch_size", "4"]


def content(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


FOREIGN = {
    "metrics.jsonl": "metrics.jsonl",
    "run.json": "run.json",
    "summary.json": "summary.json",
    "loss.png": "loss.png",
    "generation_config.json": "generation_config.json",
    "model-00001-of-00002.safetensors": "a model that the run did not make",
    "adapter_config.json": "a model that the run did not make",
    "tokenizer.json": "tokenizer.json",
    "checkpoints/step_4/COMPLETED": "checkpoints",
    "checkpoints": "checkpoints",
}


@pytest.mark.parametrize("flags", [[], ["--overwrite_output_dir"], ["--resume_from_checkpoint"]])
@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_others_that_are_named_like_a_runs_are_refused(name, flags, train, tmp_path):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"precious": 1}')
    before = content(tmp_path / "run")
    run = train("run", *SHORT, *flags)
    error = run.err.splitlines()[-1]  # before it, damaged checkpoints are named
    assert run.code == 2 and error.startswith("error: ") and FOREIGN[name] in error
    assert content(tmp_path / "run") == before


@pytest.mark.parametrize("make", [lambda path: path.symlink_to(path.parents[1] / "nothing"), os.mkfifo])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "loss.png", "run.json", LOCK])
def test_a_link_or_a_pipe_in_place_of_a_file_is_left_alone(name, make, train, tmp_path):
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / name)
    before = [(path, path.lstat().st_mode, path.lstat().st_ino) for path in (tmp_path / "run").iterdir()]
    run = train("run", *SHORT, "--overwrite_output_dir")
    assert run.code == 2 and run.err.count("\n") == 1 and (name in run.err or "can't be written" in run.err)
    after = [(path, path.lstat().st_mode, path.lstat().st_ino) for path in (tmp_path / "run").iterdir()]
    assert after == before and not (tmp_path / "nothing").exists()


def test_what_others_keep_in_the_folder_survives_every_run(train, tmp_path, data_file):
    """The base and the data lie below the output folder; and a note lies within a checkpoint of the run."""
    out = tmp_path / "run"
    for name in ("checkpoints/epoch3.ckpt", "checkpoints/step_4.bak/state.json", "former.txt"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("precious")
    shutil.copytree(TINY_MODEL, out / "checkpoints" / "base")
    data = shutil.copy(data_file, out / "checkpoints" / "train.jsonl")
    before = content(out)
    flags = [*SHORT, "--checkpointing_steps", "2", "--keep_last_n_checkpoints", "1"]
    run = train("run", *flags, data=Path(data), model=out / "checkpoints" / "base")
    assert run.code == 0, run.err
    (out / "checkpoints" / "step_6" / "note.txt").write_text("precious")
    before["checkpoints/step_6/note.txt"] = b"precious"
    run = train("run", *SHORT, "--overwrite_output_dir", data=Path(data), model=out / "checkpoints" / "base")
    assert run.code == 0 and before.items() <= content(out).items()
    assert sorted(path.name for path in (out / "checkpoints" / "step_6").iterdir()) == ["note.txt"]


@pytest.mark.parametrize("place, reason", [
    ("{model}/run", "lies inside"), ("{link}/run", "lies inside"), ("{link}", "is also the folder of the base model"),
    ("{tokenizer}", "is also the folder of the tokenizer"), ("{data}", "is also the folder of the data"),
    ("{model}/config.json/run", "config.json is a file"), ("{nowhere}", "is a link to nothing"),
    ("{nowhere}/run", "is a link to nothing"), ("{loop}/run", "is a link to nothing"), ("{bytes}", "is not UTF-8"),
])  # fmt: skip
def test_folders_that_can_not_be_the_runs_are_one_line(place, reason, train, tmp_path):
    places = {name: tmp_path / name for name in ("model", "tokenizer", "link", "data", "nowhere", "loop")}
    shutil.copytree(TINY_MODEL, places["model"])
    places["bytes"] = tmp_path / os.fsdecode(b"bad\xff")
    places["tokenizer"].mkdir()
    for path in TINY_MODEL.glob("*token*"):
        shutil.copy(path, places["tokenizer"])
    places["link"].symlink_to(places["model"])
    places["nowhere"].symlink_to(tmp_path / "nothing")
    places["loop"].symlink_to(places["loop"])
    places["data"].mkdir()
    write_conversations(places["data"] / "a.jsonl", "reverse", 8)
    before = content(tmp_path)
    flags = [*SHORT, "--overwrite_output_dir", "--tokenizer_name_or_path", str(places["tokenizer"])]
    run = train(place.format(**places), *flags, model=places["model"], data=places["data"])
    assert run.code == 2 and reason in run.err and run.err.count("\n") == 1
    assert content(tmp_path) == before


def test_one_process_at_a_time_and_a_killed_one_is_no_obstacle(train, tmp_path):
    program = (
        "import pathlib, sys, time\nfrom open_instruct.locks import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), 'it'):\n    print('locked', flush=True)\n    time.sleep(600)"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "run" / LOCK)]
    holder = subprocess.Popen(words, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True)
    assert holder.stdout and holder.stdout.readline() == "locked\n"
    run = train("run", *SHORT)
    assert run.code == 2 and f"is in use by process {holder.pid}" in run.err and run.err.count("\n") == 1
    assert os.listdir(run.folder) == [LOCK]
    assert train("run", *SHORT, "--dry_run").code == 0  # writes nothing
    holder.kill()
    holder.communicate()
    run = train("run", *SHORT)
    assert run.code == 0 and not (run.folder / LOCK).exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / LOCK).write_text("precious")
    assert train("other", *SHORT).code == 2 and (tmp_path / "other" / LOCK).read_text() == "precious"


def test_a_name_that_is_too_long_is_one_line(data_file, capsys):
    words = ["--model_name_or_path", str(TINY_MODEL), "--train_file", str(data_file), "--output_dir", "x" * 300]
    assert main([*words, *SHORT]) == 2
    assert "File name too long" in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_a_refused_run_leaves_no_folder(train, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    assert train("a/b/run", *SHORT, data=tmp_path / "empty.jsonl").code == 2
    assert not (tmp_path / "a").exists()


def test_an_earlier_checkpoint_sets_the_later_ones_aside(train):
    flags = [*SHORT, "--checkpointing_steps", "1", "--keep_last_n_checkpoints"]
    full = train("full", *flags, "-1")
    part = full.folder.parent / "part"
    shutil.copytree(full.folder, part)
    (part / "summary.json").unlink()
    run = train("part", *flags, "2", "--resume_from_checkpoint", str(part / "checkpoints" / "step_2"))
    assert run.code == 0 and f"moved to {part / 'former-1'}" in run.out
    assert without_measurements(run.metrics) == without_measurements(full.metrics)
    assert {path.name for path in (part / "checkpoints").iterdir()} == {"step_5", "step_6"}
    aside = part / "former-1"
    assert {path.name for path in (aside / "checkpoints").iterdir()} == {f"step_{step}" for step in (3, 4, 5, 6)}
    assert (aside / "metrics.jsonl").read_bytes() == (full.folder / "metrics.jsonl").read_bytes()
    same = "adapter_model.safetensors"
    assert (part / same).read_bytes() == (full.folder / same).read_bytes()


def test_a_checkpoint_is_not_resumed_into_the_folder_of_another_run(train, tmp_path):
    flags = [*SHORT, "--checkpointing_steps", "2"]
    first = train("first", *flags)
    second = train("second", "--use_ia3", *SHORT[1:], "--checkpointing_steps", "2")
    (second.folder / "summary.json").unlink()
    shutil.copytree(TINY_MODEL, tmp_path / "model")
    resume = ["--resume_from_checkpoint", str(first.folder / "checkpoints" / "step_4")]
    for name in ("second", "model", "first"):
        before = content(tmp_path / name)
        run = train(name, *flags, *resume)
        assert run.code == 2 and run.err.count("\n") == 1 and content(tmp_path / name) == before
    run = train("third", *flags, *resume)
    assert run.code == 0, run.err
    same = "adapter_model.safetensors"
    assert (run.folder / same).read_bytes() == (first.folder / same).read_bytes()


def test_a_result_without_a_summary_is_set_aside_when_a_job_starts_again(train):
    """It was killed while its answers were computed, and has no checkpoint to go on from."""
    run = train("run", *SHORT)
    before = (run.folder / "adapter_model.safetensors").read_bytes()
    (run.folder / "summary.json").unlink()
    assert "holds a model" in train("run", *SHORT).err
    again = train("run", *SHORT, "--seed", "7", "--resume_from_checkpoint")
    assert again.code == 0, again.err
    assert (run.folder / "former-1" / "adapter_model.safetensors").read_bytes() == before
    assert (run.folder / "former-1" / "run.json").exists()


def test_folders_of_older_versions_are_resumed_and_overwritten(train):
    flags = [*SHORT, "--checkpointing_steps", "2"]
    run = train("run", *flags)
    record = json.loads((run.folder / "run.json").read_text())
    for change in (lambda: (run.folder / "summary.json").unlink(), lambda: None):
        (run.folder / "run.json").write_text(json.dumps({k: v for k, v in record.items() if k != "files"}))
        change()
        resumes = not (run.folder / "summary.json").exists()
        again = train("run", *flags, "--resume_from_checkpoint" if resumes else "--overwrite_output_dir")
        assert again.code == 0, again.err
        names = json.loads((run.folder / "run.json").read_text())["files"]
        assert {name for name in names if (run.folder / name).exists()} == {
            str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.parent.name[:5] != "step_"
        } - {"checkpoints"}


def test_a_list_of_files_that_leads_elsewhere_is_cut(tmp_path):
    names = ["../a", "/a", "a/b", "..", "", "checkpoints", "checkpoints/../a", "checkpoints/step_1", "metrics.jsonl", 5]
    (tmp_path / "run.json").write_text(json.dumps({"flags": {}, "versions": {}, "files": names}))
    assert RunFolder.read(tmp_path).files == {"checkpoints/step_1", "metrics.jsonl"}
