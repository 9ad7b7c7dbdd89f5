"""Adapters on disk: what their folders must hold, and which base they go with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

from open_instruct import InputError
from open_instruct.adapters import folders
from open_instruct.adapters.folders import (
    AdapterFolder,
    base_name,
    parse_adapters,
    quantisation,
    read_folder,
    same_base,
)
from open_instruct.methods import METHODS
from tests.conftest import ADAPTERS, ROOT, TINY_MODEL


def write_adapter(folder: Path, **settings: Any) -> Path:
    """Write a folder that looks like an adapter: its settings, and a file in place of its weights."""
    folder.mkdir()
    defaults = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(defaults | settings))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def write_record(folder: Path, **flags: Any) -> None:
    """Write the run.json of a run with these flags."""
    content = {"flags": {name: {"value": value, "origin": "flag"} for name, value in flags.items()}}
    (folder / "run.json").write_text(json.dumps(content))


def test_settings_are_those_that_peft_reads(trained):
    """From the JSON alone, for every method; and nothing heavy is imported for it."""
    for method in ADAPTERS:
        folder = read_folder(method, str(trained / method))
        config = PeftConfig.from_pretrained(str(trained / method))
        assert folder.peft_type == config.peft_type.value and folder.method is METHODS[method]
        assert folder.trained_base == config.base_model_name_or_path == str(TINY_MODEL)
        assert folder.num_virtual_tokens == getattr(config, "num_virtual_tokens", 0)
        assert folder.config == config and folder.config is folder.config
    program = (
        "import sys; from open_instruct.adapters.folders import AdapterFolder, base_name, parse_adapters\n"
        f"base_name(None, parse_adapters([{str(trained / 'lora')!r}]))\n"
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


@pytest.mark.parametrize("peft_type, prompt, merged", [
    ("LORA", None, "weights"), ("IA3", None, "weights"), ("PROMPT_TUNING", "embeddings", "tokens"),
    ("P_TUNING", "embeddings", "tokens"), ("PREFIX_TUNING", "keys_values", "tokens"), ("POLY", None, None),
])  # fmt: skip
def test_facts_come_from_the_registry(peft_type, prompt, merged):
    folder = AdapterFolder("a", Path("a"), {"peft_type": peft_type})
    assert folder.prompt_kind == prompt and folder.title
    assert (folder.method is None) == (peft_type == "POLY")
    assert (folder.method and folder.method.merges_into) == merged


def test_names(tmp_path):
    write_adapter(tmp_path / "v1.5 lora")
    write_adapter(tmp_path / "a=b")
    sources = [str(tmp_path / "v1.5 lora"), f"p.x={tmp_path / 'v1.5 lora'}", str(tmp_path / "a=b")]
    assert [folder.name for folder in parse_adapters(sources)] == ["v1.5_lora", "p.x", "a_b"]
    assert parse_adapters(None) == []
    for words, message in [
        ([sources[0], sources[0]], "two adapters are named 'v1.5_lora'"),
        ([f"base={tmp_path / 'a=b'}"], "stands for the plain model"),
        ([f"x y={tmp_path / 'a=b'}"], "is named 'x y'"),
    ]:
        with pytest.raises(InputError, match=message):
            parse_adapters(words)


@pytest.mark.parametrize("content, message", [
    ("{", "adapter .* can't be used"),
    ("[]", "names no peft_type"),
    ('{"r": 8}', "names no peft_type"),
    ('{"peft_type": "P_TUNING"}', "num_virtual_tokens is None"),
    ('{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 0}', "num_virtual_tokens is 0"),
])  # fmt: skip
def test_damaged_settings(content, message, tmp_path):
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_folder("a", str(folder))


def test_settings_that_peft_can_not_read(tmp_path):
    folder = read_folder("a", str(write_adapter(tmp_path / "a", peft_type="NEWER_THAN_PEFT")))
    assert folder.title == "NEWER_THAN_PEFT" and folder.num_virtual_tokens == 0
    with pytest.raises(InputError, match="can't be used"):
        _ = folder.config


def test_the_base_is_the_requested_one_or_the_adapters(tmp_path):
    (known,) = parse_adapters([str(write_adapter(tmp_path / "known", base_model_name_or_path=str(TINY_MODEL)))])
    (foreign,) = parse_adapters([str(write_adapter(tmp_path / "foreign"))])
    (moved,) = parse_adapters([str(write_adapter(tmp_path / "moved", base_model_name_or_path="/nowhere/model"))])
    assert base_name(None, [foreign, known]) == str(TINY_MODEL)
    assert base_name("org/other", [foreign]) == "org/other"
    assert base_name("org/other", [known], any_base=True) == "org/other"
    assert base_name("elsewhere/model", [moved]) == "elsewhere/model"
    for requested, adapters, message in [
        (None, [], "no base model is known: give --model_name_or_path$"),
        (None, [foreign], "as the adapter names none"),
        (None, [moved], "was at /nowhere/model, which is not there"),
        (
            "org/other",
            [foreign, known],
            "adapter known was trained on .*tiny-model, and the base model here is org/other",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            base_name(requested, adapters)


def test_equal_folders_are_one_base_and_changed_ones_are_not(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(TINY_MODEL, copy)
    link = tmp_path / "link"
    link.symlink_to(TINY_MODEL)
    assert same_base(str(TINY_MODEL), str(copy)) and same_base(str(TINY_MODEL), str(link))
    assert same_base("org/Model", "/mnt/models/model") and not same_base("org/model", "org/model-2")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0, "rms_norm_eps": 1e-3}))
    assert not same_base(str(TINY_MODEL), str(copy))


def test_the_record_of_a_run(tmp_path, capsys):
    """Flags of the run that trained it; quantisation is shared only where all agree."""
    names = ("a", "b", "c", "d")
    adapters = parse_adapters([str(write_adapter(tmp_path / name)) for name in names])
    write_record(tmp_path / "a", use_qlora=True)
    write_record(tmp_path / "b", load_in_4bit=True)
    write_record(tmp_path / "c", load_in_8bit=True)
    assert adapters[0].trained_on("use_qlora") is True and adapters[0].trained_on("seed") is None
    assert adapters[3].record == {}  # another tool's
    assert quantisation(adapters[:2]) == "4bit" and quantisation(adapters[2:3]) == "8bit"
    assert quantisation([]) is None and quantisation(adapters[3:]) is None and not capsys.readouterr().err
    assert quantisation(adapters[1:3]) is None
    assert capsys.readouterr().err.startswith("warning: b, c were trained on differently quantised bases")


def test_mergeable_and_inspectable(tmp_path):
    types = {"lora": "LORA", "ia3": "IA3", "prompt": "PROMPT_TUNING", "p": "P_TUNING", "prefix": "PREFIX_TUNING"}
    adapters = {
        name: read_folder(name, str(write_adapter(tmp_path / name, peft_type=peft_type)))
        for name, peft_type in (types | {"poly": "POLY"}).items()
    }
    output = str(tmp_path / "merged")
    for names in (["lora"], ["ia3"], ["prompt"], ["prompt", "p"], ["prefix"], ["prefix", "p"]):
        folders.check_mergeable([adapters[name] for name in names], output)
    for names, message in [
        ([], "nothing to merge"),
        (
            ["poly"],
            "adapter poly is POLY, which can't be merged here: use LoRA, prefix tuning, prompt tuning, P-tuning",
        ),
        (["lora", "prompt"], r"lora \(LoRA\) would change the weights"),
    ]:
        with pytest.raises(InputError, match=message):
            folders.check_mergeable([adapters[name] for name in names], output)
    with pytest.raises(InputError, match="exists already"):
        folders.check_mergeable([adapters["lora"]], str(tmp_path))
    for name in ("prompt", "p", "prefix"):
        folders.check_prompt(adapters[name])
    with pytest.raises(InputError, match="is IA3, which has no virtual tokens"):
        folders.check_prompt(adapters["ia3"])
