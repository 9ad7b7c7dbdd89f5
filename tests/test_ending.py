"""--patience: when a run ends early, what it saves, and that a resumed run ends where the uninterrupted one does."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from open_instruct.errors import InputError
from open_instruct.training.ending import check_patience, has_ended
from open_instruct.training.state import History, TrainState
from tests.conftest import without_measurements, write_conversations

# Few examples at a high rate: they are soon learned by heart, and the held-out loss rises.
HEART = ["--use_lora", "--learning_rate", "2e-2", "--max_train_steps", "40", "--per_device_train_batch_size", "4"]
HEART += ["--eval_steps", "2", "--checkpointing_steps", "2", "--keep_last_n_checkpoints", "-1"]


def held_out_losses(run) -> dict[int, float]:
    return {row["step"]: row["eval_loss"] for row in run.metrics if "eval_loss" in row and row["step"]}


def plain_end(losses: dict[int, float], patience: int) -> int | None:
    """The first step whose last `patience` evaluations are all no lower than the lowest before them."""
    steps = sorted(losses)
    for last in range(patience, len(steps)):
        lowest = min(losses[step] for step in steps[: last - patience + 1])
        if all(losses[step] >= lowest for step in steps[last - patience + 1 : last + 1]):
            return steps[last]
    return None


def test_a_run_ends_early_saves_its_best_and_resumes_to_the_same_end(train, tmp_path):
    data = write_conversations(tmp_path / "few.jsonl", "reverse", 30)
    patient = train("patient", *HEART, "--patience", "2", data=data)
    full = train("full", *HEART, data=data)
    assert patient.code == full.code == 0, patient.err
    end = plain_end(held_out_losses(full), 2)
    assert end is not None and end < 40, held_out_losses(full)
    assert patient.summary["steps"] == end and full.summary["steps"] == 40
    # The schedule is that of all planned steps: row by row, it is the same run until its end.
    shared = [row for row in without_measurements(full.metrics) if row["step"] <= end]
    assert without_measurements(patient.metrics) == shared
    losses = held_out_losses(patient)
    assert patient.summary["saved_step"] == min(losses, key=losses.__getitem__) == end - 4
    assert patient.summary["final_eval_loss"] == min(losses.values())
    why = f"--patience, after step {end} of 40: the last 2 held-out evaluations found no lower loss"
    assert patient.summary["ended_by"] == why and patient.out.count(why) == 2
    assert full.summary["ended_by"] == "all 40 steps of the plan"

    weights = load_file(patient.folder / "adapter_model.safetensors")
    for step in (end - 2, end):  # at the last one nothing is left to train
        part = tmp_path / f"from{step}"
        shutil.copytree(patient.folder, part)
        (part / "summary.json").unlink()
        saved = str(part / "checkpoints" / f"step_{step}")
        resumed = train(part.name, *HEART, "--patience", "2", "--resume_from_checkpoint", saved, data=data)
        assert resumed.code == 0 and f"resuming after step {step}" in resumed.out, resumed.err
        assert without_measurements(resumed.metrics) == without_measurements(patient.metrics)
        assert resumed.summary["ended_by"] == why
        again = load_file(part / "adapter_model.safetensors")
        assert all(torch.equal(weights[name], again[name]) for name in weights)

    last = train("last", *HEART, "--patience", "2", "--keep_best", "False", data=data)
    assert last.summary["saved_step"] == last.summary["steps"] == end
    assert last.summary["final_eval_loss"] == losses[end]


@pytest.mark.parametrize(
    "losses, count",
    [
        ([], 0),
        ([2.0], 0),
        ([2.0, 1.0, 1.0, 1.5], 2),  # an equal loss is no lower one
        ([2.0, 2.5, 2.2, 1.9], 0),
        ([2.0, math.nan, math.inf], 2),
        ([math.nan, 3.0], 0),  # nor does one that is not finite count as the lowest
    ],
)
def test_evaluations_without_a_lower_loss_are_counted(losses, count):
    state = TrainState(step=9, history=History(evaluations=list(enumerate(losses, start=1))))
    assert state.history.num_without_better == count
    assert has_ended(state, 20, 2) == (count >= 2) and not has_ended(state, 20, None) and has_ended(state, 9, None)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--validation_fraction", "0"], "--patience 2: no rows are held out"),
        (["--eval_steps", "0"], "--patience 2: --eval_steps 0 measures only the start and the end"),
        (["--eval_steps", "4"], "--patience 2 needs 3 held-out evaluations before the last of the 12 steps"),
        (["--patience", "0"], "--patience 0 is out of range"),
    ],
)
def test_a_patience_without_effect_is_refused(flags, says, train):
    run = train("run", "--use_lora", "--max_train_steps", "12", "--patience", "2", *flags)
    assert run.code == 2 and says in run.err and run.err.count("\n") == 1
    assert not (run.folder / "metrics.jsonl").exists()


def test_the_least_number_of_evaluations():
    check_patience(2, 4, 13)
    check_patience(None, 0, 1)
    with pytest.raises(InputError, match="and there are 2"):
        check_patience(2, 4, 12)
