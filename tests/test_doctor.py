"""Each finding of the loss doctor is provoked once; healthy runs trigger none."""

import json
import random
import shutil
from dataclasses import replace

import pytest

from open_instruct.training.checkpoint import state_values
from open_instruct.training.doctor import Doctor, RunInfo
from open_instruct.training.state import History, TrainState
from tests.conftest import METHODS, method_flags

HEALTHY = RunInfo(
    learning_rate=1e-3,
    num_steps=200,
    warmup_steps=6,
    clip_grad_norm=1.0,
    labelled_share=0.4,
    embedding_std=0.02,
    vocabulary_norm=1.0,
)
RUN = ["--max_train_steps", "60", "--per_device_train_batch_size", "8", "--dataset_skip_cache"]


def names(run) -> set[str]:
    """Return the names of a run's findings: as many in its summary as on the terminal."""
    findings = run.summary["findings"]
    assert run.out.count("doctor: ") == len(findings)
    return {finding["name"] for finding in findings}


def falling(doctor: Doctor, steps: int, start: float = 2.0, noise: float = 0.3) -> list:
    """Return the findings of a run whose losses fall and whose gradients are calm."""
    rng = random.Random(0)
    return [
        f for i in range(steps) for f in doctor.step(start * (1 - i / 400) + noise * rng.random(), 0.5 + rng.random())
    ]


@pytest.mark.parametrize("method", METHODS)
def test_a_healthy_run_triggers_nothing(method, train):
    run = train("run", *method_flags(method), *RUN)
    assert run.code == 0 and names(run) == set(), run.out


def test_the_failure_that_users_had_is_named(train):
    """2e-5 with a random start: both causes are reported, before the first step."""
    settings = ["--learning_rate", "2e-5", "--prompt_tuning_init", "random", "--num_virtual_tokens", "20"]
    run = train("run", "--use_prompt_tuning", *RUN, *settings)
    assert names(run) == {"rate too low", "start off the embeddings"}
    assert "doctor: at learning rate 2e-05, 60 steps move an entry of the soft prompt by at most 0.0006" in run.out
    assert "3.9 times as long as the vocabulary's" in run.out and "--prompt_tuning_init sample_vocab" in run.out
    assert run.summary["final_eval_loss"] > run.summary["base_eval_loss"]


@pytest.mark.parametrize("flags, expected", [
    (["--use_lora", "--learning_rate", "0.5"], {"rate too high"}),
    (["--use_lora", "--learning_rate", "1e-7"], {"rate too low"}),
    (["--use_prefix_tuning", "--learning_rate", "2e-5"], {"rate too low"}),
    (["--use_prompt_tuning", "--learning_rate", "30"], {"drift", "rate too high"}),
])  # fmt: skip
def test_a_rate_that_does_not_fit_is_named(flags, expected, train):
    run = train("run", *RUN, *flags)
    assert names(run) == expected, run.out


def test_answers_that_are_cut_away_are_named(train, tmp_path):
    rows = []
    for number in range(60):
        rows.append({"prompt": "red green blue stone " * 60 + str(number), "completion": "red"})
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train("run", "--use_lora", *RUN, "--max_train_steps", "2", data=path)
    assert names(run) == {"labels"} and "of the training tokens are labelled" in run.out


def test_rows_that_are_cut_or_dropped_are_named_with_figures(train, tmp_path):
    """From a twentieth of the rows on; that the held-out rows are few is a line."""
    rows = [{"prompt": "red " * (2 if number % 5 else 60), "completion": "red blue green"} for number in range(60)]
    path = tmp_path / "ragged.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train("run", "--use_lora", *RUN, "--max_train_steps", "2", "--max_seq_length", "40", data=path)
    assert names(run) == {"cut"}, run.out
    assert "of 60 conversations 12 (20%) are longer than 40 tokens and were cut, and 12 (20%) were dropped" in run.out
    assert "--max_seq_length" in run.out and "held out: 10 rows are few to choose the saved parameters by" in run.out
    last = train("last", "--use_lora", *RUN, "--max_train_steps", "2", "--keep_best", "False", data=path)
    assert names(last) == set() and "are few to choose" not in last.out
    limit = replace(HEALTHY, num_read=100, num_truncated=5, num_skipped=5)
    assert Doctor(limit, History()).before() == []
    assert [f.name for f in Doctor(replace(limit, num_skipped=6), History()).before()] == ["cut"]


@pytest.mark.parametrize("flags, expected", [
    (["--use_prompt_tuning", "--learning_rate", "30"], {"drift", "rate too high"}),
    (["--use_lora", "--learning_rate", "1e-7", "--clip_grad_norm", "1e-3"], {"rate too low"}),
])  # fmt: skip
def test_the_findings_of_a_killed_run_are_those_of_the_uninterrupted_one(flags, expected, train):
    """Killed at several steps, and resumed from the checkpoint before: the same findings at the same steps."""
    flags = [*RUN, *flags, "--checkpointing_steps", "7", "--keep_last_n_checkpoints", "-1", "--eval_steps", "10"]
    full = train("full", *flags)
    assert names(full) >= expected, full.out
    for step in (7, 42):
        part = full.folder.parent / f"part{step}"
        shutil.copytree(full.folder, part)
        (part / "summary.json").unlink()
        saved = str(part / "checkpoints" / f"step_{step}")
        resumed = train(f"part{step}", *flags, "--resume_from_checkpoint", saved)
        assert resumed.code == 0, resumed.err
        assert resumed.summary["findings"] == full.summary["findings"], step


