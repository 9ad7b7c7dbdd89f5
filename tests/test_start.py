"""A soft prompt's start and the learning rate are chosen on a run's first micro-batches, before its first step."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from open_instruct.adapters.scoring import answer_losses
from open_instruct.data.chat import set_chat_template
from open_instruct.data.plan import Plan
from open_instruct.flags import default_values
from open_instruct.methods import METHODS
from open_instruct.training import start
from open_instruct.training.start import CANDIDATES, JUDGED_ON
from tests.conftest import TINY_MODEL, method_flags

SHORT = [
    "--max_train_steps",
    "8",
    "--per_device_train_batch_size",
    "4",
    "--eval_steps",
    "0",
    "--num_virtual_tokens",
    "6",
]


def conversations(path, tokenizer) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Ids and spans of a file's rows, by the chat module alone."""
    from open_instruct.data.chat import tokenize

    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    ids, spans = tokenize(tokenizer, rows, 10**6)
    return list(zip(ids, spans, strict=True))


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_the_start_with_the_lowest_loss_is_taken(method, train, data_file):
    """Repeated by hand: the same draws, judged one row at a time by PEFT's own forward pass."""
    run = train("run", *method_flags(method), *SHORT, "--validation_fraction", "0")
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    set_chat_template(tokenizer, "tulu", False)
    values = default_values(num_virtual_tokens=6, prompt_tuning_init="screened", prefix_init="screened")
    settings = METHODS[method].settings(values)
    torch.manual_seed(42)
    model = METHODS[method].wrap(AutoModelForCausalLM.from_pretrained(TINY_MODEL), tokenizer, settings).eval()
    candidates = METHODS[method].init_candidates(model, tokenizer, settings, CANDIDATES)
    rows = conversations(data_file, tokenizer)
    plan = Plan(len(rows), 4, 8, 42)
    chosen = [rows[i] for step in range(JUDGED_ON // 4) for i in plan.examples(step)]
    losses = []
    for candidate in candidates:
        METHODS[method].set_init(model, candidate)
        sums = answer_losses(model, [ids for ids, _ in chosen], [spans for _, spans in chosen], 1)
        losses.append(sum(loss for loss, _ in sums) / sum(count for _, count in sums))
    best = min(range(CANDIDATES), key=losses.__getitem__)
    origin = "the text" if best == 0 else f"draw {best} of random tokens"
    assert (
        f"soft prompt starts from {origin}: loss {losses[best]:.4f}, the lowest of 16 starts (text {losses[0]:.4f}, "
        f"highest {max(losses):.4f})"
    ) in run.out
    assert losses[best] < losses[0]
    if method == "prompt_tuning":
        assert torch.equal(load_file(run.folder / "soft_prompt_start.safetensors")["embeddings"], candidates[best])


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "lora"])
def test_a_range_test_leaves_no_trace_but_the_rate(method, train):
    """The same rate by hand gives the same adapter bit for bit: trials change neither parameters, dropout nor order."""
    steps = SHORT if method != "lora" else SHORT[:-2]
    run = train("run", *method_flags(method), *steps, "--auto_lr")
    record = json.loads((run.folder / "run.json").read_text())["flags"]["learning_rate"]
    test = json.loads((run.folder / "auto_lr.json").read_text())
    assert record == {"value": test["chosen"], "origin": "auto_lr"}
    assert f"learning rate {test['chosen']:.3g} (recipe {test['rates'][2]:.3g}): {test['why']}" in run.out
    assert (run.folder / "auto_lr.png").read_bytes().startswith(b"\x89PNG") and len(test["rates"]) == len(
        test["losses"]
    ) == 5
    by_hand = train("hand", *method_flags(method), *steps, "--learning_rate", str(test["chosen"]))
    assert not (by_hand.folder / "auto_lr.png").exists()
    contents = [(folder / "adapter_model.safetensors").read_bytes() for folder in (run.folder, by_hand.folder)]
    assert contents[0] == contents[1]


def test_a_resumed_run_keeps_the_rate_that_was_found(train):
    flags = ["--use_prompt_tuning", *SHORT, "--auto_lr", "--checkpointing_steps", "5"]
    full = train("run", *flags)
    content = (full.folder / "adapter_model.safetensors").read_bytes()
    elsewhere = train("other", *flags, "--resume_from_checkpoint", str(full.folder / "checkpoints" / "step_5"))
    assert elsewhere.code == 0 and (elsewhere.folder / "adapter_model.safetensors").read_bytes() == content, (
        elsewhere.err
    )
    for name in ("summary.json", "adapter_model.safetensors"):
        (full.folder / name).unlink()
    resumed = train("run", *flags, "--resume_from_checkpoint")
    assert resumed.code == 0 and "auto_lr:" not in resumed.out and (full.folder / "auto_lr.png").exists(), resumed.err
    assert (full.folder / "adapter_model.safetensors").read_bytes() == content


@pytest.mark.parametrize("flags, message", [
    (
        ["--use_prompt_tuning", "--auto_lr", "--learning_rate", "0.1"],
        "--auto_lr: it chooses a rate and --learning_rate sets one",
    ),
    (["--auto_lr"], "--auto_lr: it would need a second copy of all weights"),
    (
        ["--use_lora", "--learning_rate", "0.1", "--learning_rate_factor", "2"],
        "--learning_rate_factor 2.0: it multiplies the recipe's rate",
    ),
])  # fmt: skip
def test_contradicting_rates_are_refused(flags, message, train):
    run = train("run", *flags)
    assert run.code == 2 and message in run.err and run.err.count("\n") == 1


RATES = [0.01, 0.03, 0.1, 0.3, 1.0]


def test_the_chosen_rate_is_the_parabolas_lowest_point():
    losses = [(math.log(rate) - math.log(0.15)) ** 2 + 1 for rate in RATES]
    chosen, why = start.choose_rate(RATES, losses, 9.0, 0.1)
    assert chosen == pytest.approx(0.15, rel=1e-2) and "parabola" in why


@pytest.mark.parametrize("losses, expected", [
    ([5, 4, 3, 2, 1], 1.0),  # the highest rate is best
    ([1, 2, 3, 4, 5], 0.01),
    ([3, 2, 1, math.nan, math.nan], 0.1),  # higher ones break down
    ([math.inf] * 5, 0.1),  # none works: the recipe's
    ([9.5, 9.5, 9.2, 9.4, 9.9], 0.1),  # none gets below the start: the recipe's
])  # fmt: skip
def test_a_rate_at_the_edge_or_none(losses, expected):
    chosen, _ = start.choose_rate(RATES, losses, 9.0, 0.1)
    assert chosen == expected
