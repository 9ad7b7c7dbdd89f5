"""Flags: open-instruct's are all accepted, wrong ones are named, and the documentation tells the truth."""

import ast
import json
from dataclasses import fields

import pytest

from docs.make_flags import render
from open_instruct.arguments import AcceptedFlags, FinetuneArguments, check_arguments
from open_instruct.command_line import parse
from open_instruct.errors import InputError
from tests.conftest import ROOT

UPSTREAM = json.loads((ROOT / "tests" / "upstream_defaults.json").read_text())
GOOD = ["--model_name_or_path", "m", "--train_file", "t.jsonl"]


@pytest.mark.parametrize("snapshot", UPSTREAM)
def test_every_flag_of_open_instruct_is_accepted(snapshot):
    assert set(UPSTREAM[snapshot]) <= {field.name for field in fields(FinetuneArguments)}


def test_flags_take_the_values_that_open_instruct_commands_give_them():
    arguments, _ = parse(
        [
            "--model_name_or_path",
            "m",
            "--dataset_mixer_list",
            "a",
            "1.0",
            "b",
            "100",
            "--use_lora",
            "--lora_rank",
            "8",
            "--use_flash_attn",
            "False",
            "--report_to",
            "wandb",
            "--with_tracking",
            "--gradient_checkpointing",
            "--clip_grad_norm",
            "-1",
            "--learning_rate",
            "2e-05",
            "--no_fused_optimizer",
            "--seed",
            "8",
        ]
    )
    assert arguments.method == "lora"
    assert arguments.dataset_mixer_list == ["a", "1.0", "b", "100"]
    assert (arguments.use_flash_attn, arguments.with_tracking, arguments.fused_optimizer) == (False, True, False)
    assert (arguments.clip_grad_norm, arguments.learning_rate, arguments.report_to) == (-1, 2e-5, ["wandb"])


def test_a_yaml_file_is_overridden_by_flags_and_origins_are_kept(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "model_name_or_path: m\nuse_prompt_tuning: true\nlearning_rate: 1e-3\ndataset_mixer: {a: 0.5}\nwarmup_ratio: null\nseed: 1\n"
    )
    arguments, origins = parse([str(config), "--seed", "2"])
    assert (arguments.learning_rate, arguments.seed, arguments.method) == (1e-3, 2, "prompt_tuning")
    assert json.loads(arguments.dataset_mixer) == {"a": 0.5}
    assert origins["learning_rate"] == "config" and origins["seed"] == "flag" and "warmup_ratio" not in origins


@pytest.mark.parametrize(
    "words, says",
    [
        (["--learning_rat", "1"], "did you mean --learning_rate?"),
        (["--use-promt-tuning"], "did you mean --use_prompt_tuning?"),
        (["--seed", "many"], "invalid int value: 'many'"),
        (["--prefix_init", "noise"], "noise"),
    ],
)
def test_wrong_flags_end_with_code_2_and_one_line(words, says, capsys):
    with pytest.raises(SystemExit) as stop:
        parse([*GOOD, *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "text, says", [("- a\n", "must map flag names"), ("a: [\n", "can't be read"), (None, "can't be read")]
)
def test_bad_configurations_are_named(tmp_path, text, says):
    if text is not None:
        (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=says):
        parse([str(tmp_path / "c.yaml")])


@pytest.mark.parametrize(
    "words, says",
    [
        (["--use_lora", "--use_prompt_tuning"], "--use_lora and --use_prompt_tuning exclude each other"),
        (["--dataset_name", "d"], "--train_file and --dataset_name"),
        (["--use_prompt_tuning", "--num_virtual_tokens", "-3"], "--num_virtual_tokens -3 is too small"),
        (["--num_virtual_tokens", "3"], "--num_virtual_tokens has no meaning for full"),
        (["--use_lora", "--prefix_init", "zero"], "--prefix_init has no meaning for lora"),
        (["--use_prefix_tuning", "--prefix_projection", "--prefix_init", "text"], "can't start a projected prefix"),
        (
            ["--use_prompt_tuning", "--prompt_tuning_init", "random", "--prompt_tuning_init_text", "x"],
            "the initialisation is random",
        ),
        (["--learning_rate", "-1"], "--learning_rate -1.0 is not a rate"),
        (["--learning_rate", "nan"], "--learning_rate nan is not a rate"),
        (["--warmup_ratio", "1.5"], "--warmup_ratio 1.5 is out of range"),
        (["--validation_fraction", "1"], "--validation_fraction 1.0 is out of range"),
        (["--checkpointing_steps", "often"], "--checkpointing_steps often"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0 is too small"),
        (["--additional_model_arguments", "{"], "not a JSON object"),
        (["--sequence_parallel_size", "2"], "is not supported"),
    ],
)
def test_contradictions_are_found_before_anything_is_read(words, says):
    with pytest.raises(InputError) as error:
        check_arguments(parse([*GOOD, *words])[0])
    assert says in str(error.value)


def test_all_problems_are_told_at_once():
    with pytest.raises(InputError) as error:
        check_arguments(parse(["--seed", "-1", "--lora_dropout", "2"])[0])
    for part in ("--model_name_or_path is missing", "source of training data", "--seed -1", "--lora_dropout 2.0"):
        assert part in str(error.value)


def test_zero_virtual_tokens_mean_the_recipes():
    assert parse([*GOOD, "--num_virtual_tokens", "0"])[0].num_virtual_tokens is None


def test_the_table_of_flags_is_generated_from_the_code():
    assert (ROOT / "docs" / "flags.md").read_text() == render(), "run: python -m docs.make_flags"


def test_the_table_names_every_default_that_differs_from_open_instruct():
    text = (ROOT / "docs" / "flags.md").read_text()
    accepted = {field.name for field in fields(AcceptedFlags)}
    ours = FinetuneArguments()
    for name, default in UPSTREAM["2026-08"].items():
        try:
            theirs = ast.literal_eval(default)
        except (ValueError, SyntaxError):
            continue
        if theirs != getattr(ours, name) and name not in accepted:
            assert f"| `{name}` | `{default}`" in text, name
