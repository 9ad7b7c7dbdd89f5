"""Merged checkpoints answer as base + adapter do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    pipeline,
)

import open_instruct
from open_instruct import InputError, Sampling
from open_instruct.adapters import prompt_tokens
from open_instruct.flags import default_values
from open_instruct.merge_lora import main as merge_lora_main
from open_instruct.merge_peft import main as merge_main
from open_instruct.methods import METHODS
from open_instruct.serving.checkpoint import added_ids
from tests.conftest import TINY_MODEL

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
BASES: dict[str, Any] = {
    "untied": lambda rows: LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, vocab_size=rows)),
    "tied": lambda rows: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, num_key_value_heads=2, vocab_size=rows, tie_word_embeddings=True)
    ),
    "scaled": lambda rows: Gemma3ForCausalLM(
        Gemma3TextConfig(**SHAPE, num_key_value_heads=2, vocab_size=rows, head_dim=8)
    ),
    "biased": lambda rows: PhiForCausalLM(PhiConfig(**SHAPE, vocab_size=rows)),
}


def make_base(folder: Path, kind: str, rows: int = 907, bos: bool = False) -> Path:
    """A random model with the bundled tokenizer, which may put a BOS token before plain text."""
    torch.manual_seed(1)
    model = BASES[kind](rows)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter)) if name.endswith(
                "bias"
            ) or "norm" in name else parameter.mul_(4)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    if bos:
        from tokenizers import processors

        pair = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{pair[0]} $A", special_tokens=[pair]
        )
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(folder: Path, base: Path, method: str, seed: int = 0, template: str | None = None) -> Path:
    """An adapter that is far from its neutral start, as saved by PEFT."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    values = default_values(num_virtual_tokens=5, prompt_tuning_init="sample_vocab", lora_rank=4, prefix_init="random")
    settings = METHODS[method].settings(values)
    model = METHODS[method].wrap(AutoModelForCausalLM.from_pretrained(base), tokenizer, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if template:
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    return folder


def both(base: Path, adapter: Path, merged: Path, text: str = "the red stone") -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of base + adapter, and of the merged checkpoint given plain text, at the text's positions."""
    ids = AutoTokenizer.from_pretrained(base)(text, return_tensors="pt")["input_ids"]
    new = AutoTokenizer.from_pretrained(merged)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        own = (
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()(input_ids=ids).logits
        )
        plain = AutoModelForCausalLM.from_pretrained(merged).eval()(input_ids=new).logits
    length = ids.shape[1]
    return own[0, -length:], plain[0, -length:, : own.shape[-1]]


@pytest.mark.parametrize(
    "kind, rows, bos", [("untied", 907, True), ("tied", 1024, False), ("scaled", 907, True), ("biased", 907, False)]
)
@pytest.mark.parametrize("method", ["lora", "ia3", "vera", "prompt_tuning", "p_tuning"])
def test_a_merged_checkpoint_equals_base_and_adapter(kind, rows, bos, method, tmp_path):
    if kind == "biased" and method == "ia3":
        pytest.skip("PEFT does not know IA3's layers of Phi")
    base = make_base(tmp_path / "base", kind, rows, bos)
    adapter = make_adapter(tmp_path / "adapter", base, method)
    result = open_instruct.merge([str(adapter)], str(tmp_path / "merged"))
    own, plain = both(base, adapter, tmp_path / "merged")
    torch.testing.assert_close(plain, own, rtol=1e-5, atol=1e-5 * own.abs().max().item())
    bare = AutoModelForCausalLM.from_pretrained(base)(
        AutoTokenizer.from_pretrained(base)("the red stone", return_tensors="pt")["input_ids"]
    )
    assert not torch.allclose(bare.logits[0], own, atol=0.1)  # the adapter does something
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    new_rows = model.get_input_embeddings().weight.shape[0]
    if METHODS[method].merges_into == "weights":
        assert new_rows == rows and not result["tokens"]
        return
    assert new_rows == model.get_output_embeddings().weight.shape[0] == model.config.get_text_config().vocab_size
    assert new_rows == (1024 if rows == 1024 else 912)
    ids = list(range(result["tokens"]["adapter"]["first"], result["tokens"]["adapter"]["first"] + 5))
    added = set(range(rows, new_rows))  # the last of them stand for nothing
    assert set(ids) | added == set(model.generation_config.suppress_tokens) == set(added_ids(tmp_path / "merged"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    start = [tokenizer.bos_token_id] if bos else []
    assert tokenizer("x")["input_ids"][: 5 + len(start)] == ids + start  # before BOS, as PEFT puts them
    assert tokenizer.decode(tokenizer("the red")["input_ids"], skip_special_tokens=True).strip() == "the red"
    again = tokenizer.save_pretrained(tmp_path / "again") and AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again("the red")["input_ids"] == tokenizer("the red")["input_ids"]


TEMPLATE = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"


PROMPT = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}


@pytest.mark.parametrize(
    "templates", [(TEMPLATE, TEMPLATE), (TEMPLATE, TEMPLATE.replace("'a:'", "'b:'"))], ids=["one", "two"]
)
def test_two_soft_prompts_in_one_checkpoint_are_chosen_by_name(templates, tmp_path):
    base = make_base(tmp_path / "base", "tied")
    folders = {
        name: make_adapter(tmp_path / name, base, method, seed, template)
        for seed, (name, method, template) in enumerate(
            zip(("sum", "translate"), ("prompt_tuning", "p_tuning"), templates, strict=True)
        )
    }
    open_instruct.merge([f"{name}={folder}" for name, folder in folders.items()], str(tmp_path / "merged"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    messages = [{"role": "user", "content": "the red stone"}]
    for name, folder in folders.items():
        own = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
        trained_tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = trained_tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        new = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, adapter=name
        )["input_ids"]
        assert new[0, 5:].tolist() == ids[0].tolist()
        with torch.no_grad():
            wanted, got = own(input_ids=ids).logits[0, 5:], model(new).logits[0, 5:, :907]
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        assert (
            model.generate(new, **greedy)[0, new.shape[1] :].tolist()
            == own.generate(input_ids=ids, **greedy)[0, ids.shape[1] :].tolist()
        )
    plain = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, adapter="base")
    assert plain == AutoTokenizer.from_pretrained(folders["sum"]).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    first = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert first.startswith("<|sum_0|>") and "translate" not in first
    with pytest.raises(Exception, match="no adapter other: there are sum, translate, base"):
        tokenizer.apply_chat_template(messages, tokenize=False, adapter="other")


NO_PEFT = """
import sys
sys.modules["peft"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = tokenizer("the red stone", return_tensors="pt")["input_ids"]
print(model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1]:].tolist())
"""


def test_a_merged_soft_prompt_needs_no_peft(tmp_path):
    """In a process in which peft can't be imported; and through `pipeline`."""
    base = make_base(tmp_path / "base", "untied")
    adapter = make_adapter(tmp_path / "adapter", base, "prompt_tuning")
    assert merge_main(["--adapter", str(adapter), "--output", str(tmp_path / "merged")]) == 0
    result = subprocess.run([sys.executable, "-c", NO_PEFT, str(tmp_path / "merged")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    own = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    ids = AutoTokenizer.from_pretrained(base)("the red stone", return_tensors="pt")["input_ids"]
    wanted = own.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    assert json.loads(result.stdout) == wanted
    piped = pipeline("text-generation", model=str(tmp_path / "merged"), device="cpu")(
        "the red stone", max_new_tokens=12, do_sample=False
    )
    assert (
        AutoTokenizer.from_pretrained(base).decode(wanted, skip_special_tokens=True).strip()
        in piped[0]["generated_text"]
    )


def test_verification_notices_a_wrong_row(tmp_path, monkeypatch, capsys):
    """Negative control: a soft prompt that is written a little off is not kept."""
    base = make_base(tmp_path / "base", "tied")
    adapter = make_adapter(tmp_path / "adapter", base, "prompt_tuning")
    monkeypatch.setattr(prompt_tokens, "embedding_scale", lambda embedding: 1.05)
    assert merge_main(["--adapter", str(adapter), "--output", str(tmp_path / "merged")]) == 2
    assert "merged model's logits differ from base + adapter" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists() and sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter",
        "base",
    ]


@pytest.mark.parametrize("words", [
    ["--base_model_name_or_path", "{base}", "--output_dir", "{out}/", "--save_tokenizer", "--use_fast_tokenizer"],
    ["--tokenizer_name_or_path", "{base}", "--output_dir", "{out}", "--pad_to_multiple_of", "8", "--seed", "1"],
])  # fmt: skip
def test_the_flags_of_open_instruct_lead_to_the_same_checkpoint(words, tmp_path, capsys):
    base = make_base(tmp_path / "base", "untied")
    adapter, out = make_adapter(tmp_path / "adapter", base, "lora"), tmp_path / "out"
    named = ["--lora_model_name_or_path", str(adapter)]
    assert merge_lora_main([*named, *(word.format(base=base, out=out) for word in words)]) == 0
    assert "3 of 3 greedy texts are equal" in capsys.readouterr().out
    assert merge_main(["--adapter", str(adapter), "--output", str(tmp_path / "plain")]) == 0
    for name in ("model.safetensors", "tokenizer.json"):
        assert (out / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert merge_lora_main(named) == 0 and (tmp_path / "adapter_merged" / "config.json").exists()
    assert merge_lora_main(named) == 2
    assert "adapter_merged exists already" in capsys.readouterr().err


def test_a_training_configuration_names_base_and_adapter(tmp_path):
    base = make_base(tmp_path / "base", "untied")
    adapter, config = make_adapter(tmp_path / "adapter", base, "lora"), tmp_path / "train.yaml"
    config.write_text(f"model_name_or_path: {base}\noutput_dir: {adapter}\nuse_lora: true\ntrain_file: t.jsonl\n")
    assert merge_lora_main(["--config_file", str(config)]) == 0
    assert (tmp_path / "adapter_merged" / "model.safetensors").exists()


def test_a_tokenizer_with_more_tokens_than_the_base_is_not_saved(tmp_path, capsys):
    base, larger = make_base(tmp_path / "base", "untied"), tmp_path / "larger"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(larger)
    words = ["--lora_model_name_or_path", str(make_adapter(tmp_path / "adapter", base, "lora"))]
    assert merge_lora_main([*words, "--tokenizer_name_or_path", str(larger)]) == 2
    assert "has ids up to 907, and the base embeds 907 tokens" in capsys.readouterr().err
    assert not (tmp_path / "adapter_merged").exists()


def test_an_adapter_without_a_record_is_merged_as_stated(tmp_path, train):
    """As one is that open-instruct trained; the base is dequantised, because that is what the adapter corrects."""
    pytest.importorskip("bitsandbytes")
    run = train("run", "--use_qlora", "--use_lora", "--max_train_steps", "2", "--report_to", "none")
    assert run.code == 0, run.err
    assert merge_lora_main(["--lora_model_name_or_path", str(run.folder), "--output_dir", str(tmp_path / "known")]) == 0
    (run.folder / "run.json").unlink()
    words = ["--lora_model_name_or_path", str(run.folder), "--qlora", "--output_dir", str(tmp_path / "stated")]
    assert merge_lora_main(words) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("known", "stated")]
    assert weights[0] == weights[1]


def test_qlora_is_merged_onto_the_base_that_it_was_trained_on(tmp_path, train):
    """The dequantised one: merged logits are those of the quantised base with the adapter, not the plain base's."""
    pytest.importorskip("bitsandbytes")
    run = train("run", "--use_qlora", "--max_train_steps", "5", "--dataset_skip_cache")
    assert run.code == 0, run.err
    result = open_instruct.merge([str(run.folder)], str(tmp_path / "merged"))
    assert result["quantised_in_training"] == "4bit"
    ids = torch.tensor([[5, 9, 40, 41, 60]])
    served = open_instruct.load(f"q={run.folder}", dtype="stored")
    assert served.adapters.base.is_loaded_in_4bit  # as it was in training
    with torch.no_grad():
        wanted = served.adapters.use("q")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        unquantised = (
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY_MODEL), run.folder).eval()(ids).logits
        )
    assert (merged - wanted).abs().max() < 0.1 * (unquantised - wanted).abs().max()


@pytest.mark.parametrize("adapters, says", [
    (["{lora}", "{prefix}"], "only soft prompts go together"),
    (["{lora}", "{prompt}"], "only soft prompts go together"),
    (["{lora}", "--output", "{lora}"], "exists already"),
    (["red={prompt}"], "the tokenizer has a token <|red_0|> already"),
    ([], "nothing to merge"),
])  # fmt: skip
def test_what_can_not_be_merged_is_refused(adapters, says, tmp_path, capsys):
    base = make_base(tmp_path / "base", "tied")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|red_0|>"])
    tokenizer.save_pretrained(base)
    methods = {"prefix": "prefix_tuning", "lora": "lora", "prompt": "prompt_tuning"}
    folders = {name: make_adapter(tmp_path / name, base, method) for name, method in methods.items()}
    words = [word for name in adapters if not name.startswith("--") for word in ("--adapter", name.format(**folders))]
    if "--output" in adapters:
        words = ["--adapter", str(folders["lora"]), "--output", str(folders["lora"])]
    else:
        words += ["--output", str(tmp_path / "merged")]
    assert merge_main(words) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "merged").exists()


