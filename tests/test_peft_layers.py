"""Methods of PEFT that a configuration chooses: they train, resume, and are saved as plain PEFT adapters."""

import json
import re

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, PeftType, get_peft_model
from transformers import AutoModelForCausalLM

from docs import make_peft_methods
from docs.make_peft_methods import PAGE, Trial, example, render
from open_instruct.evaluate_peft import main as evaluate_main
from open_instruct.finetune_peft import main as finetune
from open_instruct.generate_peft import main as generate_main
from open_instruct.inspect_peft import main as inspect_main
from open_instruct.merge_peft import main as merge_main
from open_instruct.methods import METHODS, method_of_type
from open_instruct.methods.peft_types import OWN_FLAGS, REFUSED, TYPES
from open_instruct.model.away_from_start import away_from_start
from open_instruct.study_peft import main as study_main
from open_instruct.training.forward import probe
from tests.conftest import TINY_MODEL, write_conversations
from tests.test_finetune import plain_loss

SHORT = ["--max_train_steps", "4", "--per_device_train_batch_size", "4", "--eval_steps", "0", "--keep_best", "False"]
KINDS = ["VBLORA", "PVERA", "LN_TUNING", "TRAINABLE_TOKENS"]  # shared parameters, noise, norms, embeddings


@pytest.fixture
def config(tmp_path):
    """Write a configuration; gives the flag and the file."""

    def write(kind=None, **fields):
        path = tmp_path / f"{kind}-{len(list(tmp_path.glob('*.json')))}.json"
        path.write_text(json.dumps((example(kind) if kind else {}) | fields))
        return ["--peft_config", str(path)]

    return write


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_bit_for_bit_and_plain_peft_gives_its_loss(kind, config, train, tmp_path):
    held_out = write_conversations(tmp_path / "heldout.jsonl", "reverse", 10, seed=3, long_every=4)
    flags = [*config(kind), *SHORT, "--validation_file", str(held_out)]
    run = train("run", *flags, "--checkpointing_steps", "2")
    assert run.code == 0, run.err
    again = train("again", *flags, "--resume_from_checkpoint", str(run.folder / "checkpoints" / "step_2"))
    weights = [(item.folder / "adapter_model.safetensors").read_bytes() for item in (run, again)]
    assert weights[0] == weights[1], again.err
    if kind == "PVERA":  # the control: its noise depends on the seed
        other = train("other", *flags, "--seed", "1")
        assert (other.folder / "adapter_model.safetensors").read_bytes() != weights[0]

    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    assert plain_loss(base, held_out) == pytest.approx(run.summary["base_eval_loss"], rel=1e-5)
    tuned = PeftModel.from_pretrained(base, run.folder).eval()
    assert plain_loss(tuned, held_out) == pytest.approx(run.summary["final_eval_loss"], rel=1e-5)
    assert run.summary["final_eval_loss"] != pytest.approx(run.summary["base_eval_loss"], rel=1e-4)
    assert json.loads((run.folder / "adapter_config.json").read_text())["peft_type"] == kind


def test_a_packed_run_is_the_padded_one(config, train):
    packed = train("packed", *config("OFT"), *SHORT)
    padded = train("padded", *config("OFT"), *SHORT, "--packing", "False")
    other = train("other", *config("OFT", oft_block_size=16), *SHORT)
    assert "forward pass: packed" in packed.out and "forward pass: padded" in padded.out
    assert packed.summary["final_eval_loss"] == pytest.approx(padded.summary["final_eval_loss"], rel=1e-4)
    assert other.summary["final_eval_loss"] != pytest.approx(padded.summary["final_eval_loss"], rel=1e-3)


