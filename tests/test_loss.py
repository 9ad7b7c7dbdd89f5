"""The loss of a step does not depend on how its examples are cut into micro-batches."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate import Accelerator

from open_instruct.data import packing
from open_instruct.data.dataset import Examples
from open_instruct.data.packing import Packing, Padding
from open_instruct.data.token_cache import SCHEMA
from open_instruct.flags import default_values
from open_instruct.methods import METHODS
from open_instruct.model.backends import blocked
from open_instruct.model.training_model import PackedModel, PaddedModel, TrainingModel
from open_instruct.training.loop import step_gradient
from tests.conftest import ADAPTERS, tiny_llama
from tests.tiny_models import gradient_error

VALUES = default_values(
    num_virtual_tokens=3, prompt_tuning_init="random", prefix_init="random", lora_rank=4, lora_dropout=0.0
)


@pytest.fixture
def examples() -> Examples:
    """Eight examples with 1 to 30 labelled tokens."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, 200, length).tolist() for length in (4, 40, 9, 33, 12, 25, 6, 18)]
    spans = [[2, 3], [10, 40], [5, 9], [3, 8, 20, 33], [11, 12], [5, 25], [1, 6], [0, 18]]
    return Examples(pa.table({"input_ids": ids, "spans": spans}, schema=SCHEMA), np.arange(8), "test")


def wrapped(method: str, packed: bool = False) -> TrainingModel:
    """A tiny model with an adapter that is not at its neutral start."""
    base = tiny_llama()
    torch.manual_seed(1)
    tokenizer = SimpleNamespace(
        all_special_ids=[0], added_tokens_decoder={}, get_vocab=lambda: {str(i): i for i in range(200)}
    )
    adapted = METHODS[method].wrap(base, tokenizer, METHODS[method].settings(VALUES))
    model = PaddedModel(adapted)
    if packed:
        model = PackedModel(adapted, partial(METHODS[method].soft_prompt, adapted), blocked)
        model.activate()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def gradient_of(model, examples, batching) -> tuple[float, torch.Tensor]:
    """Mean loss and adapter gradient of one step over all examples."""
    model.zero_grad()
    settings = SimpleNamespace(in_float16=False, sum_loss=False, sync_each_batch=False, accumulation_steps=1, seed=0)
    data = SimpleNamespace(train=examples)
    job = SimpleNamespace(accelerator=Accelerator(), settings=settings, data=data, model=model)
    labels = int(examples.label_counts.sum())
    total = step_gradient(job, batching, 0, np.arange(8))
    return total.item() / labels, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def test_label_counts_are_those_of_the_collated_labels(examples):
    counted = [int((packing.pad([examples[i]], 0)["labels"][:, 1:] != packing.IGNORE).sum()) for i in range(8)]
    assert examples.label_counts.tolist() == counted
    assert len(set(counted)) > 4  # ragged, or the tests below show nothing


@pytest.mark.parametrize("method", ADAPTERS)
def test_one_batch_of_eight_equals_eight_of_one(method, examples):
    model = wrapped(method)
    loss, gradient = gradient_of(model, examples, Padding(8, 0))
    for size in (1, 3):
        other_loss, other_gradient = gradient_of(model, examples, Padding(size, 0))
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert gradient_error(other_gradient, gradient) < 1e-5


@pytest.mark.parametrize("method", ADAPTERS)
def test_packed_rows_of_any_size_give_the_padded_step(method, examples):
    loss, gradient = gradient_of(wrapped(method), examples, Padding(8, 0))
    for max_tokens in (40, 60, 1000):
        other_loss, other_gradient = gradient_of(wrapped(method, packed=True), examples, Packing(max_tokens))
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert gradient_error(other_gradient, gradient) < 1e-5


def test_a_mean_of_micro_batch_means_would_fail(examples):
    """Negative control: the test above has to notice a division by each micro-batch's own label count."""
    model = wrapped("prompt_tuning")
    loss, gradient = gradient_of(model, examples, Padding(8, 0))
    model.zero_grad()
    means = []
    for index in range(8):
        total, count = model(**packing.pad([examples[index]], 0))
        (total / count / 8).backward()
        means.append(total.item() / count.item())
    wrong = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert abs(np.mean(means) - loss) / loss > 1e-3
    assert (wrong - gradient).norm() / gradient.norm() > 1e-2


@pytest.mark.parametrize("method", ADAPTERS)
def test_the_loss_is_pefts_own(method, examples):
    """PEFT computes labels, virtual tokens and shift itself, on one unpadded example whose first token has no label."""
    model = wrapped(method)
    for index in (1, 3, 5):
        batch = packing.pad([examples[index]], 0)
        total, count = model(**batch)
        assert total.item() / count.item() == pytest.approx(model.model(**batch).loss.item(), rel=1e-5)


def test_a_process_without_examples_adds_nothing(examples):
    model = wrapped("prompt_tuning")
    total, count = model(**Padding(1, 0).collate([]))
    total.backward()
    assert total.item() == 0 and count.item() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
