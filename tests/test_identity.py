"""Which flags a resumed run must share, from their declarations; and what else makes two runs the same."""

import json
import math
import shutil
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from open_instruct.command_line import parse
from open_instruct.data.sources import mixture_of
from open_instruct.errors import InputError
from open_instruct.finetune_peft import main
from open_instruct.flags import FIELDS, METHOD_FLAGS, Flags, check_flags
from open_instruct.flags.combinations import parse_weights
from open_instruct.training import base_model, distilling, hard_prompts, identity, settings
from open_instruct.training.continuing import adopt_adapter
from open_instruct.training.load_data import load_data
from tests.conftest import TINY_MODEL, TINY_T5, write_conversations

DECIDING = [name for name, item in FIELDS.items() if item.metadata["on_resume"] in ("same", "content")]
FREE = [name for name, item in FIELDS.items() if item.metadata["on_resume"] == "free"]
# They decide what only the model tells: the attention and the recipe's rate. Real runs test them below.
NEEDS_THE_MODEL = ("packing", "attn_backend", "use_flash_attn", "learning_rate_factor")
ON_THE_HUB = ("dataset_config_name", "dataset_mixer_list_splits", "tokenizer_revision")
# Values of flags whose type does not tell one. Those of a plain run that is short of everything: rows are cut at 60
# tokens, a few are held out, and there are several steps.
COMMON = {
    "model_name_or_path": [str(TINY_MODEL)],
    "train_file": ["{data}"],
    "validation_fraction": ["0.2"],
    "max_seq_length": ["60"],
    "per_device_train_batch_size": ["4"],
    "num_train_epochs": ["3"],
}
OTHER = {
    "train_file": ["{other}"],
    "dataset_name": ["{other}"],
    "dataset_mixer": ['{{"{other}": 1.0}}'],
    "dataset_mixer_list": ["{other}", "1.0"],
    "sft_messages_key": ["talk"],
    "columns": ["prompt=id", "answer=note"],
    "template": ["{folder}/template.txt"],
    "validation_file": ["{other}"],
    "validation_fraction": ["0.3"],
    "max_eval_samples": ["5"],
    "max_train_samples": ["20"],
    "max_seq_length": ["20"],
    "model_name_or_path": ["{folder}/model"],
    "config_name": ["{folder}/config"],
    "additional_model_arguments": ['{{"rms_norm_eps": 0.125}}'],
    "model_revision": ["other"],
    "tokenizer_name_or_path": ["{folder}/tokenizer"],
    "tokenizer_name": ["{folder}/tokenizer"],
    "chat_template_name": ["zephyr"],
    "adapter_name_or_path": ["{folder}/adapter"],
    "peft_config": ["{folder}/peft.json"],
    "quantisation_config": ['{{"load_in_8bit": true}}'],
    "skip_modules": ["gate_proj"],
    "prompt_tuning_init_text": ["text"],
    "soft_prompt_at": ["decoder"],
    "num_train_epochs": ["1"],
    "max_train_steps": ["2"],
    "dtype": ["bfloat16"],
    "eval_steps": ["1"],
    "warmup_ratio": ["0.5"],
    "lora_target_modules": ["q_proj"],
    "lora_layers": ["0-1"],
    "init_lora_weights": ["gaussian"],
    "modules_to_save": ["lm_head"],
    "new_tokens": ["<tool>"],
    "distill_context": ["{context}"],
    "distill_column": ["note"],
    "distill_weight": ["0.5"],
    "hard_prompt": ["{context}"],
    "source_weights": ["sort=2"],
    "mixture_temperature": ["2"],
}
REPLACES = {  # what has to go beside a flag
    "dataset_name": ["train_file"],
    "dataset_mixer": ["train_file"],
    "dataset_mixer_list": ["train_file"],
    "validation_file": ["validation_fraction"],
}


