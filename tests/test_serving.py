"""Merged checkpoints for servers: what they hold, what is refused, and where a prefix goes in a paged cache.

The connector itself needs vLLM, and is tested where it is installed; scripts/test_serving.sh tests real servers.
"""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import open_instruct
from open_instruct.adapters.folders import parse_adapters
from open_instruct.adapters.vllm_engine import check_engine
from open_instruct.data.chat import render_texts
from open_instruct.errors import InputError
from open_instruct.generate_peft import main as generate_main
from open_instruct.serving import mlx_cache, vllm_command
from open_instruct.serving.checkpoint import MERGED, Prefix, read_prefixes
from open_instruct.serving.slots import can_be_computed, heads_of, slots_of, wanted_prefix
from tests.conftest import ROOT, TINY_MODEL
from tests.test_merging import make_adapter, make_base

CHAT = [{"role": "user", "content": "red green"}]


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Path:
    """A checkpoint with a soft prompt of embeddings and two prefixes, on a base with grouped heads."""
    folder = tmp_path_factory.mktemp("serving")
    base = make_base(folder / "base", "tied")
    template = AutoTokenizer.from_pretrained(TINY_MODEL).chat_template
    methods = {"first": "prefix_tuning", "second": "prompt_tuning", "third": "prefix_tuning"}
    for seed, (name, method) in enumerate(methods.items()):
        make_adapter(folder / name, base, method, seed, template)
    open_instruct.merge([f"{name}={folder / name}" for name in methods], str(folder / "merged"))
    return folder / "merged"


