"""Studies from end to end: trials that equal a run of their own, kills, shards, searches, figures that are true."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from open_instruct import study_peft
from open_instruct.finetune_peft import main as finetune
from open_instruct.study import trials
from open_instruct.study.results import other_loss
from tests import warm
from tests.conftest import ROOT, TINY_MODEL, TINY_T5, write_conversations

ENTRY = ROOT / "open_instruct" / "study_peft.py"
PATIENCE = 600  # s; no test waits so long, but a loaded machine may take many times what an idle one does


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Training and held-out words in reverse, and other skills."""
    folder = tmp_path_factory.mktemp("study-data")
    write_conversations(folder / "train.jsonl", "reverse", 120)
    write_conversations(folder / "heldout.jsonl", "reverse", 30, seed=9)
    write_conversations(folder / "other.jsonl", "sort", 10, seed=8)
    return folder


def write_study(folder: Path, data: Path, **changes) -> Path:
    """A small study as YAML; `changes` replace its parts."""
    content = {
        "name": "small",
        "output_dir": str(folder / "study"),
        "flags": {
            "model_name_or_path": str(TINY_MODEL),
            "train_file": str(data / "train.jsonl"),
            "validation_file": str(data / "heldout.jsonl"),
            "dataset_local_cache_dir": str(data / "cache"),
            "max_train_steps": 6,
            "per_device_train_batch_size": 8,
            "eval_steps": 3,
        },
        "methods": {
            "lora": None,
            "full": None,
            "ia3": None,
            "prompt_tuning": {"num_virtual_tokens": 5},
            "prefix_tuning": None,
        },
        "search": {"kind": "grid", "space": {"learning_rate_factor": [1]}},
        "seeds": [1],
        "report": {"questions": 6, "max_new_tokens": 12, "other_text": str(data / "other.jsonl")},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


def trials_of(folder: Path) -> list[dict[str, str]]:
    """The rows of trials.csv."""
    with (folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A study of five methods in one process."""
    folder = tmp_path_factory.mktemp("finished")
    assert study_peft.main(["--config", str(write_study(folder, data))]) == 0
    return folder / "study"


def test_the_report_is_complete_and_needs_no_network(finished):
    page = (finished / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and page.count("<img") == 6 == page.count("data:image/png;base64,")
    assert not re.search(r"(src|href)=\"?(http|//|\w+\.)", page) and "<script" not in page
    markdown = (finished / "report.md").read_text()
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", markdown):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    for method in ("full", "lora", "ia3", "prompt_tuning", "prefix_tuning"):
        assert markdown.count(method) > 3


def test_figures_are_those_of_the_trials(finished):
    """Recomputed from what the trials left, by hand."""
    report = json.loads((finished / "report.json").read_text())
    base = json.loads(next(finished.glob("base-*.json")).read_text())["study"]
    assert set(base["test"]).isdisjoint(base["choosing"]) and len(base["test"]) + len(base["choosing"]) == 30
    tokens = sum(base["rows"][i][1] for i in base["test"])
    assert report["test_tokens"] == tokens
    assert report["base"]["loss"] == pytest.approx(sum(base["rows"][i][0] for i in base["test"]) / tokens)
    for method in report["methods"]:
        (row,) = [row for row in trials_of(finished) if row["method"] == method["name"]]
        summary = json.loads((Path(row["folder"]) / "summary.json").read_text())
        rows = summary["study"]["rows"]
        split_loss = sum(loss for loss, _ in rows) / sum(num_labels for _, num_labels in rows)
        # By PEFT's padded forward pass, and by the packed one.
        assert split_loss == pytest.approx(summary["final_eval_loss"], rel=1e-4)
        assert method["test"]["value"] == pytest.approx(sum(rows[i][0] for i in base["test"]) / tokens)
        assert method["forgetting"] == pytest.approx(other_loss(summary) - report["base"]["other"])
        low, high = method["forgetting_interval"]
        assert low < method["forgetting"] < high
        if method["name"] == "lora":
            pairs = np.array([summary["study"]["other"], base["other"]])  # [2, rows, loss and tokens]
            chosen = np.random.default_rng(1).integers(0, 10, (4000, 10))
            drawn = (pairs[0, chosen, 0] - pairs[1, chosen, 0]).sum(1) / pairs[1, chosen, 1].sum(1)
            by_hand = np.quantile(drawn, [0.025, 0.975])  # other draws: equal but for chance
            assert [low, high] == pytest.approx(by_hand.tolist(), abs=0.1 * (high - low))
    values = [method["test"]["value"] for method in report["methods"]]
    assert values == sorted(values) and f"{values[0]:.4f}" in report["sentences"][1]


def test_plain_text_is_no_other_text_of_an_encoder_decoder(data, tmp_path, capsys):
    (tmp_path / "other.jsonl").write_text('{"text": "apple stone"}\n')
    flags = {"model_name_or_path": str(TINY_T5), "train_file": str(data / "train.jsonl"), "max_train_steps": 1}
    for other, code in (("other.jsonl", 2), (str(data / "other.jsonl"), 0)):
        report = {"other_text": str(tmp_path / other)}
        path = write_study(tmp_path, data, flags=flags | {"validation_fraction": 0.1}, methods=["lora"], report=report)
        assert study_peft.main(["--config", str(path), "--dry_run"]) == code
        assert ("predicts answers only" in capsys.readouterr().err) == bool(code)


SPOILT = {
    "summary.json": ["", "[", "{}", '{"study": {"rows": 5}}', "9" * 5000],
    "run.json": ["[]", '{"flags": {"learning_rate": 5}}'],
    "metrics.jsonl": ['{"step": "x", "eval_loss": 1}', "5\n"],
}


def test_a_damaged_trial_is_said_and_the_others_are_reported(finished, tmp_path, capsys):
    folder = tmp_path / "study"
    shutil.copytree(finished, folder)
    (trial,) = folder.glob("trials/lora-*")
    words = ["--config", str(finished.parent / "study.yaml"), "--output_dir", str(folder), "--report_only"]
    for name, contents in SPOILT.items():
        whole = (trial / name).read_text()
        for content in contents[-1:] if name != "summary.json" else contents[-2:]:
            (trial / name).write_text(content)
            capsys.readouterr()
            assert study_peft.main(words) == 0
            error = capsys.readouterr().err
            report = json.loads((folder / "report.json").read_text())
            assert error.count("\n") == 1 and name in error and "lora" in error, error
            assert any(name in sentence for sentence in report["sentences"]) and len(report["methods"]) == 4
        (trial / name).write_text(whole)
    for contents in SPOILT.values():
        for content in contents:
            (trial / "summary.json").write_text(content)
            assert read_damaged(trial)


def read_damaged(folder: Path) -> bool:
    """Whether a trial's outcome counts as none."""
    task = SimpleNamespace(folder=folder)
    return trials.read_outcome(task) is None


def test_figures_of_a_base_that_are_damaged_are_measured_anew(finished, tmp_path, capsys):
    folder = tmp_path / "study"
    shutil.copytree(finished, folder)
    (base,) = folder.glob("base-*.json")
    before = json.loads(base.read_text())
    base.write_text("{")
    words = ["--config", str(finished.parent / "study.yaml"), "--output_dir", str(folder)]
    assert study_peft.main([*words, "--report_only"]) == 2
    error = capsys.readouterr().err
    assert "no trial of" in error and "Traceback" not in error
    times = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/summary.json")}
    assert study_peft.main(words) == 0
    assert json.loads(base.read_text()) == before
    assert times == {path: path.stat().st_mtime_ns for path in times}


@pytest.mark.parametrize("method", ["full", "ia3", "prompt_tuning", "prefix_tuning"])
def test_the_command_repeats_a_trial_exactly(method, finished, tmp_path):
    """A trial that ran after others on the same base equals a run of its own: they left nothing in the base."""
    (row,) = [row for row in trials_of(finished) if row["method"] == method]
    words = shlex.split(row["command"])
    assert words[:2] == ["python", "open_instruct/finetune_peft.py"]
    words[words.index("--output_dir") + 1] = str(tmp_path / "run")
    assert finetune(words[2:]) == 0
    own = json.loads((tmp_path / "run" / "summary.json").read_text())
    theirs = json.loads((Path(row["folder"]) / "summary.json").read_text())
    for name in ("base_eval_loss", "initial_eval_loss", "final_eval_loss"):
        assert own[name] == theirs[name]


def test_a_finished_study_runs_nothing_again_and_takes_more_seeds(data, tmp_path, capsys):
    methods = {"prompt_tuning": None, "ia3": None}
    assert study_peft.main(["--config", str(write_study(tmp_path, data, methods=methods))]) == 0
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("study/trials/*/summary.json")}
    capsys.readouterr()
    assert study_peft.main(["--config", str(write_study(tmp_path, data, methods=methods, seeds=[1, 2]))]) == 0
    assert "4 trials, 2 of them done before" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert len(trials_of(tmp_path / "study")) == 4


def test_a_kill_costs_one_trial(data, tmp_path):
    """Killed after two trials, and again later: finished trials stay as they are, and the end is the same."""
    path = write_study(tmp_path, data, methods={"prompt_tuning": None, "lora": None}, seeds=[1, 2, 3])
    kept: dict[Path, int] = {}
    for enough in (2, 4):
        process = warm.start(ENTRY, "--config", str(path))
        while len(list(tmp_path.glob("study/trials/*/summary.json"))) < enough:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.kill()
        process.wait()
        done = {summary: summary.stat().st_mtime_ns for summary in tmp_path.glob("study/trials/*/summary.json")}
        assert enough <= len(done) < 6, "the study was over before it was killed"
        assert all(done[summary] == when for summary, when in kept.items())
        kept = done
    assert study_peft.main(["--config", str(path)]) == 0
    assert all(summary.stat().st_mtime_ns == when for summary, when in kept.items())
    uninterrupted = write_study(
        tmp_path,
        data,
        methods={"prompt_tuning": None, "lora": None},
        seeds=[1, 2, 3],
        output_dir=str(tmp_path / "uninterrupted"),
    )
    assert study_peft.main(["--config", str(uninterrupted)]) == 0
    ends = [
        [(row["method"], row["seed"], row["test_loss"]) for row in trials_of(tmp_path / name)]
        for name in ("study", "uninterrupted")
    ]
    assert ends[0] == ends[1] and len(ends[0]) == 6


def test_shards_and_workers_make_the_same_study(data, tmp_path):
    methods = {"prompt_tuning": None, "ia3": None}
    path = write_study(tmp_path, data, methods=methods, seeds=[1, 2])
    for number in range(2):
        assert study_peft.main(["--config", str(path), "--shard", f"{number}/2"]) == 0
        assert len(list(tmp_path.glob("study/trials/*/summary.json"))) == 2 * (number + 1)
    assert study_peft.main(["--config", str(path), "--report_only"]) == 0
    other = write_study(tmp_path, data, methods=methods, seeds=[1, 2], output_dir=str(tmp_path / "two"))
    result = warm.run(ENTRY, "--config", str(other), "--workers", "2")
    assert result.returncode == 0, result.stderr
    losses = [
        {row["folder"].split("/")[-1]: float(row["test_loss"]) for row in trials_of(tmp_path / name)}
        for name in ("study", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_stopped_study_says_so_and_goes_on_within_its_trial(workers, data, tmp_path):
    """SIGTERM, as a cluster sends it: the trial's checkpoint is written, and no worker is left behind."""
    flags = yaml.safe_load(write_study(tmp_path, data).read_text())["flags"] | {"max_train_steps": 200}
    path = write_study(tmp_path, data, methods={"prompt_tuning": None}, flags=flags, seeds=[1, 2])
    process = warm.start(ENTRY, "--config", str(path), "--workers", workers)
    end = time.monotonic() + PATIENCE
    while not any(
        len(metrics.read_text().splitlines()) > 5 for metrics in tmp_path.glob("study/trials/*/metrics.jsonl")
    ):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)
    process.terminate()
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "the same command continues" in error and "Traceback" not in error, error
    end = time.monotonic() + PATIENCE
    while subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True).stdout:
        assert time.monotonic() < end, "a worker outlived the study"
        time.sleep(0.2)
    assert list(tmp_path.glob("study/trials/*/checkpoints/step_*")) and not list(
        tmp_path.glob("study/trials/*/summary.json")
    )
    assert study_peft.main(["--config", str(path)]) == 0
    logs = [log.read_text() for log in tmp_path.glob("study/trials/*/log.txt")]
    assert any("resuming after step" in log for log in logs) and len(trials_of(tmp_path / "study")) == 2


def test_ray_runs_a_study(data, tmp_path):
    """On a cluster of this machine alone."""
    pytest.importorskip("ray")
    path = write_study(tmp_path, data, methods={"prompt_tuning": None, "ia3": None})
    words = [
        sys.executable,
        str(ROOT / "open_instruct" / "study_peft.py"),
        "--config",
        str(path),
        "--engine",
        "ray",
        "--workers",
        "2",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    assert "2 trials, 0 of them done before" in result.stdout and len(trials_of(tmp_path / "study")) == 2


@pytest.mark.parametrize("kind", ["random", "halving"])
def test_searches_end_with_every_seed_at_full_length(kind, data, tmp_path):
    space = {"learning_rate_factor": {"low": 0.1, "high": 10.0}}
    settings = {"kind": kind, "points": 4, "eta": 2, "space": space}
    path = write_study(tmp_path, data, methods={"prompt_tuning": None, "ia3": None}, seeds=[1, 2], search=settings)
    assert study_peft.main(["--config", str(path)]) == 0
    rows = trials_of(tmp_path / "study")
    for method in ("prompt_tuning", "ia3"):
        trials = [row for row in rows if row["method"] == method]
        assert len(trials) == (5 if kind == "random" else 4 + 2 + 2)
        steps = sorted(int(row["steps"]) for row in trials)
        assert steps == ([6] * 5 if kind == "random" else [1] * 4 + [3] * 2 + [6] * 2)
        full_length = [row for row in trials if row["steps"] == "6"]
        best = min(full_length if kind == "halving" else trials[:4], key=lambda row: float(row["choosing_loss"]))
        assert {row["seed"] for row in full_length if row["point"] == best["point"]} == {"1", "2"}
    report = json.loads((tmp_path / "study" / "report.json").read_text())
    assert all(method["seeds"] == [1, 2] for method in report["methods"])


BAD = {
    "unequal tuning budgets (prompt_tuning 2, ia3 1 points)": {
        "methods": {"prompt_tuning": {"space": {"num_virtual_tokens": [1, 2]}}, "ia3": None}
    },
    "methods.ia3.max_train_steps must be the same for all methods": {"methods": {"ia3": {"max_train_steps": 9}}},
    "methods.ia3.max-train-steps must be the same for all methods": {"methods": {"ia3": {"max-train-steps": 9}}},
    "methods.ia3.no_add_bos must be the same for all methods": {"methods": {"ia3": {"no_add_bos": True}}},
    "looks like a flag": {"methods": {"ia3": {"report_to": ["all", "--max_train_steps", "9"]}}},
    "methods.promt_tuning 'promt_tuning' is not known": {"methods": {"promt_tuning": None}},
    "unknown serach, did you mean search?": {"serach": {}},
    "seeds [1, 1]": {"seeds": [1, 1]},
    "a grid needs a list": {"search": {"kind": "grid", "space": {"learning_rate": {"low": 1e-3, "high": 1.0}}}},
    "(1.0e-3, not 1e-3)": {"search": {"kind": "random", "space": {"learning_rate": {"low": "1e-3", "high": 1.0}}}},
    "ia3 (learning_rate_factor 1, seed 1): --num_virtual_tokens has no meaning for ia3": {
        "methods": {"ia3": {"num_virtual_tokens": 3}}
    },
    "report.other_text nowhere.txt: no such file": {"report": {"other_text": "nowhere.txt"}},
    "flags.cache_dataset_only is decided by the study": {"flags": {"cache_dataset_only": True}},
    "flags.seed is set twice": {"flags": {"split-seed": 1, "split_seed": 2, "seed": 3, "no_seed": 1}},
    "seeds [1099511627776]: give": {"seeds": [1 << 40]},
    "seeds [True]: give": {"seeds": [True]},
    "search.points 1000000000000 is not a whole number": {"search": {"kind": "random", "points": 10**12}},
    "there are 4,000,000 trials, and 10,000 are allowed": {
        "search": {"kind": "grid", "space": {"learning_rate": list(range(1, 2001)), "weight_decay": list(range(2000))}},
        "methods": {"ia3": None},
    },
    "low below high": {"search": {"kind": "random", "space": {"learning_rate": {"low": 1.0, "high": float("inf")}}}},
    "report.answer_regex '(((' can't be used": {"report": {"answer_regex": "((("}},
    "report.answer_regex '5' can't be used": {"report": {"answer_regex": 5}},
    "set flags.max_train_steps to a number": {"search": {"kind": "halving"}, "flags": {"max_train_steps": "many"}},
    "keep_full_weights 'no' is neither true nor false": {"keep_full_weights": "no"},
    "name '../x' is no name": {"name": "../x"},
    "methods 'a/b' is no name": {"methods": {"a/b": {"method": "ia3"}}},
    "methods '-x' is no name": {"methods": {"-x": {"method": "ia3"}}},
    "methods 'x\\ny' is no name": {"methods": {"x\ny": {"method": "ia3"}}},
    "output_dir '5' is no name of a folder": {"output_dir": 5},
}


@pytest.mark.parametrize("message", BAD)
def test_a_wrong_study_is_one_line(message, data, tmp_path, capsys):
    assert study_peft.main(["--config", str(write_study(tmp_path, data, **BAD[message]))]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "study").exists()


def test_a_misspelt_flag_is_named(data, tmp_path, capsys):
    assert study_peft.main(["--config", str(write_study(tmp_path, data, methods={"ia3": {"clip_grad_nrm": 1}}))]) == 2
    assert "did you mean --clip_grad_norm" in capsys.readouterr().err


def test_what_all_trials_share_is_not_a_failed_trial(data, tmp_path, capsys):
    """A wrong row ends the study, and once it is mended the same command runs."""
    train = tmp_path / "train.jsonl"
    train.write_text('{"prompt": "red"}\n')
    flags = yaml.safe_load(write_study(tmp_path, data).read_text())["flags"] | {"train_file": str(train)}
    words = ["--config", str(write_study(tmp_path, data, flags=flags, methods={"ia3": None}))]
    assert study_peft.main(words) == 2
    error = capsys.readouterr().err
    assert (
        "known forms are" in error and error.count("\n") == 1 and not list(tmp_path.glob("study/trials/*/failed.json"))
    )
    write_conversations(train, "reverse", 40)
    assert study_peft.main(words) == 0


def test_changed_data_is_not_mixed_into_old_results(data, tmp_path, capsys):
    train = write_conversations(tmp_path / "train.jsonl", "reverse", 60)
    base = yaml.safe_load(write_study(tmp_path, data).read_text())["flags"]
    changes = {"flags": base | {"train_file": str(train)}, "methods": {"ia3": None}}
    assert study_peft.main(["--config", str(write_study(tmp_path, data, **changes))]) == 0
    write_conversations(train, "sort", 60)
    capsys.readouterr()
    assert study_peft.main(["--config", str(write_study(tmp_path, data, **changes, seeds=[1, 2]))]) == 2
    assert "changed between trials" in capsys.readouterr().err


def test_a_trial_that_breaks_down_is_a_result(data, tmp_path):
    """A rate that overflows: the trial is reported as failed, the study continues."""
    methods = {"broken": {"method": "full", "learning_rate": 1e30, "clip_grad_norm": -1}, "ia3": None}
    search_all = {"kind": "grid", "space": {"weight_decay": [0.0]}}
    assert study_peft.main(["--config", str(write_study(tmp_path, data, methods=methods, search=search_all))]) == 0
    report = json.loads((tmp_path / "study" / "report.json").read_text())
    assert [method["works"] for method in report["methods"]] == [True, False]
    assert any("No point of broken finished" in sentence for sentence in report["sentences"])


STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))


# The data of metamathqa has to be prepared first: `test_shipped_studies.py` puts bundled data in its place.
@pytest.mark.parametrize("path", [path for path in STUDIES if path.stem != "metamathqa"], ids=lambda path: path.stem)
def test_shipped_studies_are_sound(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert study_peft.main(["--config", str(path), "--dry_run"]) == 0
    assert "python open_instruct/finetune_peft.py --model_name_or_path" in capsys.readouterr().out
