"""Every back end computes the same attention, and one that can't run says why."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from open_instruct.data import packing
from open_instruct.model import attention_blocked, attention_masks
from open_instruct.model.attention_blocked import blocked
from open_instruct.model.attention_varlen import varlen, varlen_index
from open_instruct.model.backends import BACKENDS, missing, sdpa
from open_instruct.model.shared_prefix import AttentionInputs, Segments
from open_instruct.model.training_model import PackedModel
from tests.tiny_models import differences, examples, gradient_error, packed_model, random_model, wrap

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", ["sdpa", "reference", "small blocks", "one by one"])
@pytest.mark.parametrize("variant", ["lora", "prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
def test_every_back_end_computes_the_same(architecture, variant, backend, monkeypatch):
    if backend == "small blocks":
        monkeypatch.setattr(attention_blocked, "MAX_QUERIES_PER_BLOCK", 8)
    if backend in ("small blocks", "one by one"):
        monkeypatch.setattr(attention_blocked, "MAX_TOKENS_PER_GROUP", 0)
    attention_blocked._groups.cache_clear()
    monkeypatch.setitem(BACKENDS, "reference", partial(varlen, reference_kernel))
    monkeypatch.setitem(BACKENDS, "small blocks", blocked)
    monkeypatch.setitem(BACKENDS, "one by one", blocked)
    assert max(differences(architecture, variant, backend)) < 1e-5
    attention_blocked._groups.cache_clear()


def random_inputs(lengths: list[int], num_shared: int, window: int | None, softcap: float | None) -> AttentionInputs:
    """Return float64 inputs with grouped heads and shared keys from outside, all of which want a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, sum(lengths)), (2, sum(lengths)), (2, sum(lengths)), (2, num_shared), (2, num_shared)]
    tensors = [
        torch.randn(1, heads, tokens, 8, dtype=torch.float64, generator=generator).requires_grad_()
        for heads, tokens in shapes
    ]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    segments = Segments(tuple(zip([0, *ends[:-1]], ends, strict=True)), 0, num_shared)
    return AttentionInputs(*tensors, segments, 0.5, window, softcap)


def by_definition(inputs: AttentionInputs) -> torch.Tensor:
    """Return softmax attention [1, T, H, E], a query and a head at a time, by nothing but its definition."""
    output = torch.zeros(inputs.query.transpose(1, 2).shape, dtype=torch.float64)
    for start, end, num_shared in inputs.segments.spans():
        for head in range(inputs.query.shape[1]):
            key_head = head // (inputs.query.shape[1] // inputs.key.shape[1])
            for position in range(start, end):
                keys, values = (
                    torch.cat([shared[0, key_head, :num_shared], own[0, key_head, start : position + 1]])
                    for shared, own in ((inputs.shared_key, inputs.key), (inputs.shared_value, inputs.value))
                )
                seen = slice(-inputs.window if inputs.window else 0, None)
                scores = keys[seen] @ inputs.query[0, head, position] * inputs.scale
                if inputs.softcap:
                    scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
                output[0, position, head] = scores.softmax(0) @ values[seen]
    return output


def gradients(backend, inputs: AttentionInputs) -> list[torch.Tensor]:
    """Return the gradients of the five tensors for a derivative of the output that is the same for every back end."""
    tensors = (inputs.query, inputs.key, inputs.value, inputs.shared_key, inputs.shared_value)
    output = backend(inputs)
    direction = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    return [output.detach(), *torch.autograd.grad((output * direction).sum(), tensors)]


@pytest.mark.parametrize("window", [None, 9, 3])  # 3 hides shared keys from short segments, too
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("backend", [blocked, sdpa])
def test_the_equations_of_attention_and_of_its_gradient(backend, softcap, window, monkeypatch):
    """Element by element; sums over segments and blocks are made in float32, whence 1e-6."""
    monkeypatch.setattr(attention_blocked, "MAX_QUERIES_PER_BLOCK", 8)
    inputs = random_inputs([5, 3, 30, 2], 4, window, softcap)
    for got, expected in zip(gradients(backend, inputs), gradients(by_definition, inputs), strict=True):
        assert gradient_error(got, expected) < 1e-6


