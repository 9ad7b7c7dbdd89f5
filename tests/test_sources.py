"""Sources of rows: what an epoch takes of each, and the held-out loss of each."""

import json
import math
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import open_instruct
from open_instruct.data.plan import Plan
from open_instruct.data.sources import Mixture, mixed_order, mixture_of
from open_instruct.errors import InputError
from open_instruct.evaluate_peft import main as evaluate_main
from open_instruct.flags.combinations import parse_weights
from open_instruct.training.doctor import Doctor
from open_instruct.training.state import History
from open_instruct.training.tracking import read_metrics
from tests.conftest import TINY_MODEL, without_measurements, write_conversations
from tests.test_doctor import HEALTHY
from tests.test_finetune import plain_loss

ROWS = {"a": np.arange(0, 10), "b": np.arange(10, 17), "c": np.arange(17, 20)}
SHORT = ["--use_lora", "--max_train_steps", "6", "--eval_steps", "2", "--per_device_train_batch_size", "8"]


@pytest.mark.parametrize("weights", [{"a": 2.0, "b": 0.5}, {"a": 0.3, "c": 2.5}, {"b": 0.0}, {}])
def test_an_epoch_takes_each_source_as_often_as_its_weight_says(weights):
    """Over 20 epochs every row of a source is taken equally often, but for one time; another seed takes others."""
    mixture = mixture_of(ROWS, weights, None, seed=1)
    plan = Plan(mixture.num_examples, 4, 1000, 1, mixture)
    total: Counter[int] = Counter()
    for epoch in range(20):
        first = epoch * plan.steps_per_epoch
        taken = np.concatenate([plan.examples(first + step) for step in range(plan.steps_per_epoch)])
        assert sorted(taken) == sorted(mixed_order(replace(mixture), epoch))  # a function of the seed alone
        for name, rows in ROWS.items():
            assert np.isin(taken, rows).sum() == round(weights.get(name, 1.0) * len(rows))
        total.update(taken.tolist())
    for name, rows in ROWS.items():
        times = [total[row] for row in rows.tolist()]
        assert max(times) - min(times) <= 1 and sum(times) == 20 * round(weights.get(name, 1.0) * len(rows))
    assert mixed_order(mixture, 0).tolist() != mixed_order(replace(mixture, seed=2), 0).tolist()
    assert mixed_order(mixture, 0).tolist() != mixed_order(mixture, 1).tolist()


def test_a_temperature_makes_shares_equal():
    """By the formula, written out; 1 is the shares that there are."""
    rows = {"large": np.arange(900), "small": np.arange(900, 1000)}
    assert mixture_of(rows, None, 1.0, 0).counts == {"large": 900, "small": 100}
    assert mixture_of(rows, None, 2.0, 0).counts == {"large": 750, "small": 250}  # √900 : √100 = 3 : 1
    assert mixture_of(rows, None, 1e6, 0).counts == {"large": 500, "small": 500}
    few = {"large": np.arange(1000), "one": np.arange(1000, 1001)}
    assert mixture_of(few, {"one": 0.2}, None, 0).counts["one"] == 1  # a source that is asked for is there
    assert mixture_of(rows, None, None, 0) is None


def test_the_mean_of_an_epoch_is_that_of_its_examples():
    mixture = mixture_of(ROWS, {"a": 2.0, "b": 0.0}, None, 0)
    values = np.random.default_rng(0).random(20)
    assert mixture.mean(values) == pytest.approx(values[mixed_order(mixture, 0)].mean())
    assert Plan(20, 4, 5, 0).mean(values) == pytest.approx(values.mean())


