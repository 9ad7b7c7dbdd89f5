"""Command lines, YAML files, templates and expressions: whatever they hold is a value within bounds, or one line."""

import json
import os
import random
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

import arrow2json
import sample_subsets
from open_instruct import evaluate_peft, generate_peft, inspect_peft, merge_peft, study_peft
from open_instruct.adapters.answer_metrics import check_regex, final_answer
from open_instruct.adapters.generation import Sampling
from open_instruct.adapters.interactive import chat as talk
from open_instruct.command_line import parse, warn_of_lost_lists
from open_instruct.data import chat
from open_instruct.errors import InputError, for_terminal, visible
from open_instruct.flags import FIELDS, check_flags, default_values
from open_instruct.flags.declare import out_of_bounds
from open_instruct.limits import limited_memory
from open_instruct.methods import METHODS
from open_instruct.model.sizes import BYTES_TRAINED, check_memory, check_sizes
from open_instruct.small_files import read_yaml
from open_instruct.streams import LastingStream
from open_instruct.study.report import fence, markdown_text, spreadsheet_text
from tests.conftest import ROOT, TINY_MODEL, tiny_llama

HOSTILE = [
    "", " ", "0", "-1", "1", "²", "١", "1e30", "1e400", "nan", "-nan", "inf", "-inf", "Infinity", "0x10", "1_000",
    "9" * 30, "9" * 5000, "-" + "9" * 30, "4294967296", "1e-400", "2.5", "1,5", "True", "no", "null", "\0", "a\nb",
    "\udcff", "x" * 9999, "[" * 99999, "{}", '{"a": 1e999}', '{"a": 1, "a": 2}', '{"a": -1}', "((", "$\\foo$", "-",
    "--", "=", "../..", "\x1b[2J", "1" * 18,
]  # fmt: skip
NEEDED = {
    generate_peft: ["--adapter", "x"],
    evaluate_peft: ["--file", "f"],
    inspect_peft: ["--adapter", "x"],
    merge_peft: ["--output", "o"],
    study_peft: ["--config", "c"],
    arrow2json: ["a.arrow"],
    sample_subsets: ["a.jsonl"],
}


def parser_of(tool, words):
    """What a tool's parser makes of words."""
    return tool.build_parser().parse_args(words) if tool is study_peft else tool.parse(words)


def flags_of(tool, capsys):
    """The flags that a tool's help names."""
    with pytest.raises(SystemExit):
        parser_of(tool, ["--help"])
    return sorted(set(re.findall(r"--[a-z]\w*", capsys.readouterr().out)) - {"--help"})


def refused(work, capsys):
    """Run a command line's checks: None and the result, or the one line that refuses it. Nothing else may happen."""
    try:
        return None, work()
    except InputError as error:
        return str(error), None
    except SystemExit as stop:
        error = capsys.readouterr().err
        assert stop.code == 2 and error.count("\n") == 1, error[:500]
        return error, None


def clean(value):
    """Whether a text could name something."""
    texts = [str(text) for text in (value if isinstance(value, (list, tuple)) else [value])]
    return all(text.strip() and "\0" not in text and text.encode() is not None for text in texts)


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_flag_of_a_run_takes_a_value_within_its_bounds_or_is_one_line(name, capsys):
    for value in HOSTILE:
        words = ["--model_name_or_path", "m", "--train_file", "t", f"--{name}={value}"]
        error, flags = refused(lambda words=words: checked(words), capsys)
        if error is None:
            taken = getattr(flags, name)
            assert out_of_bounds(FIELDS[name], taken) is None and clean(taken), (value, taken)
        else:
            assert "\n" not in for_terminal(error)


def checked(words):
    flags, origins = parse(words)
    check_flags(flags, origins)
    return flags


@pytest.mark.parametrize("tool", NEEDED, ids=lambda tool: tool.__name__.split(".")[-1])
def test_every_flag_of_a_tool_takes_a_finite_value_or_is_one_line(tool, capsys):
    for flag in flags_of(tool, capsys):
        for value in HOSTILE:
            error, args = refused(lambda w=[*NEEDED[tool], f"{flag}={value}"]: parser_of(tool, w), capsys)
            taken = getattr(args, flag[2:], None)
            if error is None and taken is not None:
                assert clean(taken) and not (isinstance(taken, float) and not abs(taken) < 1e9), (flag, value, taken)


