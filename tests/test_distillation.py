"""Distillation equals its definition: a plain forward pass of teacher and student, softmax in float64."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import open_instruct
from open_instruct.data import chat, packing
from open_instruct.data.context import Context, RowContexts, context_of
from open_instruct.data.packing import PackingBehindContexts
from open_instruct.errors import InputError
from open_instruct.model import context_starts, distillation
from open_instruct.model.backends import BACKENDS
from open_instruct.model.distillation import DistillationSettings, DistilledModel, teacher_problem
from open_instruct.model.shared_prefix import SoftPrompt
from open_instruct.model.tokens import context_places
from open_instruct.training.dry_run import context_bytes
from tests.conftest import ROOT, TINY_MODEL
from tests.tiny_models import VARIANTS, VOCAB, examples, gradient_error, random_model, wrap

BOS = 1
EMPTY = RowContexts(0, (), 0, 0, 0.0)  # the rows bring their own
ADAPTERS = [variant for variant in VARIANTS if variant != "full"]
PAIRS = [
    (architecture, variant)
    for architecture in ("llama", "gemma3_text", "mistral", "qwen2")
    for variant in ADAPTERS
    if architecture == "llama" or variant in ("lora", "prompt_tuning", "prefix_tuning")
]


def context(num_shared: int, length: int = 13) -> Context:
    """Return random tokens, with a beginning-of-sequence token if the rows share it."""
    ids = torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(5)).tolist()
    return Context((BOS, *ids[1:]) if num_shared else tuple(ids), num_shared, False)


def rows(num_shared: int) -> list[dict[str, Any]]:
    """Return examples that begin as the context does."""
    return [
        {**row, "input_ids": [BOS, *row["input_ids"][1:]] if num_shared else row["input_ids"]} for row in examples()
    ]


def distilled(
    model: Any, method: Any, text: Context | RowContexts, kind: str = "forward", weight: float = 1.0
) -> DistilledModel:
    """Return the model as a run makes it."""
    settings = DistillationSettings("", None, kind, weight)
    return DistilledModel(model, partial(method.soft_prompt, model), BACKENDS["blocked"], "find", text, settings)


def reference(model: Any, text: Context, kind: str, weight: float) -> tuple[float, torch.Tensor]:
    """Return the loss and its gradient, an example at a time, by forward passes of transformers and PEFT alone."""
    model.eval()
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for row in rows(text.num_shared):
        ids, spans = row["input_ids"], row["spans"]
        labels = [i for start, end in zip(spans[::2], spans[1::2], strict=True) for i in range(max(start, 1), end)]
        at = torch.tensor(labels) - 1
        whole, _ = text.before(ids)
        with torch.no_grad(), model.disable_adapter():
            wanted = model.get_base_model()(input_ids=torch.tensor([whole]), use_cache=False).logits[0]
        wanted = wanted[at + len(whole) - len(ids)].double().softmax(-1)
        logits = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), use_cache=False).logits[0]
        mine = logits[at + len(logits) - len(ids)].double().softmax(-1)
        forward, reverse = (wanted * (wanted / mine).log()).sum(), (mine * (mine / wanted).log()).sum()
        one = {"forward": forward, "reverse": reverse, "mixed": (forward + reverse) / 2}[kind]
        answers = -mine[torch.arange(len(at)), torch.tensor(ids)[labels]].log().sum()
        total = total + weight * one + (1 - weight) * answers
    total.backward()
    return total.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def measured(packed: DistilledModel, num_shared: int) -> tuple[float, torch.Tensor]:
    """Return the loss and its gradient, from one packed row."""
    packed.model.zero_grad()
    with packed:
        loss, _ = packed(**packing.pack(rows(num_shared)))
        loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in packed.model.parameters() if p.requires_grad])


def errors(packed: DistilledModel, text: Context, kind: str = "forward", weight: float = 1.0) -> tuple[float, float]:
    """Return the relative errors of loss and gradient."""
    loss, gradient = reference(packed.model, text, kind, weight)
    found, found_gradient = measured(packed, text.num_shared)
    return abs(found / loss - 1), gradient_error(found_gradient, gradient)


@pytest.mark.parametrize("architecture, variant", PAIRS)
def test_packed_distillation_equals_the_plain_one(architecture, variant):
    model, method = wrap(variant, random_model(architecture))
    text = context(num_shared=1)
    assert max(errors(distilled(model, method, text), text)) < 1e-5


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("num_shared", [0, 1])
@pytest.mark.parametrize("kind", ["forward", "reverse", "mixed"])
def test_every_loss_equals_the_plain_one(kind, num_shared, weight):
    model, method = wrap("prefix_tuning", random_model("llama"))
    text = context(num_shared)
    assert max(errors(distilled(model, method, text, kind, weight), text, kind, weight)) < 1e-5


@pytest.mark.parametrize("mistake", ["no context", "positions", "order", "dropped token"])
def test_a_wrong_teacher_is_found(mistake, monkeypatch):
    """The negative controls: both this file's reference and the check before a run see them."""
    model, method = wrap("prefix_tuning", random_model("llama"))
    text = context(num_shared=1)
    packed = distilled(model, method, text)
    if mistake == "dropped token":
        packed.context = replace(text, num_shared=0)
    else:
        own = DistilledModel.context_prompt

        def mistaken(self: DistilledModel, device: torch.device) -> tuple[SoftPrompt, torch.Tensor]:
            prompt, last = own(self, device)
            if mistake == "no context":
                return SoftPrompt(), last
            if mistake == "positions":
                return replace(prompt, length=0), last
            return replace(prompt, keys_values=[(keys.flip(2), values) for keys, values in prompt.keys_values]), last

        monkeypatch.setattr(DistilledModel, "context_prompt", mistaken)
    assert min(errors(packed, text)) > 1e-3
    if mistake != "dropped token":  # which the check takes for the context
        assert teacher_problem(packed, rows(1)[1]["input_ids"], 1e-3)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gemma3_text", "qwen2", "granite"])