def test_examples_learned_by_heart_are_a_gap():
    doctor = Doctor(HEALTHY, History())
    doctor.first(2.0, 2.0)
    for step, loss, trained in ((40, 1.5, 1.2), (80, 1.4, 0.6), (120, 1.7, 0.2)):
        for _ in range(40):
            assert doctor.step(trained, 0.5) == []
        last = [f.name for f in doctor.evaluation(step, loss)]
    assert last == ["gap"]


def test_what_was_learned_and_lost_again_is_no_low_rate():
    doctor = Doctor(replace(HEALTHY, num_steps=150), History())
    doctor.first(3.67, 3.67)
    for step, loss, trained in ((30, 2.98, 1.9), (60, 3.43, 0.3), (90, 3.63, 0.1), (120, 3.65, 0.1)):
        for _ in range(30):
            assert doctor.step(trained, 0.5) == []
        assert [f.name for f in doctor.evaluation(step, loss)] == (["gap"] if step == 60 else [])


def test_a_rising_training_loss_is_a_rate_or_an_order():
    rising = Doctor(HEALTHY, History())
    rising.first(2.0, 2.0)
    falling(rising, 60)
    assert [f.name for i in range(40) for f in rising.step(2.5 + i / 10, 5.0 + i)] == ["rate too high"]
    ordered = Doctor(HEALTHY, History())
    ordered.first(2.0, 2.0)
    for step, loss, trained in ((40, 1.8, 1.2), (80, 1.6, 1.1), (120, 1.4, 1.7)):
        for _ in range(40):
            assert ordered.step(trained, 0.5) == []
        last = [f.name for f in ordered.evaluation(step, loss)]
    assert last == ["order"]


def test_clipping_at_every_step_is_named_once():
    doctor = Doctor(HEALTHY, History())
    assert [f.name for _ in range(120) for f in doctor.step(1.0, 40.0)] == ["clipped"]
    assert Doctor(replace(HEALTHY, clip_grad_norm=0.0), History()).step(1.0, 1e6) == []


def test_a_run_that_does_not_get_below_its_base_is_named():
    doctor = Doctor(HEALTHY, History())
    doctor.first(1.0, 1.6)
    falling(doctor, 100)
    assert [f.name for f in doctor.evaluation(80, 1.2)] == []  # not yet half of the steps
    assert [f.name for f in doctor.evaluation(110, 1.05)] == ["above the base"]
    assert doctor.evaluation(150, 1.04) == []  # once


def test_a_resumed_run_knows_what_was_measured_and_reported_before():
    doctor = Doctor(HEALTHY, History(base=1.0, initial=1.6, prompt_norm=1.0, reported=["clipped"]))
    assert [f.name for _ in range(60) for f in doctor.step(1.0, 40.0)] == []
    assert [f.name for f in doctor.evaluation(60, 2.5)] == ["rate too high"]
    never_measured = Doctor(HEALTHY, History())
    assert [f for step in (100, 150) for f in never_measured.evaluation(step, 3.0)] == []


def test_a_resumed_run_finds_what_the_uninterrupted_one_finds():
    """A history cut at any step and read back from JSON gives the same findings; an emptied one does not."""
    losses = [(step, 1.2 - step / 100 if step < 60 else 2.5 + step / 20) for step in range(100)]

    def findings(cut: int, keep: bool = True) -> list[tuple[int, str]]:
        doctor, names = Doctor(HEALTHY, History(prompt_norm=1.0)), []
        names += [(0, f.name) for f in doctor.first(2.0, 2.0)]
        for step, loss in losses:
            if step == cut:
                state = TrainState(history=doctor.history)
                values = json.loads(json.dumps(state_values(state)))["history"]
                doctor = Doctor(HEALTHY, History(**values) if keep else History())
            names += [(step, f.name) for f in doctor.step(loss, 1.0)]
        return names

    uninterrupted = findings(-1)
    assert [name for _, name in uninterrupted] == ["rate too high"]
    assert all(findings(cut) == uninterrupted for cut in range(5, 100, 5))
    assert findings(55, keep=False) != uninterrupted


def test_a_calm_run_is_left_alone():
    doctor = Doctor(HEALTHY, History(prompt_norm=1.0))
    assert doctor.before() == [] == doctor.first(2.0, 2.1)
    assert falling(doctor, 200) == []
    assert [f for step in (40, 80, 120, 160, 200) for f in doctor.evaluation(step, 2.1 - step / 200, 1.5)] == []