def test_every_flag_says_what_a_resumed_run_may_change():
    """A new flag without `on_resume` fails here; one with a wrong one in the tests below."""
    unknown = {name for name, item in FIELDS.items() if item.metadata["on_resume"] not in ("same", "content", "free")}
    assert unknown == set()


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> SimpleNamespace:
    """Files to name in flags: data, an adapter, and copies of base and tokenizer that differ in one thing."""
    folder = tmp_path_factory.mktemp("identity")
    other = write_conversations(folder / "other.jsonl", "sort", 60)
    data = folder / "train.jsonl"
    rows = [
        json.loads(line) for line in write_conversations(data, "reverse", 60, long_every=3).read_text().splitlines()
    ]
    data.write_text("".join(json.dumps({**row, "talk": row["messages"][-2:], "note": "old"}) + "\n" for row in rows))
    for name in ("model", "tokenizer", "config"):
        shutil.copytree(TINY_MODEL, folder / name)
    words = [
        "--model_name_or_path",
        str(TINY_MODEL),
        "--train_file",
        str(data),
        "--output_dir",
        str(folder / "adapter"),
    ]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert (
        main([*words, "--use_lora", "--max_train_steps", "1", "--dataset_skip_cache", "--num_sample_answers", "0"]) == 0
    )
    change_json(folder / "config" / "config.json", rms_norm_eps=0.5)
    change_json(folder / "model" / "config.json", rms_norm_eps=0.25)
    change_json(folder / "tokenizer" / "tokenizer_config.json", eos_token="<pad>")
    (folder / "template.txt").write_text("Say {prompt}\n---\nSing {prompt}\n")
    (folder / "peft.json").write_text('{"peft_type": "OFT"}')
    context = folder / "context.txt"
    context.write_text("narrow dry old open")
    spoken = folder / "spoken.jsonl"
    system = {"role": "system", "content": "old"}
    spoken.write_text(
        "".join(json.dumps({"messages": [system, *row["messages"]]}) + "\n" for row in rows[:40]), encoding="utf-8"
    )
    return SimpleNamespace(folder=folder, data=data, other=other, context=context, spoken=spoken)


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def identity_of(given: SimpleNamespace, flags: dict[str, list[str]]) -> dict[str, Any]:
    """The identity of a run as it would be saved, as far as it is known without its model."""
    words = [word.format(**vars(given)) for name, value in flags.items() for word in (f"--{name}", *value)]
    parsed, origins = parse([*words, "--dataset_skip_cache"])
    check_flags(parsed, origins)
    AcceleratorState._reset_state(reset_partial_state=True)
    parsed, origins, adapter = adopt_adapter(parsed, origins)
    config = base_model.load_base_config(base_model.base_model_settings(parsed))
    before = settings.before_data(parsed, origins, config, adapter)
    tokenizer = base_model.load_base_tokenizer(before.tokenizer)
    before = hard_prompts.with_hard_prompt(before, config, tokenizer)
    data = load_data(before.data, Accelerator(), tokenizer)
    context = distilling.context_of_run(before.data.context, data, tokenizer)
    weights = parse_weights(parsed.source_weights) if parsed.source_weights else None
    mixture = mixture_of(data.train.sources, weights, parsed.mixture_temperature, parsed.seed)
    own = identity.of_data(before, data, context, config, before.plan(len(data.train), 1, mixture), 1)
    recipe = {name: getattr(parsed, name) for name in identity.OF_THE_RECIPE}
    return json.loads(json.dumps({**own, **recipe}, default=str))


def another_value(name: str) -> list[str] | None:
    """Words for a value that is not the default; None where the type tells none."""
    hint, default, facts = get_type_hints(Flags)[name], getattr(Flags(), name), FIELDS[name].metadata
    kind = next((item for item in get_args(hint) if item is not NoneType), hint) if NoneType in get_args(hint) else hint
    if get_origin(kind) is Literal:
        return [next(choice for choice in get_args(kind) if choice != default)]
    if kind is bool:
        return [str(not default)]
    if kind not in (int, float):
        return None
    value = (default or 0) + (1 if facts["below"] is None else 0.05)
    return [str(kind(min(value, math.inf if facts["at_most"] is None else facts["at_most"])))]


def beside(name: str, flags: dict[str, list[str]]) -> dict[str, list[str]]:
    """Common flags without those that the flag excludes, and with the method that it needs."""
    methods = FIELDS[name].metadata["methods"]
    chosen = {} if name in METHOD_FLAGS or name == "adapter_name_or_path" else {f"use_{[*methods, 'lora'][0]}": []}
    if name == "lora_learning_rate_ratio":
        chosen["use_prompt_tuning"] = []  # trained together
    if name == "soft_prompt_at":
        chosen["model_name_or_path"] = [str(TINY_T5)]
        chosen["num_virtual_tokens"] = ["3"]
    if name in ("distill_loss", "distill_weight"):
        chosen["distill_context"] = ["{context}"]
    if name in ("template", "all_templates", "shots"):
        chosen["columns"] = ["prompt=id", "answer=note"]
    if name == "all_templates":
        chosen["template"] = ["{folder}/template.txt"]
    if name in ("source_weights", "mixture_temperature"):
        chosen["train_file"] = ["{data}", "{other}"]  # of two sources
    if name == "skip_modules":
        chosen["load_in_8bit"] = []
    if name == "distill_system":
        chosen["train_file"] = ["{spoken}"]
    return {key: value for key, value in flags.items() if key not in REPLACES.get(name, ())} | chosen


@pytest.mark.parametrize("name", [name for name in DECIDING if name not in (*NEEDS_THE_MODEL, *ON_THE_HUB)])
def test_another_value_is_another_run(name, given):
    """Of every flag that is declared to decide the result, whatever it is."""
    value = OTHER.get(name) or another_value(name)
    assert value, f"--{name}: name another value in OTHER"
    common = beside(name, COMMON)
    first = identity_of(given, common | {key: COMMON[key] for key in REPLACES.get(name, ())})
    checkpoint = SimpleNamespace(path="step_1", state=SimpleNamespace(identity=first, step=1))
    identity.check_resumed(checkpoint, first)
    with pytest.raises(InputError, match="belongs to another run"):
        identity.check_resumed(checkpoint, identity_of(given, {**common, name: value}))