def test_values_that_mean_something_are_taken(capsys):
    generate = ["--temperature=0.7", "--do_sample", "--top_p=1", "--seed=4294967295", "--system=Be brief.\nBe kind."]
    assert generate_peft.parse(generate).system.count("\n") == 1
    assert evaluate_peft.parse(["--file", "f", "--answer_regex", "#### (.*)"]).seed == 42
    assert study_peft.parse_shard("3/8") == (3, 8) and sample_subsets.parse(["f", "--seed", "0"]).seed == 0
    run = ["--learning_rate=3e-4", "--prompt_tuning_init_text=a\nb", "--use_prompt_tuning", "--clip_grad_norm=-1"]
    checked(["--model_name_or_path", "m", "--train_file", "dir with blank/é.jsonl", *run])
    mixer = json.dumps({"a.jsonl": 0.5, "b": 2000, "c": "1.0"})
    checked(
        ["--model_name_or_path", "m", "--dataset_mixer", mixer, "--output_dir", r"out/$\lr=1$", "--run_name", "=1+1"]
    )


def test_a_list_given_twice_is_said(capsys):
    warn_of_lost_lists(["--train_file", "a", "--train_file", "b", "--seed", "1", "--seed", "2"])
    error = capsys.readouterr().err
    assert "--train_file is given 2 times" in error and error.count("\n") == 1


# YAML

GOOD_YAML = (
    "model_name_or_path: m\nlearning_rate: 1.0e-3\ntrain_file: [a, b]\ndataset_mixer: {x: 0.5}\nno_packing: true\n"
)
PIECES = [
    "&a ", "*a", "<<: ", "!!int ", "!!timestamp 2020-99-99", "!!python/object:os.system ", "!!binary ", "[", "]",
    "{", "}", ": ", "- ", "\n", "\n---\n", "\t", "\0", "\ufeff", "'", '"', "|", ">", "#", "%YAML 9.9", "? ",
    "9" * 5000, ".inf", ".nan", "0x", "1:1:1", "~", "on", "5: 5", "seed: 1\nseed: 2", "[" * 9000, "- " * 2000,
    "&b [*b]", "\u2028", "é", "\x85",
]  # fmt: skip
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


def test_a_spoilt_configuration_is_plain_data_or_one_line(tmp_path, capsys):
    rng = random.Random(13)
    path = tmp_path / "c.yaml"
    start = time.process_time()
    for _ in range(400):
        text = GOOD_YAML
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(PIECES) + text[at + rng.choice([0, 0, 1, 5]) :]
        path.write_text(text)
        error, _ = refused(lambda: checked([str(path)]), capsys)
        assert error is None or error.count("\n") <= 1, text
    assert time.process_time() - start < 60


@pytest.mark.parametrize(
    "text, says",
    [
        (LAUGHS, "its aliases make more than"),
        ("a: &x [*x]", "line 1: an alias stands for what contains it"),
        ("seed: 1\nlearning_rate: 1\nseed: 2", "line 3: the key seed stands there twice"),
        ("5: x", "line 1: the key 5 is no text: put it in quotes"),
        ("a: !!timestamp 2020-99-99", "has no meaning here"),
        ("a: !!int abc", "invalid literal"),
        (f"a: {'9' * 10000}", "a number has 10,000 digits"),
        ("a: " + "[" * 500, "line 1: it is nested too deeply"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: b\n\tc: d", "line 2: "),
    ],
)
def test_what_yaml_could_do_beyond_plain_data_is_refused_with_its_line(tmp_path, text, says):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        read_yaml(tmp_path / "c.yaml", "configuration c.yaml")
    assert says in str(error.value) and "\n" not in str(error.value)


def test_plain_yaml_is_read_as_it_stands(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("\ufeffa: &x {b: 1, c: [2, 3.5]}\nd: *x\ne: 2020-01-01\nf: {<<: *x, b: 4}\ng: ~\n'5': yes\n")
    inner = {"b": 1, "c": [2, 3.5]}
    expected = {"a": inner, "d": inner, "e": "2020-01-01", "f": {"b": 4, "c": [2, 3.5]}, "g": None, "5": True}
    assert read_yaml(path, "c") == expected


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "large", "latin"])
def test_a_configuration_is_a_small_text_file(tmp_path, kind):
    path = tmp_path / "c.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(b"a: 1\n" * 300_000 if kind == "large" else "a: é".encode("latin1"))
    with pytest.raises(InputError, match=r"can't be used \(.*\): mend it"):
        read_yaml(path, "configuration")