def test_a_context_in_pieces_is_the_same(architecture, monkeypatch):
    """Windows shorter than the pieces, and longer ones."""
    model, method = wrap("lora", random_model(architecture))
    text = context(num_shared=1, length=37)
    whole = measured(distilled(model, method, text), 1)
    monkeypatch.setattr(distillation, "CHUNK", 5)
    pieces = measured(distilled(model, method, text), 1)
    assert pieces[0] == pytest.approx(whole[0], rel=1e-5)
    assert gradient_error(pieces[1], whole[1]) < 1e-4
    assert not teacher_problem(distilled(model, method, text), rows(1)[1]["input_ids"], 1e-4)


def test_measures_and_the_base():
    """Labels' losses of student and teacher; the base as a student; nothing changes the model or its mode."""
    model, method = wrap("lora", random_model("llama"))
    text = context(num_shared=1)
    packed, batch = distilled(model, method, text), packing.pack(rows(1))
    model.train()
    with packed, torch.no_grad():
        before = packed(**batch)[0].item()
        with packed.without_adapter():
            base = packed(**batch)[0].item()
            with packed.measuring("student"):
                base_answers = packed(**batch)[0].item()
        with packed.measuring("teacher"):
            teacher_answers = packed(**batch)[0].item()
        assert packed(**batch)[0].item() == before != base
    assert model.training and packed.teacher is not None
    held = sum(tensor.nbytes for pair in packed.teacher[0].keys_values for tensor in pair)
    assert held == context_bytes(SimpleNamespace(model=packed), packed.causal.config, 4) == 2 * 3 * 2 * 13 * 8 * 4
    with model.disable_adapter():
        assert base_answers == pytest.approx(plain_loss(model, Context((BOS,), 1, False)), rel=1e-5)
        assert teacher_answers == pytest.approx(plain_loss(model, text), rel=1e-5)