@pytest.mark.parametrize("change", [{"scale": 0.51}, {"softcap": 1.6}, {"window": 10}])
def test_another_scale_cap_or_window_is_noticed(change):
    inputs = random_inputs([5, 3, 30, 2], 4, 9, 1.5)
    errors = [
        gradient_error(got, expected)
        for got, expected in zip(
            gradients(blocked, replace(inputs, **change)), gradients(by_definition, inputs), strict=True
        )
    ]
    assert min(errors) > 1e-3


def test_cached_masks_are_bounded_in_bytes(monkeypatch):
    """256 lengths, whose masks would fill far more than the bound."""
    bound = 1 << 20
    monkeypatch.setattr(attention_masks, "CACHES", {CPU: attention_masks.TensorCache(bound)})
    cache = attention_masks.CACHES[CPU]
    built = 0
    for num_queries in range(1, 257):
        for mask in (
            attention_masks.visibility_mask(num_queries, num_queries + 20, None, CPU),
            attention_masks.additive_mask(num_queries, num_queries + 20, 9, torch.float32, CPU),
            attention_masks.block_diagonal_mask((num_queries, 3), torch.float32, CPU),
        ):
            built += mask.nbytes
            assert sum(kept.nbytes for kept in cache._tensors.values()) == cache.num_bytes <= bound
    assert built > 20 * bound and cache.num_bytes > bound / 2


def test_masks_are_kept_until_others_need_their_memory():
    cache = attention_masks.TensorCache(100)
    first = cache.get("first", lambda: torch.zeros(10))
    cache.get("second", lambda: torch.zeros(10))
    assert cache.get("first", lambda: torch.ones(10)) is first
    cache.get("third", lambda: torch.zeros(10))  # drops the second, which was not used for longest
    assert cache.get("first", lambda: torch.ones(10)) is first
    assert cache.get("second", lambda: torch.ones(10)).any()
    too_large = cache.get("too large", lambda: torch.zeros(26))
    assert cache.num_bytes == 80 and cache.get("too large", lambda: torch.zeros(26)) is not too_large