@pytest.mark.parametrize(
    "text, says",
    [
        ("help: true", "unknown --help"),
        ("seed=5: 3", "unknown --seed=5"),
        ("seed: {a: 1}", "seed has a mapping"),
        ("train_file: [a, ~]", "must hold texts and numbers only"),
        ("run_name: '--seed'", "looks like a flag"),
    ],
)
def test_a_key_of_a_configuration_is_one_flag(tmp_path, text, says):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=re.escape(says)):
        parse([str(tmp_path / "c.yaml")])


# Templates and expressions

TEMPLATES = [
    "{% for i in range(10**9) %}x{% endfor %}", "{{ 1/0 }}", "{{ messages + 1 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include 'x' %}", "{% import 'x' as x %}", "", "  ",
    "{{ 'a' * 10**10 }}", "{{ 'a' * 10**7 }}", "{{ 'a'|center(10**11) }}", "{{ '%99999999999d' % 1 }}",
    "{{ [0] * 10**11 }}", "{{ nope.x }}", "{{ raise_exception('no') }}", "{{ " + "(" * 9999, "{{",
    "{% if 1 %}" * 3000, "{{ messages[99].content }}", "{{ '\\ud800' }}",
    "{% generation %}{{ 1/0 }}{% endgeneration %}",
    "{% set n = namespace(x='a' * 99) %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
]  # fmt: skip
LOOP = "{% for a in range(99999) %}"
ENDLESS = LOOP * 3 + "{% endfor %}" * 3


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MODEL)