def test_equal_content_under_another_name_is_the_same_run(given, tmp_path):
    """Moved files and folders, another cache, the same number of steps in other words."""
    for name in ("data", "other"):
        shutil.copy(getattr(given, name), tmp_path)
    shutil.copytree(TINY_MODEL, tmp_path / "moved")
    shutil.copytree(given.folder / "adapter", tmp_path / "adapter")
    moved = SimpleNamespace(folder=tmp_path, data=tmp_path / "train.jsonl", other=tmp_path / "other.jsonl")
    adapter = {**COMMON, "adapter_name_or_path": ["{folder}/adapter"], "validation_file": ["{other}"]}
    del adapter["validation_fraction"]
    first = identity_of(given, adapter)
    del adapter["num_train_epochs"]
    adapter |= {
        "model_name_or_path": ["{folder}/moved"],
        "tokenizer_name_or_path": [str(TINY_MODEL)],
        "max_train_steps": [str(first["num_steps"])],
        "per_device_train_batch_size": ["2"],
        "gradient_accumulation_steps": ["2"],
        "dtype": ["float32"],
        "split_seed": ["42"],
    }
    assert identity_of(moved, adapter) == first


def test_a_sum_of_losses_depends_on_the_micro_batches(given):
    """The mean does not: batch and accumulation may change places there."""
    whole = {**COMMON, "use_lora": []}
    split = {**whole, "per_device_train_batch_size": ["2"], "gradient_accumulation_steps": ["2"]}
    assert identity_of(given, whole) == identity_of(given, split)
    total = {"reduce_loss": ["sum"]}
    assert identity_of(given, whole | total) != identity_of(given, split | total)


SHORT = ["--max_train_steps", "3", "--per_device_train_batch_size", "4", "--use_lora"]
SHORT += ["--lora_dropout", "0", "--checkpointing_steps", "1"]
# Free flags whose other value is a file, an upload, an end without training, or minutes of compilation.
NOT_TRIED = (
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dataset_skip_cache", "dataset_local_cache_dir",
    "cache_dataset_only", "dry_run", "push_to_hub", "with_tracking", "compile", "checkpointing_steps",
)  # fmt: skip


def test_free_flags_change_no_curve(train):
    """All at once, at other values; the curve of another seed shows that the comparison sees differences."""
    words = []
    for name in FREE:
        value = None if name in NOT_TRIED or FIELDS[name].metadata["check"] else another_value(name)
        words += [f"--{name}", *value] if value else []
    words += ["--max_tokens_per_microbatch", "120"]
    plain, free, other = train("plain", *SHORT), train("free", *SHORT, *words), train("other", *SHORT, "--seed", "1")
    assert plain.code == free.code == other.code == 0, free.err
    assert "--gradient_checkpointing" in words and "--fused_optimizer" in words and len(words) > 40

    def curve(run) -> list[float]:
        rows = {row["step"]: row["eval_loss"] for row in run.metrics if "eval_loss" in row}
        return [rows[step] for step in sorted(rows)]

    assert curve(free) == pytest.approx(curve(plain), rel=1e-5)
    assert curve(other) != pytest.approx(curve(plain), rel=1e-3)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--split_seed", "9"], "training and held-out data was"),
        (["--dtype", "bfloat16"], "dtype was 'torch.float32' and is now 'torch.bfloat16'"),
        (["--load_in_8bit"], "load_in_8bit was False and is now True"),
        (["--use_8bit_optimizer"], "use_8bit_optimizer was False and is now True"),
        (["--attn_backend", "sdpa"], "attention was 'packed, by blocked' and is now 'packed, by sdpa'"),
        (["--packing", "False"], "attention was 'packed, by blocked' and is now 'padded, by sdpa'"),
        (["--learning_rate_factor", "2"], "learning_rate was"),
        (["--max_eval_samples", "3"], "training and held-out data was"),
        (["--eval_steps", "2"], "eval_steps was 1 and is now 2"),
    ],
)
def test_a_real_run_is_not_resumed_with_another_value(flags, says, train):
    """Those that only the model tells, and those that were accepted in silence; a free flag is the control."""
    first = train("run", *SHORT)
    (first.folder / "summary.json").unlink()
    before = (first.folder / "metrics.jsonl").read_bytes()
    second = train("run", *SHORT, *flags, "--resume_from_checkpoint")
    assert second.code == 2 and says in second.err and second.err.count("\n") == 1, second.err
    assert (first.folder / "metrics.jsonl").read_bytes() == before
    if flags == ["--eval_steps", "2"]:
        control = train("run", *SHORT, "--resume_from_checkpoint", "--fused_optimizer", "False")
        assert control.summary["final_eval_loss"] == pytest.approx(first.summary["final_eval_loss"]), control.err