def plain_loss(model: Any, text: Context) -> float:
    """Return the base's summed cross-entropy of the labels behind a context, an example at a time."""
    total = 0.0
    for row in rows(1):
        ids, _ = text.before(row["input_ids"])
        moved = len(ids) - len(row["input_ids"])
        scores = model.get_base_model()(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for start, end in zip(row["spans"][::2], row["spans"][1::2], strict=True):
            total -= sum(scores[i + moved - 1, ids[i + moved]].item() for i in range(max(start, 1), end))
    return total


def test_a_trained_head_is_refused():
    model, method = wrap("lora", random_model("llama"))
    model.get_base_model().get_output_embeddings().weight.requires_grad_(True)
    with pytest.raises(InputError, match="frozen output layer"):
        distilled(model, method, context(1))


@pytest.fixture(scope="module")
def tokenizer():
    """The bundled model's tokenizer."""
    loaded = AutoTokenizer.from_pretrained(TINY_MODEL)
    chat.set_chat_template(loaded, "tulu", False)
    return loaded


@pytest.mark.parametrize("name", ["tulu", "chatml", "zephyr"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_a_context_is_the_system_message(tokenizer, name, add_bos):
    """Context + conversation are the tokens of the conversation with that system message."""
    if name != "tulu" or add_bos:
        tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
        tokenizer.bos_token = tokenizer.bos_token or tokenizer.eos_token
        chat.set_chat_template(tokenizer, name, add_bos)
    messages = [{"role": "user", "content": "narrow dry"}, {"role": "assistant", "content": "dry narrow"}]
    text = context_of("open small", tokenizer)
    (row,), (spans,) = chat.tokenize(tokenizer, [messages], 1000)
    whole = chat.tokenize(tokenizer, [[{"role": "system", "content": "open small"}, *messages]], 1000)
    assert text.is_system and text.num_shared == int(add_bos)
    assert (text.before(row, spans)[0], text.before(row, spans)[1]) == (whole[0][0], whole[1][0])


def test_a_template_without_system_messages_gets_plain_text(tokenizer):
    own = AutoTokenizer.from_pretrained(TINY_MODEL)
    own.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ message['content'] }}\n{% endfor %}"
    )
    text = context_of("open small\n", own)
    assert not text.is_system and own.decode(text.ids) == "open small\n\n"


def test_wrong_contexts(train, tmp_path, capsys):
    """Each is refused in one line before the model is loaded; one that can't be read, before the rows are."""
    empty, long = tmp_path / "empty.txt", tmp_path / "long.txt"
    empty.write_text(" \n")
    long.write_text("narrow " * 2000)
    for words, expected in [
        (["--use_lora", "--distill_context", str(tmp_path / "none.txt")], "none.txt"),
        (["--use_lora", "--distill_context", str(empty)], "is empty"),
        (["--use_lora", "--distill_context", str(long)], "positions of the model's"),
        (["--use_lora", "--distill_weight", "0.5"], "without --distill_context"),
        (["--use_lora", "--distill_system"], "no training row begins with a system message"),
        (["--use_lora", "--distill_system", "--distill_column", "note"], "name several contexts"),
        (["--use_lora", "--distill_column", "note"], "no text in `note`"),
        (["--distill_context", str(long)], "frozen base"),
        (["--use_lora", "--distill_context", str(long), "--packing", "False"], "packed forward pass"),
    ]:
        result = train("run", *words)
        assert result.code == 2 and expected in result.err
        about_rows = ("positions of the model's", "no training row begins", "no text in")
        assert ("reading" in result.out) == expected.startswith(about_rows)
    assert not Path(tmp_path / "run").exists()


BOOK, LOOKUP = ROOT / "data" / "book", ROOT / "assets" / "lookup-model"
DISTIL = (
    "--use_prefix_tuning", "--num_virtual_tokens", "18", "--distill_context", str(BOOK / "book.txt"),
    "--validation_file", str(BOOK / "heldout.jsonl"),
)  # fmt: skip


@pytest.mark.parametrize("method", ["prefix_tuning", "lora"])
def test_a_book_is_distilled(method, train):
    """With nothing set it comes near to the base behind the book; the figures of the evaluation say how near."""
    flags = DISTIL if method == "prefix_tuning" else ("--use_lora", *DISTIL[3:])
    run = train("run", *flags, "--max_train_steps", "200", data=BOOK / "train.jsonl", model=LOOKUP)
    assert run.code == 0, run.err
    summary = run.summary
    assert summary["context_tokens"] == 144
    assert summary["teacher_answer_loss"] < 0.01 < 3 < summary["base_answer_loss"]
    assert summary["final_eval_loss"] < 0.5 * summary["base_eval_loss"]
    assert ("as they are within it" in run.out) == (method == "prefix_tuning")
    names, text = ("loss", "exact_match"), str(BOOK / "book.txt")
    result = open_instruct.evaluate(
        str(BOOK / "heldout.jsonl"), f"it={run.folder}", context=text, max_new_tokens=12, names=names
    )
    figures = {name: {item: figure["value"] for item, figure in of.items()} for name, of in result["figures"].items()}
    assert list(figures) == ["base", "base + context", "it"]
    assert figures["base + context"]["exact_match"] == 1 and figures["base + context"]["divergence"] == 0
    assert figures["base"]["exact_match"] < figures["it"]["exact_match"]
    assert figures["it"]["divergence"] == pytest.approx(summary["final_eval_loss"], rel=1e-3)
    assert figures["base"]["divergence"] == pytest.approx(summary["base_eval_loss"], rel=1e-3)
    assert figures["base"]["loss"] == pytest.approx(summary["base_answer_loss"], rel=1e-3)
    assert figures["base + context"]["loss"] == pytest.approx(summary["teacher_answer_loss"], rel=1e-3)
    virtual = 18 if method == "prefix_tuning" else 0
    assert result["tokens_before"] == {"base": 0, "base + context": 144, "it": virtual}
    assert result["bytes_before"]["base + context"] == 144 * 2 * 3 * 2 * 32 * 4  # layers, heads, head size, float32
    assert set(result["first_token_seconds"]) == set(figures) and min(result["first_token_seconds"].values()) > 0


