"""Flags: open-instruct's are all accepted, wrong ones are named, and the documentation tells the truth."""

import ast
import json
from dataclasses import FrozenInstanceError, fields

import pytest
from transformers import TrainingArguments

from docs.make_flags import render
from open_instruct.command_line import parse, warn_without_effect
from open_instruct.errors import InputError
from open_instruct.flags import ALIASES, FIELDS, AcceptedFlags, Flags, check_flags
from open_instruct.flags.declare import out_of_bounds
from tests.conftest import ROOT

UPSTREAM = json.loads((ROOT / "tests" / "upstream_defaults.json").read_text())
GOOD = ["--model_name_or_path", "m", "--train_file", "t.jsonl"]


@pytest.mark.parametrize("snapshot", UPSTREAM)
def test_every_flag_of_open_instruct_is_accepted(snapshot):
    assert set(UPSTREAM[snapshot]) <= set(FIELDS)


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
        "model_name_or_path: m\nuse_prompt_tuning: true\nlearning_rate: 1e-3\ndataset_mixer: {a: 0.5}\n"
        "warmup_ratio: null\nseed: 1\n"
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
        (["--lr_scheduler_type", "wavy"], "--lr_scheduler_type: invalid choice: 'wavy'"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], "invalid choice"),
    ],
)
def test_wrong_flags_end_with_code_2_and_one_line(words, says, capsys):
    with pytest.raises(SystemExit) as stop:
        parse([*GOOD, *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "text, says",
    [("- a\n", "must map names to values"), ("a: [\n", "can't be used .line 2"), (None, "can't be used .No such file")],
)
def test_bad_configurations_are_named(tmp_path, text, says):
    if text is not None:
        (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=says):
        parse([str(tmp_path / "c.yaml")])


@pytest.mark.parametrize(
    "words, says",
    [
        (["--use_lora", "--use_ia3"], "--use_lora and --use_ia3 exclude each other"),
        (["--use_lora", "--use_p_tuning", "--use_prompt_tuning"], "choose one method, or LoRA and a soft prompt"),
        (["--dataset_name", "d"], "--train_file and --dataset_name"),
        (
            ["--use_prompt_tuning", "--num_virtual_tokens", "-3"],
            "--num_virtual_tokens -3 is out of range: it must be at least 1",
        ),
        (["--num_virtual_tokens", "3"], "--num_virtual_tokens has no meaning for full"),
        (["--use_lora", "--prefix_init", "zero"], "--prefix_init has no meaning for lora"),
        (["--use_prefix_tuning", "--prefix_projection", "--prefix_init", "text"], "can't start a projected prefix"),
        (
            ["--use_prompt_tuning", "--prompt_tuning_init", "random", "--prompt_tuning_init_text", "x"],
            "the initialisation is random",
        ),
        (["--learning_rate", "-1"], "--learning_rate -1.0 is out of range: it must be above 0"),
        (["--learning_rate", "nan"], "--learning_rate nan is out of range: it must be above 0"),
        (["--warmup_ratio", "1.5"], "--warmup_ratio 1.5 is out of range: it must be at least 0 and at most 1"),
        (
            ["--validation_fraction", "1"],
            "--validation_fraction 1.0 is out of range: it must be at least 0 and below 1",
        ),
        (["--checkpointing_steps", "often"], "--checkpointing_steps often"),
        (
            ["--per_device_train_batch_size", "0"],
            "--per_device_train_batch_size 0 is out of range: it must be at least 1",
        ),
        (["--additional_model_arguments", "{"], "not a JSON object"),
        (["--sequence_parallel_size", "2"], "is not supported"),
        (["--lora_rank", "8"], "--lora_rank has no meaning for full: remove it, or choose --use_lora or --use_qlora"),
        (["--use_prompt_tuning", "--lora_dropout", "0.9"], "--lora_dropout has no meaning for prompt_tuning"),
        (["--use_prefix_tuning", "--encoder_hidden_size", "8"], "only with --prefix_projection"),
        (["--use_prefix_tuning", "--prefix_projection", "--prompt_tuning_init_text", "x"], "can't start from a text"),
        (["--dataset_config_name", "c"], "--dataset_config_name has no effect without --dataset_name"),
        (["--dataset_mixer_list_splits", "test"], "--dataset_mixer_list_splits ['test']: it needs a mixture"),
        (["--validation_file", "v", "--validation_fraction", "0.1"], "no effect beside --validation_file"),
        (["--hf_entity", "me"], "--hf_entity me: it has no effect without --push_to_hub"),
        (
            ["--final_lr_ratio", "0.1", "--lr_scheduler_type", "constant"],
            "--final_lr_ratio 0.1: it works with the linear",
        ),
        (["--warmup_ratio", "0.1", "--lr_scheduler_type", "constant"], "the constant schedule has no warm-up"),
        (["--packing", "False", "--compile"], "--compile: it belongs to the packed forward pass"),
        (["--resume_from_checkpoint", "--overwrite_output_dir"], "it contradicts --overwrite_output_dir"),
        (["--seed", "4294967296"], "--seed 4294967296 is out of range: it must be at least 0 and at most 4294967295"),
        (["--weight_decay", "inf"], "--weight_decay inf is out of range"),
        (["--clip_grad_norm", "nan"], "--clip_grad_norm nan is out of range"),
        (["--use_lora", "--lora_alpha", "nan"], "--lora_alpha nan is out of range"),
        (["--max_train_steps", "9" * 400], "is out of range"),
        (["--use_lora", "--load_in_8bit", "--load_in_4bit"], "--load_in_4bit: it excludes --load_in_8bit"),
        (["--cache_dataset_only", "--dataset_skip_cache"], "--cache_dataset_only fills the cache"),
        (["--tokenizer_name", "a", "--tokenizer_name_or_path", "b"], "--tokenizer_name a: it is an older name"),
        (
            ["--adapter_name_or_path", "a", "--use_prompt_tuning", "--prompt_tuning_init", "text"],
            "is the start: remove",
        ),
        (
            ["--adapter_name_or_path", "a", "--prompt_tuning_init_text", "x"],
            "the trained adapter is the start: remove it",
        ),
        (["--use_lora", "--lora_alpha", "0"], "--lora_alpha 0.0 is out of range: it must be above 0"),
        (["--checkpointing_steps", "²"], "neither a positive number of steps nor `epoch`"),
    ],
)
def test_contradictions_are_found_before_anything_is_read(words, says):
    with pytest.raises(InputError) as error:
        check_flags(*parse([*GOOD, *words]))
    assert says in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        ["--use_qlora", "--use_lora"],  # open-instruct's script gives both
        ["--report_to", "none"],
        ["--report_to", "wandb", "--wandb_entity", "ai2"],  # open-instruct's commands give them without --with_tracking
        ["--validation_file", "v", "--validation_fraction", "0"],
        ["--final_lr_ratio", "0", "--lr_scheduler_type", "constant"],
        ["--tokenizer_name", "a"],
        ["--save_to_hub", "me/run"],
        ["--use_lora", "--prefix_projection", "False"],
        ["--lr_scheduler_type", "cosine", "--final_lr_ratio", "0.1"],
        ["--with_tracking", "--report_to", "tensorboard"],
    ],
)
def test_combinations_that_mean_something_are_accepted(words):
    check_flags(*parse([*GOOD, *words]))


