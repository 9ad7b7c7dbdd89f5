"""What is drawn: a command with one wrong input, and what must come of it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.hostile import mutations
from tests.hostile.sandbox import ADAPTERS, Sandbox, study_text
from tests.hostile.values import BAD_FLAGS, BAD_ROWS, BAD_STUDIES, CHANGES, FORMS, NUMBERS, PATTERNS, TEMPLATES, TEXTS

REFUSED, EITHER, ACCEPTED = "refused", "either", "accepted"


@dataclass
class Draw:
    """One command with its inputs."""

    command: str
    words: list[str]
    expected: str = EITHER  # refused: it must be; accepted: it must not be
    note: str = ""
    stdin: bytes = b""
    keeps: list[Path] = field(default_factory=list)  # files within the draw's own folder that must stay as they are


Kind = Callable[[random.Random, Sandbox, Path], Draw]
KINDS: list[Kind] = []


def kind(weight: int = 1) -> Callable[[Kind], Kind]:
    """Register a kind of draw; `weight` is how often it comes."""

    def register(function: Kind) -> Kind:
        KINDS.extend([function] * weight)
        return function

    return register


# What uses a model, an adapter and questions: the words of each command.


def finetune(sandbox: Sandbox, here: Path, *words: str) -> Draw:
    """A short run, of any cheap method unless one is named."""
    method = [] if any(word.startswith("--use_") for word in words) else ADAPTERS["prompt"]
    return Draw("finetune_peft", sandbox.train(*method, "--output_dir", str(here / "out"), *words))


def user(rng: random.Random, here: Path, sandbox: Sandbox, words: list[str]) -> Draw:
    """One of the commands that use a model, with words that name adapter or model."""
    command = rng.choice(["generate_peft", "evaluate_peft", "merge_peft", "inspect_peft", "generate_peft", "chat"])
    questions = ["--batch_size", "8", "--max_new_tokens", "4"]
    if command == "generate_peft":
        file = ["--input_file", str(sandbox.data), "--output_file", str(here / "answers.jsonl")]
        return Draw(command, [*words, *file, *questions])
    if command == "evaluate_peft":
        file = ["--file", str(sandbox.data), "--max_samples", "4", "--output_dir", str(here / "evaluation")]
        return Draw(command, [*words, *file, *questions])
    if command == "merge_peft":
        return Draw(command, [*words, "--output", str(here / "merged")])
    if command == "inspect_peft":
        return Draw(command, [*words, "--output_dir", str(here / "inspection")])
    return Draw("generate_peft", [*words, "--max_new_tokens", "4"], stdin=b"reverse: cat\n")


@kind(12)
def flag_of_a_run(rng: random.Random, sandbox: Sandbox, here: Path) -> Draw:
    """Any flag of the trainer with any odd value."""
    from open_instruct.flags import FIELDS

    name = rng.choice(sorted(FIELDS))
    value = rng.choice([*NUMBERS, *TEXTS])
    if name in ("trust_remote_code", "push_to_hub", "with_tracking", "save_to_hub"):
        name = "seed"
    draw = finetune(sandbox, here, *rng.choice([[f"--{name}", value], [f"--{name}={value}"], [f"--{name}"]]))
    draw.words += rng.choice([[], ["--dry_run"]])
    return draw


@kind(4)
def wrong_flag_of_a_run(rng: random.Random, sandbox: Sandbox, here: Path) -> Draw:
    """A flag that no run can take."""
    draw = finetune(sandbox, here, *rng.choice(BAD_FLAGS))
    draw.expected = REFUSED
    return draw


@kind(10)
def flag_of_a_tool(rng: random.Random, sandbox: Sandbox, here: Path) -> Draw:
    """Any flag of another tool with any odd value."""
    adapter = str(sandbox.run(rng.choice(["prompt", "lora"])))
    draw = user(rng, here, sandbox, ["--adapter", adapter])
    flags = sorted(set(re.findall(r"--[a-z_]+", _help(draw.command))) - {"--trust_remote_code", "--help"})
    value = rng.choice([*NUMBERS, *TEXTS])
    flag = rng.choice(flags)
    draw.words += rng.choice([[flag, value], [f"{flag}={value}"], [flag]])
    return draw


@kind(4)
def flag_of_a_converter(rng: random.Random, sandbox: Sandbox, here: Path) -> Draw:
    """Any flag of the tools for data with any odd value."""
    command = rng.choice(["arrow2json", "sample_subsets"])
    draw = converter(command, sandbox.arrow if command == "arrow2json" else sandbox.data, here)
    flags = sorted(set(re.findall(r"--[a-z_]+", _help(command))) - {"--help"})
    value, flag = rng.choice([*NUMBERS, *TEXTS]), rng.choice(flags)
    draw.words += rng.choice([[flag, value], [f"{flag}={value}"], [flag]])
    return draw


def _help(command: str) -> str:
    """The help of a command, which names its flags."""
    import contextlib
    import importlib
    import io

    from tests.hostile.forks import MODULES

    if command not in _HELP:
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            importlib.import_module(MODULES[command]).main(["--help"])
        _HELP[command] = text.getvalue()
    return _HELP[command]


_HELP: dict[str, str] = {}


def converter(command: str, source: Path, here: Path) -> Draw:
    """A tool for data on a file."""
    if command == "arrow2json":
        return Draw(command, [str(source), "-o", str(here / "out" / "rows.jsonl")])
    return Draw(command, [str(source), "--sizes", "5", "10", "-o", str(here / "out")])


def reader_of(rng: random.Random, sandbox: Sandbox, here: Path, source: Path) -> Draw:
    """Any command that reads conversations, on a file."""
    command = rng.choice(["finetune_peft", "finetune_peft", "generate_peft", "evaluate_peft", "sample_subsets"])
    if command == "finetune_peft":
        return finetune(sandbox, here, "--train_file", str(source), "--cache_dataset_only")
    if command == "sample_subsets":
        return converter(command, source, here)
    draw = user(random.Random(0), here, sandbox, ["--adapter", str(sandbox.run("prompt"))])
    name = "--input_file" if command == "generate_peft" else "--file"
    if command == "generate_peft":
        file = ["--output_file", str(here / "answers.jsonl")]
    else:
        file = ["--max_samples", "2", "--output_dir", str(here / "evaluation")]
    words = ["--adapter", str(sandbox.run("prompt")), name, str(source), *file, "--max_new_tokens", "2"]
    draw = Draw(command, words)
    return draw


@kind(14)
def wrong_row(rng: random.Random, sandbox: Sandbox, here: Path) -> Draw:
    """A row of any form with one wrong part."""
    form, count = rng.choice(FORMS), 12
    lines = [json.dumps(form)] * count
    lines[rng.randrange(count)] = mutations.mutated_json(rng, form)
    path = here / rng.choice(["rows.jsonl", "rows.jsonl", "rows.json"])
    text = "\n".join(lines) if path.suffix == ".jsonl" else "[" + ",\n".join(lines) + "]"
    path.write_text(text + rng.choice(["\n", "", "\r\n"]), encoding="utf-8")
    return reader_of(rng, sandbox, here, path)


@kind(4)
def bad_row(rng: random.Random, sandbox: Sandbox, here: Path) -> Draw:
    """A row that no command can take among good ones."""
    lines = [json.dumps(FORMS[0])] * 12
    lines[rng.randrange(12)] = rng.choice(BAD_ROWS)
    path = here / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    draw = finetune(sandbox, here, "--train_file", str(path), "--cache_dataset_only")
    draw.expected = REFUSED
    return draw


@kind(8)
def wrong_bytes_of_rows(rng: random.Random, sandbox: Sandbox, here: Path) -> Draw:
    """A file of rows with wrong bytes, or that is no file."""
    path = mutations.copy_of(sandbox.data, here, "rows.jsonl")
    note = mutations.spoil_file(rng, path)
    draw = reader_of(rng, sandbox, here, path)
    draw.note = note
    return draw


@kind(16)
def wrong_arrow(rng: random.Random, sandbox: Sandbox, here: Path) -> Draw:
    """An Arrow file with wrong bytes."""
    path = here / "rows.arrow"
    data = sandbox.arrow.read_bytes()
    for _ in range(rng.choice([1, 1, 2, 5])):
        data = mutations.mutated_bytes(rng, data)
    path.write_bytes(data)
    if rng.random() < 0.6:
        return converter("arrow2json", path, here)
    return reader_of(rng, sandbox, here, path)


@kind(8)
def wrong_model_file(rng: random.Random, sandbox: Sandbox, here: Path) -> Draw:
    """A model's folder of which one file is not right."""
    model = mutations.copy_of(sandbox.model, here, "model")
    files = sorted(path for path in model.iterdir() if path.is_file())
    note = mutations.spoil_file(rng, rng.choice(files))
    words = ["--model_name_or_path", str(model)]
    if rng.random() < 0.5:
        draw = finetune(sandbox, here, *words, "--dry_run")
    else:
        draw = user(rng, here, sandbox, [*words, "--adapter", str(sandbox.run("prompt")), "--any_base"])
    draw.note = note
    return draw


