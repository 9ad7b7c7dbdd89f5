"""The main job, end to end, with every method."""

import hashlib
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from open_instruct.data import chat, packing
from open_instruct.data.reading import conversations, read_rows
from open_instruct.data.tokenising import new_counts, tokenize_all
from open_instruct.model.training_model import PaddedModel
from tests import warm
from tests.conftest import (
    METHODS,
    ROOT,
    TINY_MODEL,
    method_flags,
    no_dropout,
    without_measurements,
    write_conversations,
)

SHORT = ["--max_train_steps", "6", "--eval_steps", "3", "--per_device_train_batch_size", "4"]
VARIANTS = {name: method_flags(name) for name in METHODS} | {
    "projected_prefix": ["--use_prefix_tuning", "--prefix_projection"]
}


ENTRY = ROOT / "open_instruct" / "finetune_peft.py"


def model_hash() -> str:
    return hashlib.sha256((TINY_MODEL / "model.safetensors").read_bytes()).hexdigest()


@torch.no_grad()
def plain_loss(model, path) -> float:
    """Held-out loss by a plain loop over single examples, sharing no code with the evaluation of a run."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    chat.set_chat_template(tokenizer, "tulu")
    (table,) = tokenize_all(conversations(read_rows(path)), tokenizer, 1000, new_counts())
    total = count = 0
    for row in table.to_pylist():
        ids = torch.tensor([row["input_ids"]])
        labels = torch.tensor(packing.labels_of(row["input_ids"], row["spans"]))
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]
        losses = -torch.log_softmax(logits[:-1].double(), -1)[torch.arange(len(labels) - 1), labels[1:].clamp(min=0)]
        total += losses[labels[1:] != -100].sum().item()
        count += (labels[1:] != -100).sum().item()
    return total / count


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_saved_adapter_loads_with_plain_peft_and_gives_the_loss_of_the_summary(variant, train, tmp_path):
    before = model_hash()
    held_out = write_conversations(tmp_path / "heldout.jsonl", "reverse", 15, seed=3, long_every=4)
    run = train("run", *VARIANTS[variant], *SHORT, "--validation_file", str(held_out))
    assert run.code == 0, run.err
    expected = {
        "run.json",
        "metrics.jsonl",
        "summary.json",
        "loss.png",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    expected |= (
        {"model.safetensors", "config.json", "generation_config.json"}
        if variant == "full"
        else {"adapter_config.json", "adapter_model.safetensors"}
    )
    expected |= {"soft_prompt_start.safetensors"} if variant in ("prompt_tuning", "p_tuning") else set()
    expected |= {"trained.safetensors"} if variant in ("p_tuning", "projected_prefix") else set()
    assert {path.name for path in run.folder.iterdir()} == expected

    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    assert plain_loss(base, held_out) == pytest.approx(run.summary["base_eval_loss"], rel=1e-5)
    tuned = (
        AutoModelForCausalLM.from_pretrained(run.folder)
        if variant == "full"
        else PeftModel.from_pretrained(base, run.folder)
    )
    assert plain_loss(tuned.eval(), held_out) == pytest.approx(run.summary["final_eval_loss"], rel=1e-5)
    assert run.summary["final_eval_loss"] != pytest.approx(run.summary["base_eval_loss"], rel=1e-4)
    assert model_hash() == before


def test_training_changes_no_parameter_of_the_base_in_memory():
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    from open_instruct.flags import default_values
    from open_instruct.methods import METHODS as REGISTRY

    wrapped = PaddedModel(
        REGISTRY["prompt_tuning"].wrap(
            model,
            AutoTokenizer.from_pretrained(TINY_MODEL),
            REGISTRY["prompt_tuning"].settings(default_values(num_virtual_tokens=4, prompt_tuning_init="sample_vocab")),
        )
    )
    frozen = {name: p.detach().clone() for name, p in wrapped.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    ids = torch.arange(300, 320)[None]
    loss, _ = wrapped(ids, torch.ones_like(ids), ids)
    loss.backward()
    optimizer.step()
    assert all(torch.equal(frozen[name], p) for name, p in wrapped.named_parameters() if not p.requires_grad)


def test_two_runs_with_one_seed_are_one_run_and_another_seed_is_another(train):
    flags = ["--use_lora", *SHORT]  # LoRA has dropout
    first, second, third = train("a", *flags), train("b", *flags), train("c", *flags, "--seed", "1")
    assert without_measurements(first.metrics) == without_measurements(second.metrics)
    assert without_measurements(first.metrics) != without_measurements(third.metrics)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_repeats_the_uninterrupted_one(variant, train):
    flags = [*VARIANTS[variant], *SHORT, "--checkpointing_steps", "2", "--keep_last_n_checkpoints", "-1"]
    full = train("full", *flags)
    assert full.code == 0, full.err
    # What a kill during step 6 leaves: two checkpoints, rows up to step 5 of which the last is torn, no summary.
    part = full.folder.parent / "part"
    shutil.copytree(full.folder, part)
    shutil.rmtree(part / "checkpoints" / "step_6")
    for name in ("summary.json", "loss.png", "adapter_model.safetensors", "adapter_config.json", "model.safetensors"):
        (part / name).unlink(missing_ok=True)
    rows = (part / "metrics.jsonl").read_text().splitlines(keepends=True)
    (part / "metrics.jsonl").write_text("".join(rows[:-2]) + rows[-2][:20])

    resumed = train("part", *flags, "--resume_from_checkpoint")
    assert resumed.code == 0, resumed.err
    assert "resuming after step 4" in resumed.out
    assert without_measurements(resumed.metrics) == without_measurements(full.metrics)
    weights = "model.safetensors" if variant == "full" else "adapter_model.safetensors"
    first, second = load_file(full.folder / weights), load_file(resumed.folder / weights)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert (
        resumed.summary["examples"] == full.summary["examples"] and resumed.summary["tokens"] == full.summary["tokens"]
    )


def test_a_run_can_be_resumed_from_an_earlier_checkpoint_by_name(train):
    flags = ["--use_prompt_tuning", *SHORT, "--checkpointing_steps", "2"]
    full = train("full", *flags)
    resumed = train("other", *flags, "--resume_from_checkpoint", str(full.folder / "checkpoints" / "step_2"))
    assert resumed.code == 0, resumed.err
    assert resumed.summary["final_eval_loss"] == full.summary["final_eval_loss"]


@pytest.mark.parametrize(
    "changed, says",
    [
        (["--use_prefix_tuning"], "method was 'prompt_tuning' and is now 'prefix_tuning'"),
        (["--use_prompt_tuning", "--num_virtual_tokens", "5"], "num_virtual_tokens was 100 and is now 5"),
        (["--use_prompt_tuning", "--learning_rate", "0.5"], "and is now 0.5"),
        (["--use_prompt_tuning", "--max_seq_length", "30"], "data was"),
    ],
)
def test_another_run_is_not_resumed(changed, says, train):
    first = train("run", "--use_prompt_tuning", *SHORT, "--checkpointing_steps", "2")
    (first.folder / "summary.json").unlink()
    before = (first.folder / "metrics.jsonl").read_bytes()
    second = train("run", *changed, *SHORT, "--checkpointing_steps", "2", "--resume_from_checkpoint")
    assert second.code == 2 and says in second.err and second.err.count("\n") == 1
    assert (first.folder / "metrics.jsonl").read_bytes() == before


def test_checkpoints_are_kept_as_asked(train):
    run = train("run", "--use_prompt_tuning", *SHORT, "--checkpointing_steps", "1", "--keep_last_n_checkpoints", "2")
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == ["step_5", "step_6"]
    run = train("clean", "--use_prompt_tuning", *SHORT, "--checkpointing_steps", "1", "--clean_checkpoints_at_end")
    assert run.code == 0 and not (run.folder / "checkpoints").exists()


def test_a_finished_run_is_replaced_only_when_asked(train):
    first = train("run", "--use_prompt_tuning", *SHORT)
    before = (first.folder / "summary.json").read_bytes()
    for extra in ([], ["--resume_from_checkpoint"]):
        refused = train("run", "--use_prompt_tuning", *SHORT, *extra)
        assert refused.code == 2 and "holds a finished run" in refused.err
        assert (first.folder / "summary.json").read_bytes() == before
    (first.folder / "notes.txt").write_text("mine")
    full = train("run", *SHORT, "--overwrite_output_dir")
    assert (
        full.code == 0 and (full.folder / "config.json").exists() and not (full.folder / "adapter_config.json").exists()
    )
    again = train("run", *SHORT, "--overwrite_output_dir", "--use_prefix_tuning")
    assert again.code == 0 and (again.folder / "notes.txt").read_text() == "mine"
    assert not (again.folder / "config.json").exists() and not (again.folder / "model.safetensors").exists()


def test_batch_and_accumulation_are_the_same_step(train):
    flags = ["--use_prompt_tuning", "--max_train_steps", "4", "--learning_rate", "0.01"]
    wide = train("wide", *flags, "--per_device_train_batch_size", "8")
    deep = train("deep", *flags, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8")
    for a, b in zip(wide.metrics, deep.metrics, strict=True):
        name = "loss" if "loss" in a else "eval_loss"
        assert a[name] == pytest.approx(b[name], rel=1e-5)


def test_the_record_says_where_each_value_comes_from(train):
    run = train("run", "--use_prompt_tuning", *SHORT, "--warmup_ratio", "0.5")
    record = json.loads((run.folder / "run.json").read_text())
    assert record["flags"]["warmup_ratio"] == {"value": 0.5, "origin": "flag"}
    assert record["flags"]["learning_rate"]["origin"] == "recipe" and record["flags"]["learning_rate"]["value"] > 0
    assert record["flags"]["reduce_loss"]["origin"] == "default"
    assert (
        {"torch", "transformers", "peft"} <= record["versions"].keys()
        and record["world_size"] == 1
        and record["data"]["train"]
    )


def test_metrics_count_what_was_trained_on(train, data_file):
    run = train(
        "run",
        "--use_prompt_tuning",
        "--num_train_epochs",
        "1",
        "--per_device_train_batch_size",
        "16",
        "--eval_steps",
        "0",
    )
    steps = [row for row in run.metrics if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4] and steps[-1]["examples"] == 64 and steps[-1]["epoch"] == 1
    assert list(steps[0]) == [
        "step", "epoch", "loss", "learning_rate", "grad_norm", "examples", "tokens", "label_tokens",
        "tokens_per_second", "peak_memory_mb",
    ]  # fmt: skip
    assert [row["step"] for row in run.metrics if "eval_loss" in row] == [0, 4]


def test_a_dry_run_says_the_plan_and_writes_nothing(train):
    run = train("run", "--use_lora", "--dry_run")
    assert run.code == 0 and not run.folder.exists()
    assert "8 examples" in run.out and "memory per process" in run.out and "trained parameters" in run.out


def test_trackers_work_offline(train):
    run = train("run", "--use_prompt_tuning", *SHORT, "--with_tracking", "--report_to", "tensorboard")
    assert run.code == 0, run.err
    assert list(run.folder.rglob("events.out.tfevents*"))


def test_the_second_start_reads_the_cache(train, data_file, tmp_path):
    first = train("run", "--use_prompt_tuning", "--cache_dataset_only")
    assert first.code == 0 and not first.folder.exists() and len(list((tmp_path / "cache").iterdir())) == 1
    second = train("run", "--use_prompt_tuning", *SHORT)
    assert second.code == 0 and second.out.splitlines()[1] == first.out.splitlines()[2]
    assert "form messages" in first.out


def test_a_tokenizer_without_a_pad_token_works(train, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY_MODEL, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    with_pad, without = train("a", "--use_lora", *SHORT), train("b", "--use_lora", *SHORT, model=folder)
    assert without.code == 0, without.err
    assert without.summary["final_eval_loss"] == pytest.approx(with_pad.summary["final_eval_loss"], rel=1e-6)


def test_qlora_trains_on_a_quantised_base(train):
    run = train("run", "--use_qlora", *SHORT)
    assert run.code == 0, run.err
    assert run.summary["final_eval_loss"] < run.summary["base_eval_loss"]


def test_a_nan_loss_stops_with_step_rate_and_checkpoint(train):
    run = train("run", *SHORT, "--learning_rate", "1e30", "--clip_grad_norm", "-1", "--checkpointing_steps", "1")
    assert (
        run.code == 2 and "learning rate" in run.err and "last good checkpoint" in run.err and run.err.count("\n") == 1
    )


def test_as_a_process_from_another_folder(tmp_path, data_file):
    result = subprocess.run(
        [
            sys.executable, str(ENTRY), "--model_name_or_path", str(TINY_MODEL), "--train_file", str(data_file),
            "--use_prompt_tuning", "--max_train_steps", "2", "--output_dir", "out", "--num_sample_answers", "3",
            "--validation_fraction", "0.1",
        ],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for part in (
        "held-out loss",
        "trained parameters",
        "adapter size",
        "tokens/s",
        "question 3",
        "base model",
        "tuned model",
    ):
        assert part in result.stdout
    assert "Warning" not in result.stderr


def test_every_way_to_name_the_data_gives_the_same_run(train, data_file, tmp_path):
    flags = ["--use_prompt_tuning", *SHORT]
    runs = [
        train("file", *flags),
        train("folder", *flags, "--dataset_name", str(data_file.parent)),
        train("list", *flags, "--dataset_mixer_list", str(data_file), "1.0"),
        train("mixer", *flags, "--dataset_mixer", json.dumps({str(data_file): 1.0})),
    ]
    assert all(run.code == 0 for run in runs), [run.err for run in runs]
    assert len({json.dumps(without_measurements(run.metrics)) for run in runs}) == 1


def test_without_held_out_data_nothing_is_claimed(train):
    run = train("run", "--use_prompt_tuning", *SHORT, "--validation_fraction", "0")
    assert run.code == 0, run.err
    assert run.summary["base_eval_loss"] is None and "base not measured" in run.out
    assert not [row for row in run.metrics if "eval_loss" in row]


def test_processes_that_start_together_share_one_cache(data_file, tmp_path):
    words = ["--model_name_or_path", str(TINY_MODEL), "--train_file", str(data_file), "--cache_dataset_only"]
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: warm.run(ENTRY, *words, cwd=tmp_path), range(3)))
    assert [result.returncode for result in results] == [0, 0, 0], results[0].stderr
    assert len(list((tmp_path / "local_dataset_cache").iterdir())) == 1


def test_training_reads_what_the_tools_read(train, tmp_path):
    """A Parquet folder, an Alpaca file and a glob, together."""
    folder = tmp_path / "parquet"
    folder.mkdir()
    rows = [{"instruction": "Reverse.", "input": "cat dog", "output": "dog cat"}] * 20
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    write_conversations(tmp_path / "c1.jsonl", "sort", 20)
    flags = [
        "--model_name_or_path",
        str(TINY_MODEL),
        "--output_dir",
        str(tmp_path / "out"),
        "--use_prompt_tuning",
        *SHORT,
    ]
    files = [str(folder), str(tmp_path / "alpaca.json"), str(tmp_path / "c*.jsonl")]
    result = warm.run(ENTRY, "--train_file", *files, *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "form Alpaca" in result.stdout and "of 60 read" in result.stdout


@pytest.mark.parametrize("method", ["full", "lora", "prompt_tuning", "p_tuning", "ia3"])
def test_gradient_checkpointing_changes_nothing(method, train):
    flags = [*method_flags(method), *SHORT, *no_dropout(method)]
    plain, recomputed = train("a", *flags), train("b", *flags, "--gradient_checkpointing")
    assert recomputed.code == 0, recomputed.err
    assert recomputed.summary["final_eval_loss"] == pytest.approx(plain.summary["final_eval_loss"], rel=1e-5)
    assert recomputed.summary["final_eval_loss"] != pytest.approx(
        plain.summary["initial_eval_loss"], rel=1e-3
    )  # it did train


def test_another_base_of_the_same_shape_is_another_base(train, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY_MODEL, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.01)  # one small tensor, the last of the file
    model.save_pretrained(folder)
    flags = ["--use_prompt_tuning", *SHORT, "--checkpointing_steps", "2"]
    first = train("run", *flags)
    (first.folder / "summary.json").unlink()
    second = train("run", *flags, "--resume_from_checkpoint", model=folder)
    assert second.code == 2 and "model was" in second.err