def test_a_prefix_in_a_checkpoint_is_pefts(merged):
    """Keys and values in the place of the placeholders give PEFT's logits; the placeholders themselves do not."""
    served = open_instruct.load(str(merged.parent / "first"), str(merged.parent / "base"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    ids = torch.tensor([tokenizer("the red stone", add_special_tokens=False)["input_ids"]])
    (prefix,) = [prefix for prefix in read_prefixes(merged) if prefix.adapter == "first"]
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(prefix.load()):
        cache.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], layer)
    with torch.no_grad():
        wanted = served.adapters.use("first")(input_ids=ids).logits[0]
        found = model(input_ids=ids, past_key_values=cache).logits[0]
        computed = model(input_ids=torch.tensor([prefix.ids + ids[0].tolist()])).logits[0, prefix.num_tokens :]
    torch.testing.assert_close(found[:, : wanted.shape[-1]], wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(computed[:, : wanted.shape[-1]], wanted, atol=0.1)  # the negative control


def test_only_a_server_of_prefixes_takes_them(merged):
    """Elsewhere the placeholders would be computed, and the answers would be wrong without a word."""
    tokenizer = AutoTokenizer.from_pretrained(merged)
    options = {"add_generation_prompt": True}
    with pytest.raises(InputError, match="adapter first is a prefix, which this server was not started for"):
        render_texts(tokenizer, [CHAT], adapter="first", **options)
    with pytest.raises(InputError, match="is a prefix"):
        render_texts(tokenizer, [CHAT], **options)  # the first adapter is the default
    (plain,), _ = render_texts(tokenizer, [CHAT], adapter="base", **options)
    for name in ("first", "second", "third"):
        served = {"prefixes_served": True} if name != "second" else {}
        (text,), _ = render_texts(tokenizer, [CHAT], adapter=name, **served, **options)
        assert text == "".join(f"<|{name}_{number}|>" for number in range(5)) + plain
    with pytest.raises(InputError, match="no adapter nobody"):
        render_texts(tokenizer, [CHAT], adapter="nobody", prefixes_served=True, **options)
    tokens = json.loads((merged / MERGED).read_text())["tokens"]
    before_text = tokenizer("red")["input_ids"][:5]
    assert before_text == list(range(tokens["second"]["first"], tokens["second"]["first"] + 5))


def test_no_engine_mistakes_a_prefix_for_weights(merged):
    assert {path.name for path in merged.glob("*.safetensors")} == {"model.safetensors"}
    assert {path.name for path in merged.glob("*/*.safetensors")} == {"first.safetensors", "third.safetensors"}


@pytest.mark.parametrize("change, says", [
    ("missing", "can't be read"),
    ("flipped", "is not the file that was written here"),
    ("other", "is not the file that was written here"),
    ("empty", "can't be read"),
    ("number", "is not the file that was written here"),
    ("no number", "can't be used"),
    ("no json", "is no merged checkpoint"),
    ("list", "can't be used"),
])  # fmt: skip
def test_a_damaged_checkpoint_is_refused_before_a_server_starts(change, says, merged, tmp_path, capsys):
    (tmp_path / "prefixes").mkdir()
    for name in ("first", "third"):
        (tmp_path / "prefixes" / f"{name}.safetensors").write_bytes(
            (merged / "prefixes" / f"{name}.safetensors").read_bytes()
        )
    content = json.loads((merged / MERGED).read_text())
    path = tmp_path / "prefixes" / "third.safetensors"
    if change == "missing":
        path.unlink()
    elif change == "flipped":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif change == "other":
        path.write_bytes((tmp_path / "prefixes" / "first.safetensors").read_bytes())
    elif change == "empty":
        path.write_bytes(b"")
    elif change == "number":
        content["tokens"]["third"]["number"] = 6
    elif change == "no number":
        del content["tokens"]["third"]["first"]
    elif change == "list":
        content["tokens"] = []
    (tmp_path / MERGED).write_text("{" if change == "no json" else json.dumps(content))
    assert vllm_command.main(["--print", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error and "Traceback" not in error


def test_the_command_has_what_the_checkpoint_needs(merged, capsys):
    assert vllm_command.main(["--print", str(merged), "--port", "9000"]) == 0
    command = capsys.readouterr().out
    assert command.startswith(f"vllm serve {merged} ") and command.endswith("--port 9000\n")
    assert "PrefixConnector" in command and "prefixes_served" in command and "processed_logprobs" in command
    assert vllm_command.main(["--print", str(merged.parent / "nowhere")]) == 2
    assert "is no merged checkpoint" in capsys.readouterr().err


def test_a_server_needs_nothing_else_of_the_package():
    """Its environment has torch and safetensors, and neither peft nor transformers of this project's versions."""
    code = (
        "import sys, open_instruct.serving.slots, open_instruct.serving.vllm_command\n"
        "print([name for name in ('peft', 'transformers', 'accelerate', 'datasets') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="it is there")
def test_an_engine_that_is_not_installed_is_one_line(merged, tmp_path, capsys):
    words = ["--engine", "vllm", "--adapter", str(merged.parent / "first"), "--input_file", str(tmp_path / "q.jsonl")]
    (tmp_path / "q.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    assert generate_main([*words, "--output_file", str(tmp_path / "a.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "vLLM is not installed" in error and error.count("\n") == 1


@pytest.mark.parametrize("method", ["ia3", "vera"])
def test_adapters_that_vllm_does_not_know_are_refused(method, merged, tmp_path, monkeypatch):
    own = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "vllm" or own(name))
    folders = parse_adapters([str(make_adapter(tmp_path / method, merged.parent / "base", method))])
    with pytest.raises(InputError, match="which vLLM does not know: merge it"):
        check_engine(folders)
    check_engine(parse_adapters([str(merged.parent / "first")]))


def test_a_lora_whose_base_vllm_would_not_have_is_refused(merged, tmp_path, monkeypatch):
    own = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "vllm" or own(name))
    folder = make_adapter(tmp_path / "lora", merged.parent / "base", "lora")
    check_engine(parse_adapters([str(folder)]))
    for flag, value in {"model_revision": "v2", "additional_model_arguments": '{"rope_theta": 5.0}'}.items():
        (folder / "run.json").write_text(json.dumps({"flags": {flag: {"value": value, "origin": "flag"}}}))
        with pytest.raises(InputError, match=f"--{flag} .*which vLLM would load without"):
            check_engine(parse_adapters([str(folder)]))


def test_an_engine_is_asked_for_adapters_that_exist(merged):
    """Whatever computes the answers: a mistyped name must not get the base's."""
    served = open_instruct.load(str(merged.parent / "first"))
    with pytest.raises(InputError, match="no adapter 'frist'"):
        replace(served, engine=object()).answers(["red"], "frist")


PREFIXES = [
    Prefix(name, first, num_tokens, Path(name), "", 1, 2, 4)
    for name, first, num_tokens in (("a", 100, 5), ("b", 105, 1), ("c", 106, 40))
]


@pytest.mark.parametrize("ids, name", [
    ([*range(100, 105), 1, 2], "a"),
    ([*range(100, 105)], "a"),
    ([105, 1], "b"),
    ([*range(106, 146), 7], "c"),
    ([*range(100, 104), 1], None),
    ([1, *range(100, 105)], None),
    ([100, 102, 101, 103, 104], None),
    ([104, 105], None),
    ([], None),
    (None, None),
])  # fmt: skip
def test_a_prompt_wants_the_prefix_that_it_begins_with(ids, name):
    prefix = wanted_prefix(ids, PREFIXES)
    assert (prefix and prefix.adapter) == name


@pytest.mark.parametrize("ids, can_be", [
    ([*range(100, 105), 1], True),
    ([1, 2], True),
    ([105, 1], True),
    (None, True),
    ([*range(100, 105)], False),
    ([105], False),
    ([1, *range(100, 105), 2], False),  # another adapter's tokens may stand before them
    ([*range(100, 105), 105, 2], False),
    ([*range(100, 104), 2], False),
    ([1, 2, 110], False),
])  # fmt: skip
def test_placeholders_are_computed_nowhere(ids, can_be):
    placeholders = frozenset(token for prefix in PREFIXES for token in prefix.ids)
    assert can_be_computed(ids, wanted_prefix(ids, PREFIXES), placeholders) is can_be


@pytest.mark.parametrize("block_size", [1, 16, 32])
@pytest.mark.parametrize("start, end", [(0, 50), (32, 50), (48, 50), (0, 32), (50, 50), (0, 1)])
def test_slots_are_those_of_a_cache_that_is_paged(block_size, start, end):
    """Written through the slots, and read back through the table of blocks, positions are in order."""
    generator = torch.Generator().manual_seed(block_size)
    block_ids = torch.randperm(80, generator=generator).tolist()[: -(-end // block_size)]
    cache = torch.full((80 * block_size,), -1)
    cache[slots_of(block_ids, block_size, start, end)] = torch.arange(start, end)
    read = cache.view(80, block_size)[block_ids].flatten()
    assert read[start:end].tolist() == list(range(start, end)) and (cache >= 0).sum() == end - start


def test_positions_beyond_the_blocks_are_refused():
    with pytest.raises(ValueError, match="2 blocks of 16 do not hold 33 positions"):
        slots_of([4, 5], 16, 0, 33)


@pytest.mark.parametrize("num_heads, num_ranks", [(8, 1), (8, 2), (8, 8), (2, 8), (1, 4), (6, 3)])
def test_ranks_hold_the_heads_that_vllm_gives_them(num_heads, num_ranks):
    """VLLM splits heads, and where there are fewer than ranks, gives each to neighbouring ranks."""
    local = max(1, num_heads // num_ranks)
    held = [list(range(num_heads))[heads_of(num_heads, local, rank, num_ranks)] for rank in range(num_ranks)]
    copies = max(1, num_ranks // num_heads)
    assert [head for rank in held[::copies] for head in rank] == list(range(num_heads))
    assert all(held[rank] == held[rank - rank % copies] for rank in range(num_ranks))


@pytest.mark.parametrize("num_heads, local, num_ranks", [(8, 4, 1), (4, 8, 1), (6, 1, 4), (8, 8, 2)])
def test_heads_of_another_model_are_refused(num_heads, local, num_ranks):
    with pytest.raises(ValueError, match="it belongs to another model"):
        heads_of(num_heads, local, 0, num_ranks)


@pytest.mark.parametrize(
    ("adapter", "output", "words"),
    [
        ("second", "new.safetensors", "is no prefix in"),
        ("first", "new.bin", "ends in .safetensors"),
        ("first", "config.json", "exists"),
        ("first", "new.safetensors", "pip install mlx-lm"),
    ],
)
def test_wrong_prompt_caches_are_refused(merged, capsys, monkeypatch, adapter, output, words):
    """Nothing is written for what is no prefix, to a wrong name, or without mlx-lm."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    before = sorted(merged.iterdir())
    command = ["--checkpoint", str(merged), "--adapter", adapter, "--output", str(merged / output)]
    assert mlx_cache.main(command) == 2
    assert words in capsys.readouterr().err
    assert sorted(merged.iterdir()) == before


def test_a_prompt_cache_holds_the_prefix(merged, tmp_path):
    """What mlx-lm reads back are the keys and values."""
    cache = pytest.importorskip("mlx_lm.models.cache")
    path = tmp_path / "first.safetensors"
    assert mlx_cache.main(["--checkpoint", str(merged), "--adapter", "first", "--output", str(path)]) == 0
    (prefix,) = [prefix for prefix in read_prefixes(merged) if prefix.adapter == "first"]
    for layer, pair in zip(cache.load_prompt_cache(str(path)), prefix.load(), strict=True):
        for found, wanted in zip(layer.state[:2], pair, strict=True):
            assert torch.equal(torch.tensor(found.tolist())[:, :, : layer.offset], wanted.transpose(0, 1)[None])