@kind(5)
def unfit_weights(rng: random.Random, sandbox: Sandbox, here: Path) -> Draw:
    """A base whose weights are not those that its configuration describes, or hold NaN."""
    model = mutations.copy_of(sandbox.model, here, "model")
    file, config = model / "model.safetensors", json.loads((model / "config.json").read_text())
    tensors = load_file(file)
    how = rng.choice(["prefixed", "half", "deeper", "shallower", "nan", "wider", "one"])
    names = sorted(tensors)
    if how == "prefixed":
        tensors = {f"zz.{name}": tensor for name, tensor in tensors.items()}
    elif how == "half":
        tensors = {name: tensors[name] for name in rng.sample(names, len(names) // 2)}
    elif how == "one":
        del tensors[rng.choice([name for name in names if "layers" in name])]
    elif how == "nan":
        name = rng.choice(names)
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = rng.choice([float("nan"), float("inf")])
    elif how == "wider":
        config["intermediate_size"] *= 2
    else:
        config["num_hidden_layers"] += 2 if how == "deeper" else -1
        config.pop("layer_types", None)
    save_file(tensors, file, metadata={"format": "pt"})
    (model / "config.json").write_text(json.dumps(config))
    words = ["--model_name_or_path", str(model)]
    if rng.random() < 0.4:
        draw = finetune(sandbox, here, *words)
    else:
        draw = user(rng, here, sandbox, [*words, "--adapter", str(sandbox.run("lora")), "--any_base"])
    draw.expected, draw.note = REFUSED, how
    return draw


@kind(8)
def wrong_adapter_file(rng: random.Random, sandbox: Sandbox, here: Path) -> Draw:
    """An adapter's folder of which one file is not right."""
    adapter = mutations.copy_of(sandbox.run(rng.choice(list(ADAPTERS))), here, "adapter")
    files = sorted(path for path in adapter.iterdir() if path.is_file() and path.suffix != ".png")
    note = mutations.spoil_file(rng, rng.choice(files))
    if rng.random() < 0.3:
        draw = finetune(sandbox, here, "--use_lora", "--adapter_name_or_path", str(adapter))
        draw.words.remove("--use_lora")
    else:
        draw = user(rng, here, sandbox, ["--adapter", str(adapter)])
    draw.note = note
    return draw


@kind(5)
def unfit_adapter(rng: random.Random, sandbox: Sandbox, here: Path) -> Draw:
    """An adapter with other tensors than its configuration describes, or with NaN."""
    method = rng.choice(list(ADAPTERS))
    adapter = mutations.copy_of(sandbox.run(method), here, "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    how = rng.choice(["prefixed", "half", "nan", "shape", "extra"])
    name = rng.choice(names)
    if how == "prefixed":
        tensors = {f"zz.{name}": tensor for name, tensor in tensors.items()}
    elif how == "half":
        tensors = {name: tensors[name] for name in rng.sample(names, len(names) // 2)}
    elif how == "nan":
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[0] = float("nan")
    elif how == "shape":
        tensors[name] = torch.zeros(*tensors[name].shape[:-1], tensors[name].shape[-1] + 1)
    else:
        tensors["base_model.model.of_nothing.lora_A.weight"] = torch.zeros(2, 2)
    save_file(tensors, file, metadata={"format": "pt"})
    if rng.random() < 0.3 and not (adapter / "training_network.safetensors").exists():
        draw = finetune(sandbox, here, "--use_lora", "--adapter_name_or_path", str(adapter))
        draw.words.remove("--use_lora")
    else:
        draw = user(rng, here, sandbox, ["--adapter", str(adapter)])
    draw.expected, draw.note = REFUSED, f"{method} {how}"
    if draw.command == "inspect_peft" and method == "lora":
        draw.expected = EITHER
    return draw


@kind(8)
def wrong_checkpoint(rng: random.Random, sandbox: Sandbox, here: Path) -> Draw:
    """A stopped run of which one file is not right, continued."""
    method = rng.choice(list(ADAPTERS))
    out = mutations.copy_of(sandbox.run(method), here, "out")
    (out / "summary.json").unlink()
    files = sorted(path for path in out.rglob("*") if path.is_file())
    note = mutations.spoil_file(rng, rng.choice([path for path in files if "checkpoints" in path.parts] * 2 + files))
    asked = rng.choice([[], [], [str(out / "checkpoints" / "step_1")]])
    draw = finetune(sandbox, here, *ADAPTERS[method], "--resume_from_checkpoint", *asked, "--max_train_steps", "3")
    draw.note = note
    return draw


@kind(2)
def another_run(rng: random.Random, sandbox: Sandbox, here: Path) -> Draw:
    """A stopped run, continued with another value of what makes its result."""
    out = mutations.copy_of(sandbox.run("prompt"), here, "out")
    (out / "summary.json").unlink()
    (out / "checkpoints" / "step_2" / "COMPLETED").unlink()
    draw = finetune(sandbox, here, *ADAPTERS["prompt"], "--resume_from_checkpoint", *rng.choice(CHANGES))
    draw.expected = REFUSED
    draw.keeps = [path for path in out.rglob("*") if path.is_file()]
    return draw


@kind(6)
def taken_output(rng: random.Random, sandbox: Sandbox, here: Path) -> Draw:
    """An output folder in which a user keeps files of any names."""
    out = here / "out"
    names = [
        "model.safetensors",
        "config.json",
        "metrics.jsonl",
        "run.json",
        "summary.json",
        "loss.png",
        "checkpoints/epoch3.ckpt",
        "checkpoints/step_1/mine",
        "checkpoints/step_2.bak",
        "model-00001-of-00002.safetensors",
        "adapter_model.safetensors",
        "notes.txt",
        "evaluation.md",
        "evaluation.png",
        "inspection.md",
        ".lock",
        "checkpoints/data.jsonl",
        "train_subsets.manifest.json",
        "train_subsets.png",
        "auto_lr.json",
        "soft_prompt_start.safetensors",
        "tokenizer.json",
        "rows.manifest.json",
    ]
    for name in rng.sample(names, rng.choice([1, 2, 4])):
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(rng.choice(["mine", "{}", '{"flags": {}}', ""]))
    kept = [path for path in out.rglob("*") if path.is_file()]
    chosen = rng.choice(["finetune", "finetune", "finetune", "evaluate", "inspect", "merge", "subsets", "arrow2json"])
    prompt = ["--adapter", str(sandbox.run("prompt"))]
    if chosen == "finetune":
        flags = rng.choice([[], ["--resume_from_checkpoint"], ["--overwrite_output_dir"], ["--cache_dataset_only"]])
        draw = finetune(sandbox, here, "--max_train_steps", "1", *flags)
    elif chosen == "evaluate":
        file = ["--file", str(sandbox.data), "--max_samples", "2", "--max_new_tokens", "2"]
        draw = Draw("evaluate_peft", [*prompt, *file, "--output_dir", str(out)])
    elif chosen == "inspect":
        draw = Draw("inspect_peft", [*prompt, "--output_dir", str(out)])
    elif chosen == "merge":
        draw = Draw("merge_peft", [*prompt, "--output", str(out)])
    elif chosen == "subsets":
        draw = Draw("sample_subsets", [str(sandbox.data), "--sizes", "5", "-o", str(out)])
    else:
        draw = Draw("arrow2json", [str(sandbox.arrow), "-o", str(out / "rows.jsonl")])
    draw.keeps = kept
    return draw


@kind(3)
def output_is_an_input(rng: random.Random, sandbox: Sandbox, here: Path) -> Draw:
    """The output is a folder that the command reads."""
    model = mutations.copy_of(sandbox.model, here, "model")
    adapter = mutations.copy_of(sandbox.run("prompt"), here, "adapter")
    way = rng.choice(["", "", "link"])
    target = rng.choice([model, adapter])
    out = target
    if way:
        out = here / "link"
        out.symlink_to(target)
    flags = rng.choice([[], ["--overwrite_output_dir"], ["--resume_from_checkpoint"]])
    options = [
        lambda: finetune(sandbox, here, "--model_name_or_path", str(model), "--output_dir", str(model), *flags),
        lambda: finetune(sandbox, here, "--tokenizer_name_or_path", str(model), "--output_dir", str(model), *flags),
        lambda: finetune(sandbox, here, "--config_name", str(model), "--output_dir", str(model), *flags),
        lambda: Draw("merge_peft", ["--adapter", str(adapter), "--output", str(out)]),
    ]
    draw = rng.choice(options)()
    draw.expected = REFUSED
    draw.keeps = [path for folder in (model, adapter) for path in folder.rglob("*") if path.is_file()]
    return draw


@kind(10)
def wrong_yaml(rng: random.Random, sandbox: Sandbox, here: Path) -> Draw:
    """A study or a configuration of which one part is not right."""
    text = study_text(sandbox)
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    values = [
        *mutations.VALUES,
        "!!python/object:os.system {}",
        "!!int abc",
        "!!timestamp 2020-99-99",
        "&a [*a]",
        "*b",
        "{<<: 5}",
        "!!binary x",
        "2020-99-99",
        "0o9",
        "- - -",
        ": :",
        "%",
        "@",
        "`",
        "|",
        ">",
    ]
    if rng.random() < 0.5:
        key = lines[at].split(":")[0]
        lines[at] = f"{key}: {rng.choice(values)}"
    else:
        lines = mutations.mutated_bytes(rng, text.encode()).decode(errors="surrogateescape").splitlines()
    path = here / "study.yaml"
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    if rng.random() < 0.3:
        return Draw("finetune_peft", [str(path)])
    return Draw("study_peft", ["--config", str(path), "--output_dir", str(here / "study"), "--dry_run"])


@kind(2)
def bad_study(rng: random.Random, sandbox: Sandbox, here: Path) -> Draw:
    """A study that can't be run, asked for a dry run: it must say so."""
    bad = rng.choice(BAD_STUDIES)
    key = bad.split(":")[0]
    text = study_text(sandbox)
    if key == "flags":
        text = text.replace("flags:\n", "flags:\n  cache_dataset_only: true\n")
    else:
        text = re.sub(rf"^{key}:.*\n", "", text, flags=re.MULTILINE) + bad + "\n"
    path = here / "study.yaml"
    path.write_text(text)
    words = ["--config", str(path), "--output_dir", str(here / "study"), "--dry_run"]
    return Draw("study_peft", words, REFUSED, bad[:80])


@kind(4)
def damaged_trial(rng: random.Random, sandbox: Sandbox, here: Path) -> Draw:
    """A finished study of which one file is not right, reported."""
    study = mutations.copy_of(sandbox.study, here, "study")
    files = sorted(path for path in study.rglob("*") if path.suffix in (".json", ".jsonl", ".yaml", ".csv"))
    note = mutations.spoil_file(rng, rng.choice(files))
    words = ["--config", str(sandbox.root / "study.yaml"), "--output_dir", str(study), "--report_only"]
    return Draw("study_peft", words, EITHER, note)


@kind(5)
def wrong_template(rng: random.Random, sandbox: Sandbox, here: Path) -> Draw:
    """A chat template that fails, never ends, or writes nothing of the conversation."""
    model = mutations.copy_of(sandbox.model, here, "model")
    template = rng.choice(TEMPLATES)
    (model / "chat_template.jinja").write_text(template)
    words = ["--model_name_or_path", str(model), "--chat_template_name", "tokenizer"]
    if rng.random() < 0.6:
        draw = finetune(sandbox, here, *words, "--cache_dataset_only")
        draw.expected = REFUSED
    else:
        file = ["--input_file", str(sandbox.data), "--output_file", str(here / "answers.jsonl")]
        draw = Draw("generate_peft", [*words, *file, "--max_new_tokens", "2"])
    draw.note = template[:60]
    return draw


@kind(2)
def wrong_pattern(rng: random.Random, sandbox: Sandbox, here: Path) -> Draw:
    """A regular expression of any kind."""
    words = [
        "--adapter",
        str(sandbox.run("prompt")),
        "--file",
        str(sandbox.data),
        "--max_samples",
        "2",
        "--max_new_tokens",
        "2",
    ]
    return Draw("evaluate_peft", [*words, "--answer_regex", rng.choice(PATTERNS)])


@kind(2)
def wrong_lines_of_a_chat(rng: random.Random, sandbox: Sandbox, here: Path) -> Draw:
    """A chat whose user types anything."""
    lines = [
        b"reverse: cat",
        b"\xff\xfe",
        b"",
        b"/",
        b"/no_such",
        b"/use nothing",
        b"/help",
        b"x" * 20000,
        b"\x00",
        b"\x1b[2J",
        "\ud800".encode(errors="surrogatepass"),
        b"/system",
        b"/reset",
    ]
    stdin = b"\n".join(rng.choices(lines, k=4)) + rng.choice([b"", b"\n"])
    return Draw("generate_peft", ["--adapter", str(sandbox.run("prompt")), "--max_new_tokens", "3"], stdin=stdin)


@kind(1)
def right_input(rng: random.Random, sandbox: Sandbox, here: Path) -> Draw:
    """Nothing is wrong: it must be accepted, or the other draws show nothing."""
    way = rng.randrange(5)
    if way == 0:
        draw = finetune(sandbox, here, *ADAPTERS[rng.choice(list(ADAPTERS))])
    elif way == 1:
        draw = reader_of(rng, sandbox, here, sandbox.data)
    elif way == 2:
        draw = converter("arrow2json", sandbox.arrow, here)
    elif way == 3:
        draw = finetune(sandbox, here, "--train_file", str(sandbox.arrow), "--cache_dataset_only")
    else:
        draw = user(rng, here, sandbox, ["--adapter", str(sandbox.run("prompt"))])
    draw.expected = ACCEPTED
    return draw
