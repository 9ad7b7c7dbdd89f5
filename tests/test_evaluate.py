"""Adapters measured and looked into."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import open_instruct
from open_instruct import Sampling
from open_instruct.adapters.inspection import token_name
from open_instruct.adapters.scoring import answer_losses, token_scores
from open_instruct.evaluate_peft import main as evaluate_main
from open_instruct.finetune_peft import main as finetune
from open_instruct.generate_peft import main as generate_main
from open_instruct.inspect_peft import main as inspect_main
from tests.conftest import TINY_MODEL, questions_of


def test_losses_are_those_of_single_rows(trained):
    """Padding on the right changes nothing, for soft prompts of both kinds."""
    served = open_instruct.load([str(trained / "prompt_tuning"), str(trained / "prefix_tuning")])
    rows, spans = [[5, 9, 30, 31], list(range(10, 40)), [7, 8]], [[(0, 2), (3, 4)], [(4, 30)], [(1, 2)]]
    for name in ("prompt_tuning", "prefix_tuning", "base"):
        model = served.adapters.use(name)
        together = answer_losses(model, rows, spans, 3)
        for (loss, count), row, pieces in zip(together, rows, spans, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row])).logits[0, -len(row) :].double().log_softmax(-1)
            labelled = [i for start, end in pieces for i in range(max(start, 1), end)]
            assert loss == pytest.approx(-sum(logits[i - 1, row[i]].item() for i in labelled), rel=1e-5)
            assert count == len(labelled)
        (_, likeliest) = token_scores(model, rows[:1], 1)[0]
        assert likeliest.dtype == torch.bool and len(likeliest) == 3


def test_an_evaluation_agrees_with_the_run_and_the_reference_libraries(trained, questions_file, tmp_path, capsys):
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    out = tmp_path / "evaluated"
    words = [
        "--adapter",
        str(trained / "prefix_tuning"),
        "--adapter",
        str(trained / "lora"),
        "--file",
        str(questions_file),
    ]
    assert evaluate_main([*words, "--output_dir", str(out), "--max_new_tokens", "24"]) == 0
    result = json.loads((out / "evaluation.json").read_text())
    assert (out / "evaluation.png").stat().st_size > 5000 and "| exact_match |" in (out / "evaluation.md").read_text()
    references = [json.loads(line)["messages"][1]["content"] for line in questions_file.read_text().splitlines()]
    for name in ("prefix_tuning", "base"):
        served = open_instruct.load(str(trained / "prefix_tuning"))
        answers = [texts[0] for texts in served.answers(questions_of(questions_file, 30), name, Sampling(24))]
        figures = {metric: figure["value"] for metric, figure in result["figures"][name].items()}
        assert figures["exact_match"] == sum(a == r for a, r in zip(answers, references, strict=True)) / 30
        assert figures["bleu"] == pytest.approx(BLEU().corpus_score(answers, [references]).score, abs=1e-9)
        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
        for metric in ("rouge1", "rouge2", "rougeL"):
            mean = sum(scorer.score(r, a)[metric].fmeasure for a, r in zip(answers, references, strict=True)) / 30
            assert figures[metric] == pytest.approx(mean)
        assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    # The trainer's own held-out loss on the same rows
    AcceleratorState._reset_state(reset_partial_state=True)
    again = [
        "--model_name_or_path",
        str(TINY_MODEL),
        "--adapter_name_or_path",
        str(trained / "prefix_tuning"),
        "--max_train_steps",
        "1",
    ]
    again += [
        "--train_file",
        str(trained / "train.jsonl"),
        "--validation_file",
        str(questions_file),
        "--output_dir",
        str(tmp_path / "more"),
    ]
    assert finetune([*again, "--num_sample_answers", "0", "--dataset_skip_cache"]) == 0
    summary = json.loads((tmp_path / "more" / "summary.json").read_text())
    assert result["figures"]["prefix_tuning"]["loss"]["value"] == pytest.approx(
        summary["initial_eval_loss"], rel=1e-5, abs=2e-6
    )
    assert result["figures"]["base"]["loss"]["value"] == pytest.approx(summary["base_eval_loss"], rel=1e-5)
    low, high = result["differences_from_base"]["lora"]["loss"]["interval"]
    assert low < result["differences_from_base"]["lora"]["loss"]["value"] < high < 0
    assert evaluate_main([*words, "--output_dir", str(out)]) == 2 and "holds an evaluation" in capsys.readouterr().err


def test_rows_without_a_label_in_the_context_are_left_out_and_counted(trained, tmp_path, capsys):
    """Of two rows a quarter of the draws hold only the one without a label: no interval may be made of such a draw."""
    path, out = tmp_path / "long.jsonl", tmp_path / "evaluated"
    rows = [{"prompt": "red green " * length, "completion": "blue"} for length in (2000, 2, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--adapter", str(trained / "lora"), "--file", str(path), "--metrics", "loss", "--output_dir", str(out)]
    assert evaluate_main(words) == 0
    assert "1 rows have no labelled token in the context" in capsys.readouterr().out
    result = json.loads((out / "evaluation.json").read_text())
    assert (result["rows"], result["unlabelled"]) == (3, 1)
    loss, difference = result["figures"]["lora"]["loss"], result["differences_from_base"]["lora"]["loss"]
    assert all(math.isfinite(bound) for bound in (*loss["interval"], *difference["interval"]))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    assert evaluate_main([*words[:-1], str(tmp_path / "short")]) == 0
    short = json.loads((tmp_path / "short" / "evaluation.json").read_text())
    alone = short["figures"]["lora"]["loss"]
    assert alone["interval"] == pytest.approx(loss["interval"], rel=1e-5) and short["unlabelled"] == 0


def test_a_file_without_answers_can_not_be_evaluated(trained, tmp_path, capsys):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "red green"}\n{"prompt": "blue", "completion": "blue"}\n')
    assert evaluate_main(["--adapter", str(trained / "lora"), "--file", str(path)]) == 2
    assert "questions.jsonl:1: no answer to compare with" in capsys.readouterr().err
    assert (
        generate_main(
            ["--adapter", str(trained / "lora"), "--input_file", str(path), "--output_file", str(tmp_path / "o.jsonl")]
        )
        == 0
    )
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert "reference" not in rows[0] and rows[1]["reference"] == "blue"


HARNESS_TASK = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: OUTPUT
doc_to_text: "{{question}}"
MORE
"""
GENERATED = """doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 24}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""
CHOSEN = """doc_to_choice: "{{[question, answer]}}"
doc_to_target: 1
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"""


@pytest.mark.parametrize(
    "output, more, metric", [("generate_until", GENERATED, "exact_match"), ("multiple_choice", CHOSEN, "acc")]
)
def test_the_harness_runs_a_local_task_with_a_soft_prompt(
    output, more, metric, trained, questions_file, tmp_path, capfd
):
    """Offline. Generated answers are scored as our own evaluation scores them; choices as the losses of both say."""
    pytest.importorskip("lm_eval")
    rows = [json.loads(line)["messages"] for line in questions_file.read_text().splitlines()]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"question": q["content"], "answer": a["content"]}) for q, a in rows) + "\n")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "words.yaml").write_text(
        HARNESS_TASK.replace("FILE", str(data)).replace("OUTPUT", output).replace("MORE", more)
    )
    words = [
        "--adapter",
        str(trained / "prompt_tuning"),
        "--lm_eval_tasks",
        "words",
        "--lm_eval_path",
        str(tasks),
        "--apply_chat_template",
    ]
    assert evaluate_main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())["figures"]
    served = open_instruct.load(str(trained / "prompt_tuning"))
    for name in ("base", "prompt_tuning"):
        if metric == "exact_match":
            answers = served.answers([q["content"] for q, _ in rows], name, Sampling(24))
            right = [answer[0].split("\n")[0] == a["content"] for answer, (_, a) in zip(answers, rows, strict=True)]
        else:
            right = []
            for q, a in rows:
                prompt = served.tokenizer.apply_chat_template([q], tokenize=False, add_generation_prompt=True)
                start = len(served.tokenizer(prompt, add_special_tokens=False)["input_ids"])
                pair = [
                    served.tokenizer(prompt + text["content"], add_special_tokens=False)["input_ids"] for text in (q, a)
                ]
                losses = [
                    answer_losses(served.adapters.use(name), [ids], [[(start, len(ids))]], 1)[0][0] for ids in pair
                ]
                right.append(losses[1] < losses[0])
        assert figures[name][f"words {metric}"]["value"] == pytest.approx(sum(right) / len(rows))
    assert evaluate_main([*words[:2], "--lm_eval_tasks", "nothing"]) == 2
    assert "the harness has no task nothing" in capfd.readouterr().err


def test_inspection_finds_what_was_put_there(trained, questions_file, tmp_path, capsys):
    """Virtual tokens set to known embeddings have them as neighbours; drift and start are the run's."""
    folder = tmp_path / "planted"
    shutil.copytree(trained / "prompt_tuning", folder)
    tokenizer, base = AutoTokenizer.from_pretrained(TINY_MODEL), AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    ids = tokenizer(" apple stone", add_special_tokens=False)["input_ids"][:2]
    prompt = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    prompt[:2] = base.get_input_embeddings().weight[ids].detach()
    save_file({"prompt_embeddings": prompt}, folder / "adapter_model.safetensors", {"format": "pt"})
    assert (
        inspect_main(["--adapter", str(folder), "--file", str(questions_file), "--output_dir", str(tmp_path / "out")])
        == 0
    )
    figures = json.loads((tmp_path / "out" / "inspection.json").read_text())
    for number in range(2):
        for kind, best in (("cosine", 1.0), ("distance", 0.0)):
            text, value = figures["end"][number][kind][0]
            assert text == tokenizer.decode([ids[number]]) and value == pytest.approx(best, abs=1e-2)
    first, last = figures["drift"]
    assert (first["step"], last["step"]) == (20, 40) and first["distance"] < last["distance"]
    start = load_file(folder / "soft_prompt_start.safetensors")["embeddings"]
    assert figures["moved"] == pytest.approx((prompt - start).norm(dim=1).tolist(), rel=1e-4)
    assert figures["start"][3]["cosine"][0][1] == pytest.approx(1.0, abs=1e-4)  # it starts on tokens
    assert (tmp_path / "out" / "inspection.png").stat().st_size > 5000
    out = capsys.readouterr().out
    assert "Attention to the virtual tokens" in out and "apple" in out
    assert inspect_main(["--adapter", str(trained / "lora")]) == 2
    assert "no virtual tokens to inspect" in capsys.readouterr().err


