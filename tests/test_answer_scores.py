"""Figures of existing answers: the reference packages' own examples, several references, several answers."""

import itertools
import random

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from open_instruct.adapters.answer_metrics import ROUGE, Bleu, Chrf, resamples, rouge
from open_instruct.adapters.answer_scores import Measures, ModelScores, compared_forms, pass_rate
from open_instruct.errors import InputError

# From sacrebleu's README, with the figures that it prints.
ANSWERS = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
TWO = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]
# From the tests of rouge-score, with the figures that they expect: reference, answer, kind, (precision, recall, F1).
ROUGE_EXAMPLES = [
    ("testing one two", "testing", "rouge1", (1, 1 / 3, 1 / 2)),
    ("testing one two", "testing one", "rouge2", (1, 1 / 2, 2 / 3)),
    ("testing one two", "testing two", "rougeL", (1, 2 / 3, 4 / 5)),
    ("testing one two", "", "rougeL", (0, 0, 0)),
    ("w1 w2 w3 w4 w5", "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "rougeLsum", (0.4, 0.8, 0.64 / 1.2)),
    ("First sentence.\nSecond Sentence.", "Second sentence.\nFirst Sentence.", "rougeLsum", (1, 1, 1)),
    ("First sentence. Second Sentence.", "Second sentence. First Sentence.", "rougeLsum", (0.5, 0.5, 0.5)),
]
EVERY = np.arange(3)
WORDS = ["running", "dogs", "bite", "the", "man", "was", "surprised", "unexpected", "Ünder", "x²", "—", "\n"]


def sentences(rng: random.Random, count: int) -> list[str]:
    return [" ".join(rng.choices(WORDS, k=rng.randint(0, 9))) for _ in range(count)]


def scores_of(answers, references, names=("exact_match", "rouge", "bleu", "chrf"), regex=None, how="none", **options):
    measures = Measures(names, regex=regex, normaliser=how, **options)
    forms = compared_forms(references, measures)
    sources = [f"rows:{number}" for number in range(1, len(answers) + 1)]
    return ModelScores("model", sources, answers, references, forms, measures)


def values_of(scores, several=("mean", "best", "vote", "concatenate"), pass_at=()):
    every = np.arange(len(scores.answers))
    return {name: statistic(every) for name, statistic in scores.statistics(several, pass_at).items()}


def test_bleu_and_chrf_are_the_figures_of_sacrebleus_own_examples():
    assert Bleu.count(ANSWERS, TWO).score(EVERY) == pytest.approx(48.53, abs=0.005)
    assert Chrf.count(ANSWERS, TWO).score(EVERY) == pytest.approx(59.73, abs=0.005)
    fewer = [[TWO[0][0]], TWO[1], [TWO[2][0]]]
    assert Bleu.count(ANSWERS, fewer).score(EVERY) < 48  # one reference less is another figure


@pytest.mark.parametrize("reference, answer, kind, expected", ROUGE_EXAMPLES)
def test_rouge_is_the_figures_of_its_packages_own_examples(reference, answer, kind, expected):
    assert rouge([answer], [[reference]], ROUGE)[kind].tolist() == [pytest.approx(expected)]


def test_random_texts_score_as_the_packages_do():
    """With several references, another number of them for each row, texts without a word, and stems."""
    rng = random.Random(0)
    answers = sentences(rng, 60)
    references = [sentences(rng, rng.randint(1, 4)) for _ in answers]
    references = [[text if text.strip() else "man" for text in texts] for texts in references]
    columns = [[(*texts, None, None, None)[number] for texts in references] for number in range(4)]
    every = np.arange(60)
    for ours, theirs in ((Bleu, BLEU()), (Chrf, CHRF())):
        counted = ours.count(answers, references)
        assert counted.score(every) == pytest.approx(theirs.corpus_score(answers, columns).score, abs=1e-9)
        assert counted.score(every) != pytest.approx(theirs.corpus_score(answers, columns[:1]).score, abs=1e-3)
        single = type(theirs)(effective_order=True) if ours is Bleu else theirs
        expected = [single.sentence_score(a, texts).score for a, texts in zip(answers, references, strict=True)]
        assert counted.each.tolist() == pytest.approx(expected, abs=1e-9)
    for stemmer in (False, True):
        scorer = RougeScorer(ROUGE, use_stemmer=stemmer)
        for kind, values in rouge(answers, references, ROUGE, stemmer).items():
            each = [
                [scorer.score(text, a)[kind] for text in texts] for a, texts in zip(answers, references, strict=True)
            ]
            best = [max(row, key=lambda score: score.fmeasure) for row in each]
            assert values.tolist() == [list(score) for score in best]
    plain, stemmed = (rouge(["the dog runs"], [["the dogs run"]], ROUGE, stemmer) for stemmer in (False, True))
    assert plain["rouge1"][0, 2] < 1 and stemmed["rouge1"][0, 2] == 1


def test_one_answer_has_the_same_figures_however_it_is_combined():
    figures = values_of(scores_of([[text] for text in ANSWERS], TWO))
    for name in ("exact_match", "rouge1", "rougeLsum_recall", "bleu", "chrf"):
        assert {figures[f"{name}{how}"] for how in ("", " best", " vote", " concatenate")} == {figures[name]}
    assert figures["exact_match"] == pytest.approx(1 / 3)
    assert figures["bleu"] == pytest.approx(48.53, abs=0.005)


def test_several_answers_by_hand():
    """Mean, best, vote and concatenation of two questions with three and two answers."""
    answers = [["red", "blue", "blue"], ["green fir", "tree"]]
    references = [["blue", "navy"], ["green tree"]]
    figures = values_of(scores_of(answers, references))
    assert figures["exact_match"] == pytest.approx((2 / 3 + 0) / 2)
    assert figures["exact_match best"] == 0.5 and figures["exact_match vote"] == 0.5
    assert figures["exact_match concatenate"] == 0
    assert figures["rouge1"] == pytest.approx((2 / 3 + (1 / 2 + 2 / 3) / 2) / 2)
    assert figures["rouge1 best"] == pytest.approx((1 + 2 / 3) / 2)  # tree: precision 1, recall 1/2
    assert figures["rouge1_precision best"] == 1 and figures["rouge1_recall best"] == pytest.approx(3 / 4)
    assert figures["rouge1 vote"] == pytest.approx((1 + 1 / 2) / 2)  # of equals the first
    assert figures["rouge1_recall concatenate"] == 1
    assert figures["rouge1_precision concatenate"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    pooled = [[references[0][0]]] * 3 + [[references[1][0]]] * 2
    pooled = [[r[0], "navy"] if r[0] == "blue" else r for r in pooled]
    flat = [text for texts in answers for text in texts]
    columns = [[r[0] for r in pooled], [r[1] if len(r) > 1 else None for r in pooled]]
    assert figures["chrf"] == pytest.approx(CHRF().corpus_score(flat, columns).score)
    chosen = ["blue", "green fir"]  # alone, tree has the higher precision and a worse brevity penalty
    assert figures["bleu best"] == pytest.approx(
        BLEU().corpus_score(chosen, [["blue", "green tree"], ["navy", None]]).score
    )


def test_votes_are_counted_by_what_the_expression_finds():
    answers = [["a #### 7", "b #### 8", "c #### 8.0", "no idea", "no idea", "no idea"], ["none", "nothing"]]
    options = (("exact_match",), "#### (.*)", "number")
    figures = values_of(scores_of(answers, [["#### 8"], ["#### 1"]], *options))
    assert figures["exact_match vote"] == 0.5 and figures["exact_match"] == pytest.approx(2 / 6 / 2)
    plain = values_of(scores_of(answers, [["no idea"], ["x"]], ("exact_match",)))
    assert plain["exact_match vote"] == 0.5  # without an expression, the most frequent text
    bare = values_of(scores_of(answers, [["8"], ["1"]], *options))
    assert bare["exact_match"] == figures["exact_match"]  # references may be final answers already
    with pytest.raises(InputError, match="does not match the reference '1', and does match others"):
        scores_of(answers, [["#### 8"], ["1"]], ("exact_match",), "#### (.*)")


def test_pass_at_k_is_the_share_of_sets_of_k_answers_that_hold_a_right_one():
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n >= k:
            sets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_rate(n, c, k) == pytest.approx(sum(map(any, sets)) / len(sets))
    biased = 1 - (1 - 2 / 5) ** 3
    assert abs(pass_rate(5, 2, 3) - biased) > 0.05
    assert pass_rate(10_000, 1, 100) == pytest.approx(0.01)
    answers = [["1", "2", "3", "4"], ["5", "5", "1", "5"]]
    scores = scores_of(answers, [["1"], ["5"]], ("exact_match",))
    figures = values_of(scores, ["mean"], [1, 2, 5])
    assert figures["pass@2"] == pytest.approx((1 / 2 + 1) / 2) and figures["pass@1"] == figures["exact_match"]
    assert "pass@5" not in figures  # no question has as many
    with pytest.raises(InputError, match=r"--pass_at 4 needs 4 answers to every question: rows:2 has 1 of model"):
        values_of(scores_of([answers[0], ["5"]], [["1"], ["5"]], ("exact_match",)), ["mean"], [4])


def test_a_draw_takes_questions_and_never_splits_their_answers():
    """A figure of drawn questions equals the figure of a file that holds just these."""
    rng = random.Random(1)
    answers = [sentences(rng, rng.randint(1, 3)) for _ in range(8)]
    references = [["man was surprised"], ["dogs bite the man", "the"]] * 4
    statistics = scores_of(answers, references).statistics(("mean", "best", "vote", "concatenate"), [1])
    for rows in resamples(8, 5)[:3]:
        alone = values_of(scores_of([answers[i] for i in rows], [references[i] for i in rows]), pass_at=[1])
        assert {name: statistic(rows) for name, statistic in statistics.items()} == pytest.approx(alone)