def test_masks_differ_by_all_that_they_depend_on():
    """All of these come from the same cache."""
    by_device = attention_masks.visibility_mask
    assert by_device(3, 3, None, CPU).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert by_device(2, 3, None, CPU).tolist() == [[True, True, False], [True, True, True]]
    assert by_device(2, 3, 1, CPU).tolist() == [[False, True, False], [False, False, True]]
    assert attention_masks.additive_mask(2, 3, 1, torch.float32, CPU).exp().tolist() == [[0, 1, 0], [0, 0, 1]]
    assert attention_masks.additive_mask(2, 3, 1, torch.float16, CPU).dtype == torch.float16
    blocks = [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert attention_masks.block_diagonal_mask((2, 1), torch.float32, CPU).exp().tolist() == blocks


def test_short_segments_are_computed_together():
    """Unless a window would cut one of them, or the shared keys differ."""
    segments = Segments(((0, 5), (5, 12), (12, 52), (52, 54), (54, 154)), num_prefix_tokens=5, num_shared=5)
    assert [group.lengths for group in attention_blocked._groups(segments, None)] == [(5,), (7, 40, 2), (100,)]
    assert [group.lengths for group in attention_blocked._groups(segments, 20)] == [(5,), (7,), (40,), (2,), (100,)]
    assert [group.lengths for group in attention_blocked._groups(segments, 45)] == [(5,), (7, 40, 2), (100,)]


def reference_kernel(q, k, v, index, scale, window, softcap):
    """What variable-length flash attention computes, by its documentation.

    Sequence i has queries cu_q[i]:cu_q[i+1] and keys cu_k[i]:cu_k[i+1]; the causal mask is aligned to the bottom right
    corner; a window of (left, 0) counts from the diagonal.
    """
    _, cu_q, cu_k, max_q, max_k = index
    outputs = []
    groups = q.shape[1] // k.shape[1]
    assert (
        max_q == cu_q.diff().max()
        and max_k == cu_k.diff().max()
        and cu_q[-1] == len(q)
        and cu_k[-1] == len(k) == len(v)
    )
    for i in range(len(cu_q) - 1):
        qi, ki, vi = q[cu_q[i] : cu_q[i + 1]], k[cu_k[i] : cu_k[i + 1]], v[cu_k[i] : cu_k[i + 1]]
        ki, vi = ki.repeat_interleave(groups, 1), vi.repeat_interleave(groups, 1)
        scores = torch.einsum("qhe,khe->hqk", qi, ki) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(len(qi))[:, None] + len(ki) - len(qi) - torch.arange(len(ki))[None]
        hidden = (distance < 0) | (distance >= (window or len(ki) + 1))
        outputs.append(torch.einsum("hqk,khe->qhe", scores.masked_fill(hidden, float("-inf")).softmax(-1), vi))
    return torch.cat(outputs)


def test_the_index_arithmetic_of_variable_length_attention():
    inside = varlen_index(Segments(((0, 2), (2, 5), (5, 6)), num_prefix_tokens=2, num_shared=2), torch.device("cpu"))
    assert inside[0].tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 5]
    assert [inside[1].tolist(), inside[2].tolist(), *inside[3:]] == [[0, 2, 5, 6], [0, 2, 7, 10], 3, 5]
    outside = varlen_index(Segments(((0, 3), (3, 4)), num_prefix_tokens=0, num_shared=2), torch.device("cpu"))
    assert outside[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 5]
    assert [outside[1].tolist(), outside[2].tolist(), *outside[3:]] == [[0, 3, 4], [0, 5, 8], 3, 5]
    # 2 keys from outside, then a hard prompt of 3 tokens, which sees them, and two examples, which see both.
    both = varlen_index(Segments(((0, 3), (3, 5), (5, 6)), num_prefix_tokens=3, num_shared=5), torch.device("cpu"))
    assert both[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 7]
    assert [both[1].tolist(), both[2].tolist(), *both[3:]] == [[0, 3, 5, 6], [0, 5, 12, 18], 3, 7]


@pytest.mark.parametrize("name, dtype, says", [
    ("varlen", torch.bfloat16, "it needs a GPU"), ("flash_attn", torch.bfloat16, "it needs a GPU"),
    ("sdpa", torch.float32, None), ("blocked", torch.float32, None),
])  # fmt: skip
def test_a_back_end_that_can_not_run_says_why(name, dtype, says):
    reason = missing(name, CPU, dtype)
    assert (reason is None) == (says is None) and (says is None or says in reason)


def test_gpu_back_ends_want_sixteen_bits():
    reason = missing("varlen", SimpleNamespace(type="cuda"), torch.float32)  # type: ignore[arg-type]
    assert reason and "--dtype bfloat16" in reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["varlen", "flash_attn"])
@pytest.mark.parametrize("variant", ["lora", "prompt_tuning", "prefix_tuning"])
def test_the_kernels_of_a_gpu_compute_what_sdpa_computes(variant, backend):
    device = torch.device("cuda")
    if missing(backend, device, torch.bfloat16):
        pytest.skip(str(missing(backend, device, torch.bfloat16)))
    results = []
    for name in ("sdpa", backend):
        model, method = wrap(variant, random_model("mistral").to(device, torch.bfloat16))
        model.to(device)
        packed: PackedModel = packed_model(model, method, name)
        loss, _ = packed(**packing.to_device(packing.pack(examples()), device))
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])))
    (expected_loss, expected), (loss, gradient) = results
    assert loss == pytest.approx(expected_loss, rel=1e-2)
    assert (gradient - expected).norm() / expected.norm() < 5e-2