@pytest.mark.parametrize("template", [*TEMPLATES, ENDLESS], ids=lambda text: text[:25])
def test_a_bad_template_is_one_line_that_names_it(template, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", -0.5)  # a second is added for each conversation
    path = tmp_path / "t.jinja"
    path.write_text(template)
    with pytest.raises(InputError) as error:
        chat.set_chat_template(tokenizer, str(path))
    assert "t.jinja" in str(error.value) and "\n" not in str(error.value) and "use another" in str(error.value)


def test_memory_is_limited_within_the_block_only():
    with pytest.raises(MemoryError), limited_memory(1 << 24):
        bytearray(1 << 28)
    bytearray(1 << 28)


@pytest.mark.parametrize("regex", ["(((", "a{99999999999}", "[z-a]", "(?P<a>)(?P<a>)", 5, None, [], "(?<=a*)b", "\\"])
def test_what_is_no_regular_expression_is_one_line(regex):
    with pytest.raises(InputError, match=r"can't be used"):
        check_regex(regex)


def test_a_search_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr("open_instruct.adapters.answer_metrics.SECONDS", 0.3)
    with pytest.raises(InputError, match="still computing"):
        final_answer("a" * 64 + "b", r"(a+)+$")
    assert final_answer("#### 1\n#### 2", "#### (.*)") == "2" and final_answer("x", "y") == ""


# Sizes


@pytest.mark.parametrize("key, value", [("num_hidden_layers", 10**9), ("hidden_size", -1), ("vocab_size", "x")])
def test_a_size_that_nothing_has_is_refused(key, value):
    config = tiny_llama().config
    check_sizes(config, "m")
    object.__setattr__(config, key, value)
    with pytest.raises(InputError, match=key):
        check_sizes(config, "m")


SETTINGS = {
    "lora": {"lora_rank": 7, "lora_alpha": 1.0, "lora_dropout": 0.0},
    "vera": {"vera_rank": 64, "vera_dropout": 0.0},
    "prompt_tuning": {"num_virtual_tokens": 9, "prompt_tuning_init": "random", "prompt_tuning_init_text": None},
    "p_tuning": {"num_virtual_tokens": 9, "encoder_hidden_size": 50},
    "prefix_tuning": {
        "num_virtual_tokens": 9, "prefix_init": "zero", "prompt_tuning_init_text": None, "prefix_projection": False,
        "encoder_hidden_size": None,
    },
    "prefix_tuning, projected": {
        "num_virtual_tokens": 9, "prefix_init": "zero", "prompt_tuning_init_text": None, "prefix_projection": True,
        "encoder_hidden_size": 50,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_an_adapter_is_estimated_before_it_is_made(name, tokenizer):
    """Never above what it takes, so that nothing is refused that fits; and not far below."""
    model, method = tiny_llama(vocab_size=len(tokenizer)), METHODS[name.partition(",")[0]]
    settings = method.settings(default_values(**SETTINGS[name]))
    estimate = method.num_numbers(model, settings) * BYTES_TRAINED
    wrapped = method.wrap(model, tokenizer, settings)
    trained = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    frozen = sum({id(b): b.numel() for n, b in wrapped.named_buffers() if "vera" in n}.values())
    assert 0.2 * (8 * trained + 4 * frozen) < estimate <= 8 * trained + 4 * frozen
    with pytest.raises(InputError, match=r"are free: give a smaller one"):
        check_memory(10**15, settings, model.device)
    check_memory(10**3, settings, model.device)


# Streams, pages and the chat


def test_a_run_outlives_whoever_read_its_output():
    read, write = os.pipe()
    os.close(read)
    stream = LastingStream(os.fdopen(write, "w", buffering=1))
    for _ in range(3):
        print("x" * 100_000, file=stream, flush=True)
    stream.close()


def test_a_run_goes_on_when_its_reader_has_seen_enough(tmp_path, data_file):
    """As under `| head -1`: the result is what counts."""
    words = [
        "--model_name_or_path", str(TINY_MODEL), "--train_file", str(data_file), "--use_ia3", "--max_train_steps", "20",
        "--output_dir", str(tmp_path / "run"), "--dataset_skip_cache", "--num_sample_answers", "0",
    ]  # fmt: skip
    command = [sys.executable, "-u", str(ROOT / "open_instruct" / "finetune_peft.py"), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(600) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 20


def test_characters_that_the_terminal_lacks_are_escapes():
    code = "from open_instruct.streams import standard_streams\nwith standard_streams(False): print('→ \\ud800')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert result.stdout == b"\\u2192 \\ud800\n", result.stderr


def test_control_characters_are_shown_not_obeyed():
    assert visible("a\x1b[2J\x07b\n\tß漢\ud800") == "a\\x1b[2J\\x07b\n\tß漢\\ud800"


def test_cells_and_pages_show_texts_as_they_are():
    assert [spreadsheet_text(cell) for cell in ("=1+1", "@x", "-0.5", "+1e-3", "a", 5)] == [
        "'=1+1", "'@x", "-0.5", "+1e-3", "a", 5
    ]  # fmt: skip
    assert markdown_text("a <b>`x`\n[y](z)") == "a &lt;b&gt;\\`x\\` [y\\](z)"
    assert fence("````") == "`````"


def test_a_chat_goes_on_after_a_line_that_can_not_be_answered(monkeypatch, capsys, tokenizer):
    lines = iter(["\udcff bad", "hello", "/compare", "/nothing", "\x1b[2J", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    asked = []

    def stream(prompts, name, sampling, streamer):
        asked.append(prompts)
        if len(asked) == 1:
            raise KeyboardInterrupt
        streamer.on_finalized_text("\x1b[2Jclear", stream_end=True)
        return iter([(0, ["clear"])])

    own = AutoTokenizer.from_pretrained(TINY_MODEL)
    served = SimpleNamespace(names=[], tokenizer=own, max_length=lambda name: 1000, stream=stream)
    talk(served, Sampling(), None)
    out = capsys.readouterr().out
    assert "not UTF-8" in out and "(stopped)" in out and "\\x1b[2Jclear" in out and len(asked) == 2
