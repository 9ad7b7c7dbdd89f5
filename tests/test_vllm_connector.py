"""The connector on vLLM's own base class, where vLLM is installed: scripts/test_serving.sh runs this there."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from open_instruct.serving import vllm_connector
from open_instruct.serving.checkpoint import MERGED, write_prefix
from open_instruct.serving.vllm_command import PROCESSOR
from open_instruct.serving.vllm_connector import Placeholders, PrefixConnector

LAYERS, HEADS, SIZE, BLOCK = 3, 4, 8, 16
LENGTHS = {"short": 5, "exact": 32, "long": 50}
FIRST = {"short": 100, "exact": 105, "long": 137}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, dict[str, list[tuple[torch.Tensor, torch.Tensor]]]]:
    """A checkpoint of prefixes alone, and their keys and values [P, K, E]."""
    import json

    folder, tokens, pairs = tmp_path_factory.mktemp("checkpoint"), {}, {}
    for name, length in LENGTHS.items():
        own = [tuple(torch.randn(1, HEADS, length, SIZE) for _ in range(2)) for _ in range(LAYERS)]
        entry = write_prefix(folder, name, own)
        tokens[name] = {"first": FIRST[name], "number": length, "text": "", "kind": "keys_values", **entry}
        pairs[name] = [(keys[0].transpose(0, 1), values[0].transpose(0, 1)) for keys, values in own]
    (folder / MERGED).write_text(json.dumps({"tokens": tokens, "vocabulary_rows": 200, "rows_of_the_base": 195}))
    return folder, pairs


class Layer:
    """Attention whose cache is [blocks, 2, block, K, E]; it is written as vLLM's back ends write theirs."""

    def __init__(self, heads: int, dtype: torch.dtype) -> None:
        """Make a cache that holds NaN wherever nothing was written."""
        self.num_kv_heads, self.head_size, self.impl = heads, SIZE, self
        self.kv_cache = torch.full((40, 2, BLOCK, heads, SIZE), float("nan"), dtype=dtype)

    def do_kv_cache_update(self, layer, key, value, kv_cache, slots) -> None:
        """See vLLM's AttentionImpl."""
        for part, values in enumerate((key, value)):
            for position, slot in enumerate(slots.tolist()):
                kv_cache[slot // BLOCK, part, slot % BLOCK] = values[position]

    def read(self, block_ids: list[int], end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of the first positions of a table of blocks."""
        blocks = self.kv_cache[block_ids]
        return blocks[:, 0].flatten(0, 1)[:end], blocks[:, 1].flatten(0, 1)[:end]


def connector_of(folder: Path, monkeypatch, rank=0, ranks=1, dtype=torch.float32, **changes) -> PrefixConnector:
    heads = changes.get("heads", max(1, HEADS // ranks))
    layers = {
        f"model.layers.{index}.self_attn.attn": Layer(heads, dtype) for index in range(changes.get("layers", LAYERS))
    }
    config = SimpleNamespace(
        model_config=SimpleNamespace(model=str(folder), logits_processors=changes.get("processors", [PROCESSOR])),
        cache_config=SimpleNamespace(block_size=BLOCK),
        compilation_config=SimpleNamespace(static_forward_context=layers),
        kv_transfer_config=SimpleNamespace(),
    )
    groups = SimpleNamespace(kv_cache_groups=[None] * changes.get("groups", 1))
    connector = PrefixConnector(config, vllm_connector.KVConnectorRole.WORKER, groups)
    monkeypatch.setattr(vllm_connector, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(vllm_connector, "get_tensor_model_parallel_world_size", lambda: ranks)
    connector.register_kv_caches({name: layer.kv_cache for name, layer in layers.items()})
    return connector


def request(name: str | None, number: int, more: int = 7):
    ids = list(range(FIRST[name], FIRST[name] + LENGTHS[name])) if name else []
    ids += list(range(more))
    return SimpleNamespace(request_id=f"r{number}", prompt_token_ids=ids, num_tokens=len(ids))


def step(connector, scheduled, resumed=()):
    """One step of vLLM: (request, blocks, tokens in vLLM's own cache) of each request that is scheduled anew."""
    new, cached = {}, {}
    for asked, block_ids, computed in scheduled:
        external, _ = connector.get_num_new_matched_tokens(asked, computed)
        blocks = SimpleNamespace(get_block_ids=lambda block_ids=block_ids: (block_ids,))
        connector.update_state_after_alloc(asked, blocks, external)
        (cached if asked in resumed else new)[asked.request_id] = computed + external
    output = SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=name, num_computed_tokens=n) for name, n in new.items()],
        scheduled_cached_reqs=SimpleNamespace(req_ids=list(cached), num_computed_tokens=list(cached.values())),
    )
    connector.bind_connector_metadata(connector.build_connector_meta(output))
    connector.start_load_kv(None)
    return connector.get_transfer_results(set())


def check(connector, pairs, name, block_ids, heads=slice(None)):
    for layer, (keys, values) in zip(connector.layers.values(), pairs[name], strict=True):
        found = layer.read(block_ids, LENGTHS[name])
        for part, wanted in zip(found, (keys, values), strict=True):
            torch.testing.assert_close(part, wanted[:, heads].to(part.dtype), rtol=0, atol=0)