def test_wrong_weights_are_refused(train, data_file):
    for words, says in [
        (["a"], "'a' is not NAME=WEIGHT"), (["a=x"], "is not NAME"), (["=2"], "is not NAME"), (["a=-1"], "from 0 to"),
        (["a=nan"], "is not NAME"), (["a=101"], "from 0 to 100"), (["a=1", "a=2"], "'a' stands there twice"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=says):
            parse_weights(words)
    assert parse_weights(["a=b=0.5", "c d=0"]) == {"a=b": 0.5, "c d": 0.0}
    with pytest.raises(InputError, match="there is no source x: name some of a, b, c"):
        mixture_of(ROWS, {"x": 2.0}, None, 0)
    with pytest.raises(InputError, match="leaves no row"):
        mixture_of(ROWS, dict.fromkeys(ROWS, 0.0), None, 0)
    for flags, says in [
        (
            ["--source_weights", "reverse=2"],
            "--source_weights has no effect: all training rows have one source, reverse",
        ),
        (["--mixture_temperature", "2"], "--mixture_temperature has no effect: all training rows have one source"),
        (["--source_weights", "a=2", "--mixture_temperature", "2"], "--mixture_temperature 2.0: it decides the shares"),
        (["--source_weights", "a:2"], "--source_weights ['a:2']: 'a:2' is not NAME=WEIGHT"),
    ]:
        run = train("run", *SHORT, *flags)
        assert run.code == 2 and says in run.err and run.err.count("\n") == 1, run.err


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory):
    """Training and held-out rows of two sources, and some of none."""
    folder = tmp_path_factory.mktemp("sources")
    for name, number, seed in (("train", 40, 0), ("heldout", 9, 5)):
        parts = [
            write_conversations(folder / f"{name}-{skill}.jsonl", skill, number, seed, long_every=4).read_text()
            for skill in ("reverse", "sort")
        ]
        rows = [json.loads(line) for line in "".join(parts).splitlines()]
        del rows[0]["source"]
        rows[1]["source"] = None
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for source in ("reverse", "sort", "(none)"):
            chosen = [row for row in rows if (row.get("source") or "(none)") == source]
            (folder / f"{name}-of-{source}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return folder


@pytest.mark.parametrize("packing", [[], ["--packing", "False"]])
def test_the_held_out_loss_of_each_source_is_that_of_its_rows_alone(packing, train, two_sources):
    flags = [*SHORT, "--lora_dropout", "0", *packing, "--validation_file", str(two_sources / "heldout.jsonl")]
    run = train("run", *flags, data=two_sources / "train.jsonl")
    assert run.code == 0, run.err
    assert "sources: sort 40 (9 held out), reverse 38 (7 held out), (none) 2 (2 held out)" in run.out
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    tuned = open_instruct.load(str(run.folder)).adapters.use("run")
    evaluations = [row for row in run.metrics if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [0, 2, 4, 6]
    assert list(run.summary["by_source"]) == ["(none)", "reverse", "sort"]
    weighted = 0.0
    for name, of_source in run.summary["by_source"].items():
        alone = two_sources / f"heldout-of-{name}.jsonl"
        assert of_source["base_eval_loss"] == pytest.approx(plain_loss(base, alone), rel=1e-5)
        assert of_source["final_eval_loss"] == pytest.approx(plain_loss(tuned, alone), rel=1e-5)
        assert of_source["initial_eval_loss"] == evaluations[0][f"eval_loss/{name}"]
        assert f"{name}: base {of_source['base_eval_loss']:.4f} | first" in run.out
        weighted += of_source["final_eval_loss"] * of_source["eval_tokens"]
    final = run.summary["final_eval_loss"]
    assert weighted / evaluations[0]["eval_tokens"] == pytest.approx(final, rel=1e-6)
    losses = [of_source["final_eval_loss"] for of_source in run.summary["by_source"].values()]
    assert max(losses) > 1.02 * min(losses)  # the sources differ, so that the comparison sees a wrong one
    assert run.out.count(f"sort {evaluations[-1]['eval_loss/sort']:.4f} (") == 1


def test_a_weighted_run_is_resumed_exactly(train, two_sources):
    flags = [*SHORT, "--num_train_epochs", "3", "--checkpointing_steps", "2", "--keep_last_n_checkpoints", "-1"]
    flags += ["--source_weights", "reverse=0.2", "(none)=0"]
    full = train("full", *flags, data=two_sources / "train.jsonl")
    assert full.code == 0 and "an epoch takes" in full.out and "reverse 6 from 30 rows (15.8%)" in full.out, full.out
    assert "(none) 0 from 2 rows (0.0%)" in full.out
    part = full.folder.parent / "part"
    shutil.copytree(full.folder, part)
    (part / "summary.json").unlink()
    saved = ["--resume_from_checkpoint", str(part / "checkpoints" / "step_4")]
    other = train("part", *flags, "--source_weights", "reverse=0.5", *saved, data=two_sources / "train.jsonl")
    assert other.code == 2 and "source_weights was ['reverse=0.2', '(none)=0']" in other.err, other.err
    resumed = train("part", *flags, *saved, data=two_sources / "train.jsonl")
    assert resumed.code == 0, resumed.err
    assert without_measurements(resumed.metrics) == without_measurements(full.metrics)
    assert resumed.summary["by_source"] == full.summary["by_source"]
    first, second = (load_file(run.folder / "adapter_model.safetensors") for run in (full, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    plain = train("plain", *SHORT, data=two_sources / "train.jsonl")
    assert without_measurements(plain.metrics) != without_measurements(full.metrics)


def test_many_sources_are_not_measured_one_by_one(train, tmp_path):
    path = write_conversations(tmp_path / "many.jsonl", "reverse", 200)
    rows = [json.loads(line) | {"source": f"s{number}"} for number, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train("run", *SHORT, "--validation_fraction", "0.5", data=path)
    assert run.code == 0 and "and 170 more; more than 30 are not measured one by one" in run.out, run.err
    assert run.summary["by_source"] == {} and not any("/" in name for row in run.metrics for name in row)


def test_the_doctor_names_a_source_that_rises_while_the_total_falls():
    doctor = Doctor(HEALTHY, History())
    doctor.first(2.0, 2.0)

    def names(step: int, total: float, **by_source: float) -> list[str]:
        doctor.history.by_source.append((step, by_source))
        return [finding.name for finding in doctor.evaluation(step, total) if finding.name.startswith("source")]

    doctor.history.by_source.append((0, {"common": 2.0, "rare": 2.0}))
    assert names(40, 1.8, common=1.75, rare=1.9) == []
    assert names(80, 1.6, common=1.5, rare=2.0) == []  # within noise of its lowest
    assert names(120, 1.4, common=1.2, rare=2.3) == ["source rare"]
    assert names(160, 1.3, common=1.0, rare=2.6) == []  # once
    both = Doctor(HEALTHY, History(initial=2.0, by_source=[(0, {"a": 2.0, "b": 2.0})]))
    both.history.by_source.append((40, {"a": 2.5, "b": 2.6}))
    assert [f.name for f in both.evaluation(40, 2.55) if f.name.startswith("source")] == []  # the total rises as well
    broken = Doctor(HEALTHY, History(initial=2.0, by_source=[(0, {"a": math.nan}), (40, {"a": math.nan})]))
    assert broken.evaluation(40, 1.5) == []


def test_an_evaluation_has_the_loss_of_each_source(train, two_sources, tmp_path, capsys):
    run = train("run", *SHORT, data=two_sources / "train.jsonl")
    words = ["--adapter", str(run.folder), "--metrics", "loss", "--file"]
    out = tmp_path / "all"
    assert evaluate_main([*words, str(two_sources / "heldout.jsonl"), "--output_dir", str(out)]) == 0
    together = json.loads((out / "evaluation.json").read_text())
    assert list(together["loss_by_source"]) == ["(none)", "reverse", "sort"]
    assert "| sort | 9 | " in (out / "evaluation.md").read_text()
    for number, source in enumerate(("reverse", "sort")):
        out = tmp_path / str(number)
        assert evaluate_main([*words, str(two_sources / f"heldout-of-{source}.jsonl"), "--output_dir", str(out)]) == 0
        alone, of_source = json.loads((out / "evaluation.json").read_text()), together["loss_by_source"][source]
        assert alone["loss_by_source"] == {} and of_source["rows"] == alone["rows"]
        for name, figures in alone["figures"].items():
            assert of_source["loss"][name]["value"] == pytest.approx(figures["loss"]["value"], rel=1e-5)
            assert of_source["loss"][name]["interval"] == pytest.approx(figures["loss"]["interval"], rel=1e-5)
        apart = alone["differences_from_base"]["run"]["loss"]
        assert of_source["differences_from_base"]["run"]["interval"] == pytest.approx(apart["interval"], rel=1e-3)


def test_a_damaged_loss_of_a_source_is_no_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "eval_loss/a": 1.5}\n{"step": 2, "eval_loss/a": "x"}\n{"step": 3, "eval_loss/a": null}\n'
    )
    assert [row["step"] for row in read_metrics(path)] == [1, 3]


def test_mixtures_are_compared_by_their_content():
    mixture = Mixture(ROWS, {"a": 1, "b": 2, "c": 0}, 0)
    assert mixture.key == Mixture(dict(ROWS), dict(mixture.counts), 0).key
    assert mixture.key != Mixture({**ROWS, "a": np.arange(1, 11)}, mixture.counts, 0).key
    assert mixture.key != Mixture(ROWS, {"a": 2, "b": 2, "c": 0}, 0).key