def test_a_soft_prompt_that_fills_the_context_is_refused(tmp_path):
    base = make_base(tmp_path / "base", "tied")
    config = json.loads((base / "config.json").read_text())
    adapter = make_adapter(tmp_path / "adapter", base, "prompt_tuning")
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 5}))
    with pytest.raises(InputError, match="5 virtual tokens, and the model has positions for 5 tokens"):
        open_instruct.merge([str(adapter)], str(tmp_path / "merged"))


def test_generation_marks_leave_white_space_as_it_was():
    marked = "{% for m in messages %}{%- generation -%} {{ m['content'] }} {%- endgeneration %} x"
    marked += "{% generation %}\n{% endgeneration %}{% endfor %}"
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tokenizer.chat_template = marked
    wanted = tokenizer.apply_chat_template(messages, tokenize=False)
    tokenizer.chat_template = prompt_tokens.without_generation_marks(marked)
    assert (
        "generation" not in tokenizer.chat_template
        and tokenizer.apply_chat_template(messages, tokenize=False) == wanted
    )


def test_merged_soft_prompts_answer_as_before(tmp_path, train):
    """A trained run, through our own tools: the same questions, the same answers."""
    run = train("run", "--use_prompt_tuning", "--max_train_steps", "30", "--dataset_skip_cache")
    open_instruct.merge([str(run.folder)], str(tmp_path / "merged"))
    questions = ["red green blue", "tall small", "apple stone river lamp"]
    before = open_instruct.load(str(run.folder)).answers(questions, sampling=Sampling(16))
    assert (
        open_instruct.load(model_name_or_path=str(tmp_path / "merged")).answers(questions, sampling=Sampling(16))
        == before
    )
