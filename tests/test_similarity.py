"""Similarity of sentence embeddings, against sentence-transformers' own cosine, by a model that is built here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from open_instruct.adapters.answer_metrics import resamples
from open_instruct.evaluate_peft import main as evaluate
from open_instruct.study import config
from open_instruct.study.answers import load_measures, scores_of
from tests.conftest import ROOT, TINY_MODEL

pytest.importorskip("sentence_transformers", reason="needs the extra similarity")

REFERENCES = [["red green", "blue stone river"], ["apple stone"], ["river red", "green apple", "red"], ["stone " * 9]]
ANSWERS = {
    "base": ["red green", "apple river stone", "", "red"],
    "other": ["blue", "stone apple", "green", "stone " * 60],
}


@pytest.fixture(scope="module")
def embedder(tmp_path_factory) -> Path:
    """A random BERT with mean pooling, saved as sentence-transformers saves it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("embedder")
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "green", "blue", "apple", "stone", "river")
    ids = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder / "bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=32, initializer_range=0.5, **sizes)
    BertModel(config).save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"))
    model = SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu")
    model.save(str(folder / "saved"))
    return folder / "saved"


@pytest.fixture
def answers_file(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    rows = [
        {"prompt": str(i), "answers": {name: texts[i] for name, texts in ANSWERS.items()}, "references": references}
        for i, references in enumerate(REFERENCES)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def own_cosines(embedder: Path, answers: list[str], number: int | None = None) -> np.ndarray:
    """The package's cosine with the nearest reference, or with the one of a number."""
    from sentence_transformers import SentenceTransformer, util

    model = SentenceTransformer(str(embedder), device="cpu")
    rows = []
    for answer, references in zip(answers, REFERENCES, strict=True):
        cosines = util.cos_sim(model.encode(answer), model.encode(references))[0]
        rows.append(float(cosines.max() if number is None else cosines[number]))
    return np.array(rows)


def test_similarity_is_the_packages_cosine_with_the_nearest_reference(embedder, answers_file, tmp_path, capsys):
    words = ["--answers", str(answers_file), "--similarity_model", str(embedder), "--metrics", "none"]
    assert evaluate([*words, "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "| similarity |" in printed.out and "1 of 11 texts have more than the 32 tokens" in printed.err
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["similarity_model"] == str(embedder)
    own = {name: own_cosines(embedder, texts) for name, texts in ANSWERS.items()}
    for name, cosines in own.items():
        assert result["figures"][name]["similarity"]["value"] == pytest.approx(cosines.mean(), abs=1e-5)
        assert cosines.mean() != pytest.approx(own_cosines(embedder, ANSWERS[name], 0).mean(), abs=1e-3)
    assert own["base"][0] == pytest.approx(1.0, abs=1e-5) and own["base"][2] < 0.999  # the same text; none
    (pair,) = result["differences"]
    drawn = [(own["other"] - own["base"])[draw].mean() for draw in resamples(4, 42)]
    assert pair["figures"]["similarity"]["value"] == pytest.approx((own["other"] - own["base"]).mean(), abs=1e-5)
    interval = np.quantile(drawn, [0.025, 0.975]).tolist()
    assert pair["figures"]["similarity"]["interval"] == pytest.approx(interval, abs=1e-4)


def test_models_are_measured_by_it_beside_other_figures(embedder, tmp_path):
    file = ROOT / "data" / "sample" / "heldout.jsonl"
    words = ["--model_name_or_path", str(TINY_MODEL), "--file", str(file), "--max_samples", "4"]
    words += ["--max_new_tokens", "8", "--metrics", "loss", "--model", f"same={TINY_MODEL}"]
    assert evaluate([*words, "--similarity_model", str(embedder), "--output_dir", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert set(result["figures"]["base"]) == {"loss", "perplexity", "similarity"}
    from sentence_transformers import SentenceTransformer, util

    model = SentenceTransformer(str(embedder), device="cpu")
    cosines = [
        float(util.cos_sim(model.encode(row["base"]), model.encode(row["reference"]))) for row in result["examples"]
    ]
    assert result["figures"]["base"]["similarity"]["value"] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert result["differences_from_base"]["same"]["similarity"]["value"] == 0.0


def test_what_is_no_model_of_embeddings_is_refused_before_any_work(embedder, answers_file, tmp_path, capsys):
    (tmp_path / "damaged").mkdir()
    for file in embedder.iterdir():
        if file.is_file() and file.name != "model.safetensors":
            (tmp_path / "damaged" / file.name).write_bytes(file.read_bytes())
    own = tmp_path / "own.py"
    own.write_text("def similarity(answer, references):\n    return 1.0\n")
    words = ["--answers", str(answers_file), "--metrics", "none", "--similarity_model"]
    for more, reason in (
        ([str(TINY_MODEL)], "no model of sentence embeddings there"),
        ([str(tmp_path / "nowhere")], "no model of sentence embeddings there"),
        ([str(tmp_path / "damaged")], "can't be loaded"),
        ([str(embedder), "--metric", f"{own}:similarity"], "a figure has that name"),
    ):
        assert evaluate([*words, *more]) == 2
        error = capsys.readouterr().err
        assert reason in error and "Traceback" not in error and len(error.splitlines()) == 1


WITHOUT = """
import sys
sys.modules["sentence_transformers"] = None  # as if it were not installed
from open_instruct.evaluate_peft import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(code)
"""


def test_a_missing_package_is_one_line(embedder, answers_file):
    words = ["--answers", str(answers_file), "--similarity_model", str(embedder)]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "pip install '.[similarity]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_study_compares_embeddings_by_the_same_model(embedder, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        "flags: {model_name_or_path: m, train_file: t.jsonl}\nmethods: [ia3]\n"
        f"report: {{similarity_model: {embedder}}}\n"
    )
    measures = load_measures(config.read_study(path))
    references = [alternatives[0] for alternatives in REFERENCES]
    figures = {"answers": ANSWERS["other"], "references": references, "exact": [0.0] * 4, "files": {}}
    scores = {figure: score for (_, figure), score in scores_of(figures, measures, "a trial").items()}
    assert list(scores) == ["exact_match", "similarity"]
    assert np.allclose(scores["similarity"], own_cosines(embedder, ANSWERS["other"], 0), atol=1e-6)
    assert not np.allclose(scores["similarity"], own_cosines(embedder, ANSWERS["base"], 0), atol=1e-2)