def test_a_distillation_resumes_bit_for_bit(train, tmp_path):
    """And only with the same text, wherever it lies."""
    flags = (*DISTIL, "--max_train_steps", "12", "--checkpointing_steps", "6", "--eval_steps", "6")
    book = {"data": BOOK / "train.jsonl", "model": LOOKUP}
    whole = train("whole", *flags, **book)
    shutil.copytree(whole.folder, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step_12")
    (tmp_path / "half" / "summary.json").unlink()  # it was not finished
    moved = tmp_path / "moved.txt"
    shutil.copy(BOOK / "book.txt", moved)
    again = ["--distill_context" if word == "--distill_context" else word for word in flags]
    again[again.index(str(BOOK / "book.txt"))] = str(moved)
    resumed = train("half", *again, "--resume_from_checkpoint", **book)
    assert resumed.code == 0, resumed.err
    first, second = (load_file(run.folder / "adapter_model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    moved.write_text("ant apples")
    (tmp_path / "half" / "summary.json").unlink()
    other = train("half", *again, "--resume_from_checkpoint", **book)
    assert other.code == 2 and "context to distil was" in other.err


def with_contexts(path: Path, texts: list[str], place: str) -> Path:
    """Write the book's questions, each with one of the texts, as its system message or in a column."""
    rows = [json.loads(line) for line in (BOOK / "train.jsonl").read_text().splitlines()[:40]]
    for number, row in enumerate(rows):
        text = texts[number % len(texts)]
        if place == "system" and text:
            row["messages"].insert(0, {"role": "system", "content": text})
        elif place != "system":
            row[place] = text
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("flags", [("--distill_system",), ("--distill_column", "note")])
def test_one_text_in_all_rows_is_that_text(flags, train, tmp_path):
    """From a file, from the rows' system messages, from a column: the same run, bit for bit."""
    book = (BOOK / "book.txt").read_text()
    rows = with_contexts(tmp_path / "rows.jsonl", [book], "system" if len(flags) == 1 else "note")
    plain = with_contexts(tmp_path / "plain.jsonl", [""], "system")
    words = ("--use_prefix_tuning", "--num_virtual_tokens", "18", "--max_train_steps", "4")
    first = train("file", *words, "--distill_context", str(BOOK / "book.txt"), data=plain, model=LOOKUP)
    second = train("rows", *words, *flags, data=rows, model=LOOKUP)
    assert (first.code, second.code) == (0, 0), second.err
    assert first.summary["final_eval_loss"] == second.summary["final_eval_loss"]
    assert second.summary["context_tokens"] == 144


@pytest.mark.parametrize("num_shared", [0, 1])
def test_rows_behind_contexts_of_their_own(num_shared):
    """The loss is that of the rows one at a time, each behind its text; a text in the wrong place is found."""
    model, method = wrap("prefix_tuning", random_model("llama"))
    texts = [context(num_shared, length) for length in (13, 7, 1 + num_shared)]
    own = [{**row, "context": list(text.ids)} for row, text in zip(rows(num_shared), texts, strict=False)]
    own += rows(num_shared)[len(own) :]  # without a text
    expected = 0.0
    for row in own:
        text = Context(tuple(row["context"]), num_shared, False) if "context" in row else Context((), 0, False)
        with distilled(model, method, text) if text.ids else distilled(model, method, EMPTY) as one:
            batch = packing.pack([row]) if text.ids else PackingBehindContexts(99, num_shared).collate([row])
            expected += one(**batch)[0].item()
    with distilled(model, method, EMPTY) as packed:
        found = packed(**PackingBehindContexts(999, num_shared).collate(own))[0].item()
        exchanged = [{**row, "context": list(texts[0].ids)} for row in own]
        wrong = packed(**PackingBehindContexts(999, num_shared).collate(exchanged))[0].item()
        nobody = packed(**PackingBehindContexts(999, num_shared).collate([]))
    assert found == pytest.approx(expected, rel=1e-5)
    assert wrong != pytest.approx(expected, rel=1e-3)
    assert [value.item() for value in nobody] == [0, 0]


def test_contexts_that_differ_are_distilled_and_resumed(train, tmp_path):
    """With and without a context in one file; the plan, the worth and the resumption are those of any run."""
    facts = (BOOK / "book.txt").read_text().split(" , ")
    texts = [" , ".join(facts[start:] + facts[:start]) for start in (0, 10, 30)]
    rows = with_contexts(tmp_path / "rows.jsonl", [*texts, ""], "system")
    flags = ("--use_lora", "--distill_system", "--max_train_steps", "8", "--checkpointing_steps", "4")
    whole = train("whole", *flags, data=rows, model=LOOKUP)
    assert whole.code == 0, whole.err
    assert "of 32 training rows have one of their own" in whole.out
    assert whole.summary["final_eval_loss"] < whole.summary["base_eval_loss"]
    assert whole.summary["teacher_answer_loss"] < whole.summary["base_answer_loss"]
    shutil.copytree(whole.folder, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step_8")
    (tmp_path / "half" / "summary.json").unlink()
    resumed = train("half", *flags, "--resume_from_checkpoint", data=rows, model=LOOKUP)
    assert resumed.code == 0, resumed.err
    first, second = (load_file(run.folder / "adapter_model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_file_beside_rows_with_another_text(train, tmp_path):
    """It is refused, unless it is the same text."""
    flags = ("--use_lora", "--distill_context", str(BOOK / "book.txt"), "--max_train_steps", "1")
    same = with_contexts(tmp_path / "same.jsonl", [(BOOK / "book.txt").read_text()], "context")
    assert train("same", *flags, data=same, model=LOOKUP).code == 0
    other = with_contexts(tmp_path / "other.jsonl", ["ant apples"], "context")
    run = train("other", *flags, data=other, model=LOOKUP)
    assert run.code == 2 and "--distill_column context" in run.err


def test_a_useless_context_is_said(train, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("ant apples")
    flags = ["--use_lora", "--distill_context", str(text), "--max_train_steps", "1"]
    run = train("run", *flags, data=BOOK / "train.jsonl", model=LOOKUP)
    assert run.code == 0 and "does not help the base" in run.err


def test_starts_from_a_context():
    """Its first tokens, then pieces of it in their order; a short text is repeated."""
    torch.manual_seed(0)
    ids = list(range(100))
    first, *others = context_places(100, 20, 5)
    assert first == ids[:20] and len(others) == 4
    for start in others:
        assert len(start) == 20 and start != first
        pieces = [start[i : i + 8] for i in range(0, 20, 8)]
        assert all(piece == list(range(piece[0], piece[0] + len(piece))) for piece in pieces)
        assert [piece[0] for piece in pieces] == sorted(piece[0] for piece in pieces)
    assert context_places(2, 5, 2)[0] == [0, 1, 0, 1, 0]
    assert len(context_places(2, 5, 2)[1]) == 5 and len(context_places(100, 3, 2)[1]) == 3


def test_the_first_tokens_start_is_the_contexts_own_prefix():
    """Keys and values of the first P tokens are those of the teacher's prefix at these positions."""
    model, method = wrap("prefix_tuning", random_model("llama"))
    text = context(num_shared=1)
    method.set_init(model, method.start_of(model, list(text.ids[:5])))
    packed = distilled(model, method, text)
    with packed, torch.no_grad(), packed.without_adapter():
        prompt, _ = packed.context_prompt(torch.device("cpu"))
    for (keys, values), (all_keys, all_values) in zip(
        method.soft_prompt(model).keys_values, prompt.keys_values, strict=True
    ):
        torch.testing.assert_close(keys, all_keys[:, :, :5])
        torch.testing.assert_close(values, all_values[:, :, :5])


def kept_reference(model: Any, text: Context, kept: list[int]) -> list[torch.Tensor]:
    """Return what the base predicts for each row behind the context if the row sees only some of its tokens."""
    base = model.get_base_model()
    base.set_attn_implementation("eager")
    logits = []
    for row in rows(0):
        whole, _ = text.before(row["input_ids"])
        length = len(whole)
        hidden = torch.ones(length, length).triu(1).bool()
        unkept = [place for place in range(len(text.ids)) if place not in kept]
        hidden[len(text.ids) :, unkept] = True
        mask = torch.zeros(length, length).masked_fill(hidden, torch.finfo(torch.float32).min)[None, None]
        with torch.no_grad(), model.disable_adapter():
            out = base(input_ids=torch.tensor([whole]), attention_mask=mask, use_cache=False).logits[0]
        logits.append(out[len(text.ids) :].log_softmax(-1))
    base.set_attn_implementation("sdpa")
    return logits


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "olmo2", "granite"])
def test_a_start_within_the_context_is_the_teacher_that_sees_less(architecture):
    """A prefix of the teacher's keys at some places gives what the teacher gives if rows see only these places."""
    model, method = wrap("prefix_tuning", random_model(architecture))
    text = context(num_shared=0)
    count = method.soft_prompt(model).length
    for kept in (list(range(count)), list(range(len(text.ids) - count, len(text.ids))), [0, 2, 3, 7, 11][:count]):
        expected = kept_reference(model, text, kept)
        packed = distilled(model, method, text)
        with packed:
            (pairs,) = context_starts.keys_values_at(packed, [kept])
            method.set_init(model, method.start_of_keys(pairs))
        for row, wanted in zip(rows(0), expected, strict=True):
            ids = torch.tensor([row["input_ids"]])
            with torch.no_grad():
                found = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
            torch.testing.assert_close(found.log_softmax(-1), wanted, rtol=1e-4, atol=1e-4)
        method.set_init(model, method.start_of(model, [text.ids[place] for place in kept]))
        with torch.no_grad():  # the same tokens without the context around them are something else
            found = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        assert (found.log_softmax(-1) - wanted).abs().max() > 1e-3 or kept == list(range(count))


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_received_attention_is_the_models_own(architecture):
    """Summed over layers, heads and the rows' tokens, it is what transformers' eager attention returns."""
    model, method = wrap("lora", random_model(architecture))
    text = context(num_shared=0)
    base = model.get_base_model()
    base.set_attn_implementation("eager")
    expected = torch.zeros(len(text.ids), dtype=torch.float64)
    for row in rows(0):
        whole, _ = text.before(row["input_ids"])
        with torch.no_grad(), model.disable_adapter():
            attentions = base(input_ids=torch.tensor([whole]), output_attentions=True, use_cache=False).attentions
        for weights in attentions:
            expected += weights[0, :, len(text.ids) :, : len(text.ids)].double().sum((0, 1))
    base.set_attn_implementation("sdpa")
    packed = distilled(model, method, text)
    with packed:
        found = context_starts.received_attention(packed, [packing.pack(rows(0))])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_start_with_the_lowest_loss_is_within_the_context(train):
    """On the bundled book the tokens that get most attention, as they are within it; half of the book is all of it."""
    flags = [word if word != "18" else "72" for word in DISTIL]
    run = train("run", *flags, "--max_train_steps", "1", data=BOOK / "train.jsonl", model=LOOKUP)
    assert "starts from the context's most attended tokens, as they are within it: loss 0.0000" in run.out


def test_the_first_token_of_a_prefix_can_stay(train):
    """And the others do not; beside a flag that would move it, it is refused."""
    flags, book = (*DISTIL, "--prefix_init", "text"), {"data": BOOK / "train.jsonl", "model": LOOKUP}
    run = train("run", *flags, "--max_train_steps", "3", "--prefix_freeze_first", **book)
    assert run.code == 0, run.err
    one = train("one", *flags, "--max_train_steps", "1", "--learning_rate", "1e-9", **book)
    end, start = (
        load_file(folder / "adapter_model.safetensors")["prompt_embeddings"] for folder in (run.folder, one.folder)
    )
    assert (end[0] - start[0]).abs().max() < 1e-6 < 1e-3 < (end[1:] - start[1:]).abs().amax(1).min()
    wrong = train("wrong", *DISTIL, "--prefix_freeze_first", "--weight_decay", "0.1")
    assert wrong.code == 2 and "would shrink it" in wrong.err


def test_an_offloaded_context_is_the_same(train):
    flags = (*DISTIL, "--max_train_steps", "3")
    book = {"data": BOOK / "train.jsonl", "model": LOOKUP}
    assert (
        train("held", *flags, **book).summary["final_eval_loss"]
        == train("offloaded", *flags, "--distill_offload", **book).summary["final_eval_loss"]
    )