TRAINER_NAMES = {
    "max_steps": ("max_train_steps", "7"),
    "max_grad_norm": ("clip_grad_norm", "0.5"),
    "save_steps": ("checkpointing_steps", "7"),
    "save_total_limit": ("keep_last_n_checkpoints", "2"),
    "ddp_timeout": ("timeout", "60"),
    "torch_compile": ("compile", "True"),
    "hub_model_id": ("hf_repo_id", "me/run"),
    "hub_revision": ("hf_repo_revision", "b"),
}


def test_names_of_the_trainer_mean_the_same(tmp_path):
    """All of them, on the command line, with dashes, with an equals sign and in a YAML file; they are the Trainer's."""
    assert set(ALIASES) == set(TRAINER_NAMES)
    of_trainer = {item.name for item in fields(TrainingArguments)}
    for alias, (name, value) in TRAINER_NAMES.items():
        assert alias in of_trainer and name not in of_trainer
        (tmp_path / "c.yaml").write_text(f"{alias}: {value}\n")
        expected, origins = parse([*GOOD, f"--{name}", value])
        assert origins[name] == "flag" and getattr(expected, name) != getattr(Flags(), name)
        for words in ([f"--{alias}", value], [f"--{alias.replace('_', '-')}", value], [f"--{alias}={value}"]):
            assert parse([*GOOD, *words]) == (expected, origins)
        assert parse([str(tmp_path / "c.yaml"), *GOOD]) == (expected, origins | {name: "config"})