def test_inspection_prints_the_tokens_that_moved_furthest(trained, tmp_path, capsys):
    def rows_of(*words: str) -> list[str]:
        assert inspect_main(["--adapter", str(trained / "prompt_tuning"), *words]) == 0
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if re.match(r"\| \d+ \| .*`", line)]

    every = rows_of("--output_dir", str(tmp_path / "out"))
    moved = json.loads((tmp_path / "out" / "inspection.json").read_text())["moved"]
    furthest = sorted(range(20), key=lambda i: -moved[i])[:3]
    assert rows_of("--top", "3") == [every[i] for i in furthest] and rows_of("--top", "99") == every
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(trained / "prompt_tuning" / name, tmp_path / "adapter")
    assert inspect_main(["--adapter", str(tmp_path / "adapter"), "--top", "2"]) == 0
    assert "of the 2 virtual tokens that are longest, of 20" in capsys.readouterr().out
    assert inspect_main(["--adapter", str(trained / "prefix_tuning"), "--top", "2"]) == 2
    assert "--top 2 has no effect" in capsys.readouterr().err


def test_tokens_without_a_glyph_have_their_bytes_as_names():
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)

    def name_of(text: str) -> list[str]:
        return [token_name(tokenizer, token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]

    assert name_of(" apple") == [" apple"] and name_of("\n") == ["<0x0A>"] and name_of("\x06") == ["<0x06>"]
    assert "".join(name_of("漢")) == "".join(f"<0x{byte:02X}>" for byte in "漢".encode())


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_attention_mass_is_that_of_the_softmax(method, trained, questions_file):
    """Against the weights that PEFT's own forward pass returns, summed by hand; the prompt's own rows don't count."""
    figures = open_instruct.inspect(str(trained / method), file=str(questions_file), rows=1)
    served = open_instruct.load(str(trained / method))
    model = served.adapters.use(method)
    served.adapters.base.set_attn_implementation("eager")
    text = served.tokenizer.apply_chat_template(
        [{"role": "user", "content": questions_of(questions_file)[0]}], tokenize=False, add_generation_prompt=True
    )
    ids = served.tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        layers = model(input_ids=torch.tensor([ids]), output_attentions=True).attentions
    for share, layer in zip(figures["attention"]["mass"], layers, strict=True):
        rows = layer[0][:, -len(ids) :]
        assert rows.sum(-1).mean().item() == pytest.approx(1.0, abs=1e-5)
        assert share == pytest.approx(rows[:, :, :20].sum(-1).mean().item(), rel=1e-4)
    if method == "prefix_tuning":
        assert len(figures["prefix_norms"]["keys"]) == len(figures["base_norms"]["values"]) == 4


def test_references_and_answers_are_compared_by_what_matches():
    from open_instruct.adapters.answer_metrics import exact_matches, final_answer, normalise

    assert final_answer("a #### 1,200 b #### 7", r"#### (\S+)") == "7" and final_answer("yes or no", r"(yes)|no") == ""
    assert exact_matches(
        ["#### 1,200.00", "#### 12", "none"], ["x #### 1200", "#### 13", "#### 5"], "#### (.*)", "number"
    ).tolist() == [
        1,
        0,
        0,
    ]
    assert normalise("The  cat, a dog!", "text") == "cat dog" and normalise(" A b ", "none") == "A b"