def test_several_prefixes_and_the_base_share_a_step(checkpoint, monkeypatch):
    folder, pairs = checkpoint
    connector = connector_of(folder, monkeypatch)
    places = {"short": [3], "exact": [9, 1, 20], "long": [30, 2, 31, 5]}
    scheduled = [(request(name, number), places[name], 0) for number, name in enumerate(places)]
    step(connector, [*scheduled, (request(None, 9), [7], 0)])
    for name, block_ids in places.items():
        check(connector, pairs, name, block_ids)
    for layer in connector.layers.values():  # nothing else was touched
        untouched = [block for block in range(40) if block not in {9, 1, 20, 3, 30, 2, 31, 5}]
        assert layer.kv_cache[untouched].isnan().all()
        assert layer.kv_cache[places["short"][0], :, 5:].isnan().all()


def test_what_vllm_has_is_not_written_again(checkpoint, monkeypatch):
    """48 of 50 positions are in whole blocks: the other two are written for each request."""
    folder, pairs = checkpoint
    connector = connector_of(folder, monkeypatch)
    step(connector, [(request("long", 0), [30, 2, 31, 5], 0)])
    for layer in connector.layers.values():
        layer.kv_cache[8] = float("nan")
    step(connector, [(request("long", 1), [30, 2, 31, 8], 48)])
    check(connector, pairs, "long", [30, 2, 31, 8])
    assert connector.get_num_new_matched_tokens(request("exact", 2), 32) == (0, False)


def test_a_preempted_request_gets_its_prefix_again(checkpoint, monkeypatch):
    folder, pairs = checkpoint
    connector = connector_of(folder, monkeypatch)
    asked = request("long", 0)
    step(connector, [(asked, [30, 2, 31, 5], 0)])
    asked.num_tokens += 20  # it has written an answer
    step(connector, [(asked, [11, 12, 13, 14, 15], 0)], resumed=[asked])
    check(connector, pairs, "long", [11, 12, 13, 14, 15])


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("where", ["alone", "later"])
def test_placeholders_to_be_computed_are_an_error_of_that_request_alone(name, where, checkpoint, monkeypatch):
    folder, pairs = checkpoint
    connector = connector_of(folder, monkeypatch)
    wrong = request(name, 0, more=0)
    wrong.prompt_token_ids[:0] = [] if where == "alone" else [1]
    results = step(connector, [(wrong, [1, 2, 3, 4], 0), (request("long", 1), [5, 6, 7, 8], 0)])
    assert results.failed_recving == results.finished_recving == {"r0"}
    check(connector, pairs, "long", [5, 6, 7, 8])
    assert all(layer.kv_cache[1].isnan().all() for layer in connector.layers.values())
    assert not step(connector, []).failed_recving


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_of_tensor_parallelism_write_their_own_heads(ranks, dtype, checkpoint, monkeypatch):
    folder, pairs = checkpoint
    for rank in range(ranks):
        connector = connector_of(folder, monkeypatch, rank, ranks, dtype)
        step(connector, [(request("long", 0), [4, 3, 2, 1], 0)])
        first = rank * HEADS // ranks
        check(connector, pairs, "long", [4, 3, 2, 1], slice(first, first + max(1, HEADS // ranks)))


@pytest.mark.parametrize("changes, says", [
    ({"heads": 2}, "it belongs to another model"),
    ({"layers": 4}, "has 3 layers, and this process has 4"),
    ({"layers": 2}, "has 3 layers, and this process has 2"),
    ({"groups": 2}, "share one table of blocks"),
    ({"processors": None}, "start the server by scripts/serve.sh"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_at_the_start(changes, says, checkpoint, monkeypatch):
    with pytest.raises(ValueError, match=says):
        connector_of(checkpoint[0], monkeypatch, **changes)


def test_another_interface_is_named(monkeypatch):
    class Other(vllm_connector.KVConnectorBase_V1):
        def get_num_new_matched_tokens(self, request, num_computed_tokens, more):
            """One more parameter."""

    monkeypatch.setattr(vllm_connector, "KVConnectorBase_V1", Other)
    with pytest.raises(ImportError, match=r"has another interface for connectors .*tried with vLLM 0\.32\.0"):
        vllm_connector.check_interface()


def test_new_tokens_have_no_probability(checkpoint):
    config = SimpleNamespace(model_config=SimpleNamespace(model=str(checkpoint[0])))
    logits = Placeholders(config, torch.device("cpu"), False).apply(torch.zeros(2, 200))
    assert logits[:, :100].eq(0).all() and logits[:, 187:195].eq(0).all() and logits[:, 100:187].isinf().all()
    assert logits[:, 195:].isinf().all()  # rows that fill up a multiple
    for wrong in (
        {"prompt_logprobs": 1, "skip_reading_prefix_cache": None},
        {"prompt_logprobs": None, "skip_reading_prefix_cache": True},
    ):
        with pytest.raises(ValueError, match="are not asked for"):
            Placeholders.validate_params(SimpleNamespace(**wrong))