def test_the_probe_sees_what_an_update_of_zero_hides():
    """Lily's layers mix the tokens of a batch, which can't be seen while its update is zero; OFT is the control."""
    reasons = {}
    for kind, kwargs in (("LILY", {}), ("OFT", {"oft_block_size": 32})):
        options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **kwargs}
        base = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
        model = get_peft_model(base, PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](**options))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        at_start = probe(model, lambda: None, "blocked", torch.float32)
        with away_from_start(model):
            reasons[kind] = at_start[1], probe(model, lambda: None, "blocked", torch.float32)[1]
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert reasons["OFT"] == ("", "")
    assert reasons["LILY"] == ("", "an example's loss depends on the example before it")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Short runs of three types."""
    folder = tmp_path_factory.mktemp("peft")
    data = write_conversations(folder / "train.jsonl", "reverse", 40)
    for kind in ("OFT", "VBLORA", "BEFT"):
        (folder / f"{kind}.json").write_text(json.dumps(example(kind)))
        AcceleratorState._reset_state(reset_partial_state=True)
        words = ["--model_name_or_path", str(TINY_MODEL), "--train_file", str(data), "--validation_fraction", "0.2"]
        words += ["--peft_config", str(folder / f"{kind}.json"), "--output_dir", str(folder / kind)]
        assert finetune([*words, *SHORT, "--num_sample_answers", "0", "--dataset_skip_cache"]) == 0
    return folder


def test_adapters_of_several_types_are_used_side_by_side(trained, tmp_path, capsys):
    words = [word for kind in ("OFT", "VBLORA", "BEFT") for word in ("--adapter", str(trained / kind))]
    held_out = write_conversations(tmp_path / "heldout.jsonl", "reverse", 6, seed=9)
    assert (
        evaluate_main([*words, "--file", str(held_out), "--metrics", "loss", "--output_dir", str(tmp_path / "e")]) == 0
    )
    together = json.loads((tmp_path / "e" / "evaluation.json").read_text())["figures"]
    for kind in ("OFT", "VBLORA", "BEFT"):
        tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY_MODEL), trained / kind).eval()
        assert together[kind]["loss"]["value"] == pytest.approx(plain_loss(tuned, held_out), rel=1e-4)
    assert len({figure["loss"]["value"] for figure in together.values()}) == 4
    assert generate_main([*words[:2], "--prompt", "old dry open", "--max_new_tokens", "4"]) == 0
    capsys.readouterr()
    assert inspect_main(words[:2]) == 2
    assert "adapter OFT is OFT, which has no virtual tokens to inspect" in capsys.readouterr().err


def test_merging_where_peft_can(trained, tmp_path, capsys):
    assert merge_main(["--adapter", str(trained / "OFT"), "--output", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "model.safetensors").exists()
    capsys.readouterr()
    assert merge_main(["--adapter", str(trained / "BEFT"), "--output", str(tmp_path / "not")]) == 2
    error = capsys.readouterr().err
    assert "adapter BEFT (BEFT) can't be used (Base layer has no bias" in error and error.count("\n") == 1, error
    assert not (tmp_path / "not").exists()


def test_training_continues_from_an_adapter_by_its_own_configuration(trained, config, train):
    flags = ["--adapter_name_or_path", str(trained / "OFT"), *SHORT]
    run = train("on", *flags)
    assert run.code == 0, run.err
    assert run.summary["initial_eval_loss"] < run.summary["base_eval_loss"]
    recorded = json.loads((run.folder / "run.json").read_text())
    assert recorded["method"] == "peft" and recorded["flags"]["peft_config"]["value"].endswith(
        "OFT/adapter_config.json"
    )
    for words, says in (
        (config("OFT", r=8), "contradicts the"),
        (config("BOFT"), "the method is peft: drop"),
        (["--use_lora"], "is OFT, and the method is lora"),
    ):
        refused = train("refused", *flags, *words)
        assert refused.code == 2 and says in refused.err and refused.err.count("\n") == 1, refused.err


@pytest.mark.parametrize(
    "fields, says",
    [
        ({}, "it has no peft_type: use one of ADAMSS"),
        ({"peft_type": "OFTT"}, "peft_type 'OFTT' is not known, did you mean OFT?"),
        ({"peft_type": 3}, "peft_type '3' is not known"),
        ({"peft_type": "LORA"}, "has flags of its own: use --use_lora"),
        ({"peft_type": "XLORA"}, "two passes"),
        ({"peft_type": "LILY"}, "by a mean over all tokens of a batch"),
        ({"peft_type": "ADALORA", "total_step": 9}, "prunes ranks after each step"),
        ({"peft_type": "OFT", "rank": 3}, "rank is no field of OFT: remove it"),
        ({"peft_type": "OFT", "target_module": "x"}, "did you mean target_modules?"),
        ({"peft_type": "OFT", "r": "8"}, "r '8' has the wrong type: PEFT wants a whole number"),
        ({"peft_type": "OFT", "r": 8, "oft_block_size": 8}, "change r, oft_block_size"),
        ({"peft_type": "OFT", "target_modules": ["nothing"]}, "change target_modules"),
        ({"peft_type": "OFT", "target_modules": "(a+)+$("}, "pattern"),
        ({"peft_type": "OFT", "task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS' is not the model's: remove it"),
        ({"peft_type": "C3A", "block_size": 100, "target_modules": "all-linear"}, "can't be put on this llama model"),
        ({"peft_type": "PVERA", "sample_at_inference": True}, "held-out losses and answers would be random"),
        ({"peft_type": "ADAMSS", "use_asa": True}, "in no checkpoint"),
        ({"peft_type": "SHIRA", "r": -1, "target_modules": "all-linear"}, "--peft_config"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_one_line(fields, says, config, train):
    run = train("run", *config(**fields))
    assert run.code == 2 and says in run.err and "--peft_config" in run.err and run.err.count("\n") == 1, run.err


@pytest.mark.parametrize("text", [None, "", "[1]", '{"peft_type": "OFT", "r": NaN}', '{"r": 1, "r": 2}', "\udcff"])
def test_a_file_that_is_no_configuration_is_one_line(text, train, tmp_path):
    path = tmp_path / "c.json"
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    run = train("run", "--peft_config", str(path))
    assert run.code == 2 and f"--peft_config {path} can't be used" in run.err and run.err.count("\n") == 1, run.err
    both = train("run", "--peft_config", str(path), "--use_lora")
    assert "--use_lora and --peft_config exclude each other" in both.err


def test_quantised_bases_where_peft_has_layers_for_them(config, train):
    run = train("quantised", *config("ROAD"), *SHORT, "--load_in_4bit")
    assert run.code == 0 and run.summary["final_eval_loss"] < run.summary["base_eval_loss"], run.err
    refused = train("refused", *config("OFT"), *SHORT, "--load_in_4bit")
    assert refused.code == 2 and "OFT does not work with 4-bit base: PEFT has no quantised layers" in refused.err


def test_a_study_of_configurations(tmp_path, config, capsys):
    for name in ("train", "heldout"):
        write_conversations(tmp_path / f"{name}.jsonl", "reverse", 20, seed=len(name))
    flags = {"model_name_or_path": str(TINY_MODEL), "max_train_steps": 2, "dataset_skip_cache": True}
    flags |= {"train_file": str(tmp_path / "train.jsonl"), "validation_file": str(tmp_path / "heldout.jsonl")}
    content = {
        "name": "s",
        "output_dir": str(tmp_path / "study"),
        "flags": flags,
        "methods": {name: {"method": "peft", "peft_config": config(name)[1]} for name in ("OFT", "LN_TUNING")},
        "seeds": [1],
        "report": {"questions": 0},
    }
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(content))
    assert study_main(["--config", str(path)]) == 0
    report = json.loads((tmp_path / "study" / "report.json").read_text())
    assert {method["name"] for method in report["methods"]} == {"OFT", "LN_TUNING"}
    assert len(list((tmp_path / "study").glob("base-*.json"))) == 1  # both left the base as it was
    path.write_text(json.dumps({**content, "methods": ["peft"]}))
    capsys.readouterr()
    assert study_main(["--config", str(path)]) == 2
    assert "methods.peft is of the method peft, which peft_config chooses: set it there" in capsys.readouterr().err


def test_every_type_of_peft_is_known_once():
    known = [*TYPES, *OWN_FLAGS, *REFUSED]
    assert sorted(known) == sorted(kind.value for kind in PeftType)
    for kind in PeftType:
        method = method_of_type(kind.value)
        assert (method is None) == (kind.value in REFUSED)
        assert (method in METHODS.values()) == (kind.value in OWN_FLAGS)


def test_the_page_lists_every_type_and_is_in_the_form_of_its_program():
    page = PAGE.read_text()
    listed = re.findall(r"^\| ([A-Z][A-Z0-9_]+) \|", page, re.MULTILINE)
    assert sorted(listed) == sorted(kind.value for kind in PeftType)
    match = re.search(r"\*\*(\d+) train, resume bit for bit and evaluate\*\*", page)
    assert match and int(match[1]) >= 30
    for kind in TYPES:
        assert f"`{json.dumps(example(kind))[:100]}" in page, kind
    for kind, reason in REFUSED.items():
        assert f"| {kind} | {reason} |" in page
    trials = [Trial("OFT", "x", "packed", 5, 0.1, 2.0, 1.0, True, True, True, "why"), Trial("A", "", problem="because")]
    text = render(trials, "1.0")
    assert "| OFT | `--peft_config`: `x` | packed | 5 | 0.1 | 1.0000 | yes | yes | yes | no (1) |" in text
    assert page.split("\n")[:3] == text.split("\n")[:3] and "| A | because |" in text
    assert make_peft_methods.NUM_STEPS == 40
