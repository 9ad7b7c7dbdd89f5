"""On a task that no recipe was tuned for, every method learns by default; with users' old settings the loss rises."""

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import METHODS, method_flags, write_conversations

STEPS = ["--max_train_steps", "40", "--eval_steps", "0", "--validation_fraction", "0.15"]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_conversations(tmp_path_factory.mktemp("task") / "double.jsonl", "double", 300, seed=11)


@pytest.mark.parametrize("method", METHODS)
def test_the_recipe_brings_the_loss_below_the_base_models(method, task, train):
    run = train("run", *method_flags(method), *STEPS, data=task)
    assert run.code == 0, run.err
    assert run.summary["final_eval_loss"] < 0.9 * run.summary["base_eval_loss"]


def test_the_users_settings_end_above_the_base_model(tmp_path, train):
    """The complaint that this project began with: open-instruct's rate with PEFT's random start. The run says so."""
    task = write_conversations(tmp_path / "sort.jsonl", "sort", 300, seed=11)
    run = train(
        "run", "--use_prompt_tuning", "--prompt_tuning_init", "random", "--learning_rate", "2e-5", *STEPS, data=task
    )
    assert run.summary["final_eval_loss"] > run.summary["base_eval_loss"]
    assert "warning: the held-out loss is not below the base model's" in run.out


def test_a_soft_prompt_calls_a_skill_that_the_base_has(train, tmp_path):
    """The bundled task: exact match of held-out answers rises clearly."""
    data = write_conversations(tmp_path / "reverse.jsonl", "reverse", 600, seed=5)
    run = train("run", "--use_prompt_tuning", "--max_train_steps", "100", "--num_sample_answers", "40", data=data)
    assert run.summary["exact_match"]["base"] < 0.4
    assert run.summary["exact_match"]["tuned"] > 0.8


BY_HEART = [
    "--use_lora",
    "--learning_rate",
    "0.02",
    "--max_train_steps",
    "60",
    "--eval_steps",
    "5",
    "--max_train_samples",
    "8",
]


def held_out(run) -> dict[int, float]:
    """Held-out losses by step."""
    return {row["step"]: row["eval_loss"] for row in run.metrics if "eval_loss" in row}


def test_a_run_that_goes_on_to_learn_by_heart_saves_its_best(train, task, tmp_path):
    run = train("run", *BY_HEART, "--checkpointing_steps", "40", data=task)
    losses = held_out(run)
    step = run.summary["saved_step"]
    assert 0 < step < 60 and losses[60] > 1.02 * losses[step] == 1.02 * min(losses.values()), losses
    assert (run.summary["final_eval_loss"], run.summary["last_eval_loss"]) == (losses[step], losses[60])
    assert f"the held-out loss was lowest after step {step}" in run.out
    last = train("last", *BY_HEART, "--keep_best", "False", data=task)
    assert last.summary["final_eval_loss"] == losses[60] and last.summary["saved_step"] == 60
    saved, ended = ((folder / "adapter_model.safetensors").read_bytes() for folder in (run.folder, last.folder))
    stopped = train(
        "stopped",
        *BY_HEART,
        "--keep_best",
        "False",
        "--checkpointing_steps",
        str(step),
        "--keep_last_n_checkpoints",
        "-1",
        data=task,
    )
    kept = load_file(sorted(stopped.folder.glob(f"checkpoints/step_{step}"))[0] / "trained.safetensors")
    trained = load_file(run.folder / "adapter_model.safetensors")
    assert saved != ended and all(
        torch.equal(trained[name.replace(".default", "")], value) for name, value in kept.items()
    )


def test_the_best_survives_a_resume(train, task):
    """Resumed after its best evaluation, a run still saves that one."""
    flags = [*BY_HEART, "--checkpointing_steps", "40"]
    whole = train("whole", *flags, data=task)
    assert whole.summary["saved_step"] < 40
    content = (whole.folder / "adapter_model.safetensors").read_bytes()
    for name in ("summary.json", "adapter_model.safetensors"):
        (whole.folder / name).unlink()
    resumed = train("whole", *flags, "--resume_from_checkpoint", data=task)
    assert resumed.code == 0 and "resuming after step 40" in resumed.out, resumed.err
    assert (whole.folder / "adapter_model.safetensors").read_bytes() == content
    assert resumed.summary["final_eval_loss"] == whole.summary["final_eval_loss"]