def test_two_names_of_one_flag_must_agree(tmp_path):
    assert parse([*GOOD, "--max_steps", "7", "--max_train_steps=7"])[0].max_train_steps == 7
    says = "--max_steps 7 and --max_train_steps 8 are two names of one flag, with different values"
    with pytest.raises(InputError, match=says):
        parse([*GOOD, "--max-steps", "7", "--max_train_steps=8"])
    (tmp_path / "c.yaml").write_text("max_steps: 7\nmax_train_steps: 8\n")
    with pytest.raises(InputError, match=says):
        parse([str(tmp_path / "c.yaml"), *GOOD])
    (tmp_path / "c.yaml").write_text("max_steps: 7\n")  # a flag overrides the file, whatever it is called there
    assert parse([str(tmp_path / "c.yaml"), *GOOD, "--max_train_steps", "8"])[0].max_train_steps == 8


def test_trackers_without_tracking_are_named(capsys):
    warn_without_effect(*parse([*GOOD, "--report_to", "wandb", "--wandb_entity", "ai2", "--low_cpu_mem_usage"]))
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--low_cpu_mem_usage (transformers 5 always loads this way)" in error
    assert "--report_to (--with_tracking is not set); --wandb_entity (--with_tracking is not set)" in error
    warn_without_effect(*parse([*GOOD, "--report_to", "none"]))
    warn_without_effect(*parse([*GOOD, "--report_to", "wandb", "--with_tracking"]))
    assert capsys.readouterr().err == ""


def test_an_upload_is_not_both_asked_for_and_forbidden(capsys):
    with pytest.raises(SystemExit):
        parse([*GOOD, "--save_to_hub", "me/run", "--push_to_hub", "False"])
    assert "--save_to_hub asks for an upload" in capsys.readouterr().err


def test_a_negated_flag_in_a_yaml_file(tmp_path):
    (tmp_path / "c.yaml").write_text("no_packing: true\nno_fused_optimizer: true\n")
    flags, given = parse([str(tmp_path / "c.yaml"), *GOOD])
    assert not flags.packing and not flags.fused_optimizer and given["packing"] == "config"


def test_qlora_is_lora_on_a_quantised_base():
    assert parse([*GOOD, "--use_lora", "--use_qlora"])[0].method == "qlora"


def test_flags_are_frozen():
    flags, _ = parse(GOOD)
    with pytest.raises(FrozenInstanceError):
        flags.seed = 3


@pytest.mark.parametrize("name", FIELDS)
def test_every_default_passes_its_own_checks(name):
    """A flag that is given its default value is refused only because it belongs elsewhere or has no effect."""
    item, value = FIELDS[name], getattr(Flags(), name)
    assert out_of_bounds(item, value) is None
    for bound, step in (("at_least", -1), ("at_most", 1), ("above", 0), ("below", 0)):
        if item.metadata[bound] is not None:
            assert f"--{name}" in str(out_of_bounds(item, item.metadata[bound] + step))


def test_all_problems_are_told_at_once():
    with pytest.raises(InputError) as error:
        check_flags(*parse(["--seed", "-1", "--lora_dropout", "2"]))
    for part in ("--model_name_or_path is missing", "source of training data", "--seed -1", "--lora_dropout 2.0"):
        assert part in str(error.value)


def test_zero_virtual_tokens_mean_the_recipes():
    assert parse([*GOOD, "--num_virtual_tokens", "0"])[0].num_virtual_tokens is None


@pytest.mark.parametrize("name", ["TEXT", "SAMPLE_VOCAB", "RANDOM"])
def test_names_are_accepted_as_peft_writes_them(name):
    assert parse([*GOOD, "--prompt_tuning_init", name])[0].prompt_tuning_init == name.lower()


def test_the_table_of_flags_is_generated_from_the_code():
    assert (ROOT / "docs" / "flags.md").read_text() == render(), "run: python -m docs.make_flags"


def test_the_table_names_every_default_that_differs_from_open_instruct():
    text = (ROOT / "docs" / "flags.md").read_text()
    accepted = {field.name for field in fields(AcceptedFlags)}
    ours = Flags()
    for name, default in UPSTREAM["2026-08"].items():
        try:
            theirs = ast.literal_eval(default)
        except (ValueError, SyntaxError):
            continue
        if theirs != getattr(ours, name) and name not in accepted:
            assert f"| `{name}` | `{default}`" in text, name
