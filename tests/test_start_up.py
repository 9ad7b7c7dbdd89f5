"""Entry points started as files from a clone that is not installed, in any folder and without PYTHONPATH.

A first answer, be it the help or an error, must not wait for torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from open_instruct import interrupts
from tests.conftest import ROOT, TINY_MODEL

ENTRY_POINTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.py"), *ROOT.glob("open_instruct/*.py"))
    if '__name__ == "__main__"' in path.read_text()
)
REQUIRED = {  # without which a parser complains of something else than the mistyped flag
    "open_instruct/merge_peft.py": ["--output", "out"],
    "open_instruct/study_peft.py": ["--config", "study.yaml"],
    "arrow2json.py": ["x.arrow"],
    "sample_subsets.py": ["x.jsonl"],
}
HEAVY = {"torch", "transformers", "peft", "datasets", "matplotlib"}
# Runs a script as `python SCRIPT …` does, then reports the modules in which it ran.
PROBE = """
import atexit, pathlib, runpy, sys
script, report = sys.argv[1:3]
sys.argv = [script, *sys.argv[3:]]
sys.path[0] = str(pathlib.Path(script).parent)
def write():
    modules = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    lines = [f"{name} {file}" for name, file in sorted(modules.items()) if file]
    pathlib.Path(report).write_text("\\n".join(lines))
atexit.register(write)
runpy.run_path(script, run_name="__main__")
"""


def start(script: str, *words: str, cwd: Path) -> tuple[subprocess.CompletedProcess, dict[str, str]]:
    """Run a script in `cwd`, without PYTHONPATH; return the result, and the file of each module that it imported."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    report = cwd / "modules.txt"
    command = [sys.executable, "-c", PROBE, str(ROOT / script), str(report), *words]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    return result, dict(line.split(" ", 1) for line in report.read_text().splitlines())


def check_imports(script: str, modules: dict[str, str]) -> None:
    """The modules of this project are this clone's, and nothing heavy is among the others."""
    own = {name: file for name, file in modules.items() if name.partition(".")[0] == "open_instruct"}
    assert own and all(Path(file).is_relative_to(ROOT / "open_instruct") for file in own.values()), own
    assert not sorted(HEAVY & {name.partition(".")[0] for name in modules})


def check_error(result: subprocess.CompletedProcess, text: str) -> None:
    """Exit code 2, and one line that names what is wrong."""
    assert result.returncode == 2, result.stderr
    assert text in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_every_tool_answers_signals_from_its_first_import():
    assert {Path(script).name for script in ENTRY_POINTS} == set(interrupts.TOOLS)
    for script in ENTRY_POINTS:
        imports = [line for line in (ROOT / script).read_text().splitlines() if line.startswith("import open_instruct")]
        assert imports[:1] and "interrupts" in imports[0], script


@pytest.mark.parametrize("script", ENTRY_POINTS)
def test_help_comes_before_heavy_imports(script, tmp_path):
    result, modules = start(script, "--help", cwd=tmp_path)
    assert result.returncode == 0 and "usage:" in result.stdout, result.stderr
    check_imports(script, modules)


@pytest.mark.parametrize("script", ENTRY_POINTS)
def test_a_mistyped_flag_is_one_line_before_heavy_imports(script, tmp_path):
    result, modules = start(script, *REQUIRED.get(script, []), "--no_such_flag", cwd=tmp_path)
    check_error(result, "--no_such_flag")
    check_imports(script, modules)


ADAPTER = "--adapter {adapter}"
WRONG = {
    "generate: value": ("generate", f"{ADAPTER} --top_p 2", "--top_p: 2 is not a number from"),
    "generate: seed": ("generate", f"{ADAPTER} --seed -1", "-1 is not a whole number of at least 0"),
    "generate: adapter": ("generate", "--adapter ./missing", "no such adapter folder: ./missing"),
    "generate: file": (
        "generate",
        f"{ADAPTER} --input_file missing.jsonl --output_file o.jsonl",
        "no such file: missing.jsonl",
    ),
    "generate: base": ("generate", "", "no base model is known"),
    "evaluate: value": ("evaluate", f"{ADAPTER} --file x.jsonl --answer_regex (", "give a regular expression"),
    "evaluate: adapter": ("evaluate", "--file x.jsonl --adapter ./missing", "no such adapter folder: ./missing"),
    "evaluate: file": ("evaluate", f"{ADAPTER} --file missing.jsonl", "no such file: missing.jsonl"),
    "inspect: value": ("inspect", f"{ADAPTER} --rows 0", "0 is not a whole number of at least 1"),
    "inspect: adapter": ("inspect", "--adapter ./missing", "no such adapter folder: ./missing"),
    "inspect: file": ("inspect", f"{ADAPTER} --file missing.jsonl", "no such file: missing.jsonl"),
    "inspect: method": ("inspect", "--adapter {lora}", "is LoRA, which has no virtual tokens"),
    "merge: adapter": ("merge", "--adapter ./missing --output out", "no such adapter folder: ./missing"),
    "merge: output": ("merge", f"{ADAPTER} --output .", "--output . exists already"),
    "merge: method": ("merge", "--adapter {lora} --adapter {prefix} --output out", "only soft prompts go together"),
    "merge_lora: value": ("merge_lora", "--lora_model_name_or_path a --lora_model_name_or_path b", "name one adapter"),
    "merge_lora: adapter": ("merge_lora", "--lora_model_name_or_path ./missing", "no such adapter folder: ./missing"),
    "merge_lora: quantised": (
        "merge_lora",
        "--lora_model_name_or_path {recorded} --output_dir out --qlora",
        "was trained on a base in full precision, not in 4bit",
    ),
    "merge: base": ("merge", f"{ADAPTER} --output out --model_name_or_path x/y", "was trained on"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_and_missing_files_are_one_line_before_heavy_imports(case, tmp_path):
    from tests.test_folders import write_adapter

    folders = {
        name: write_adapter(tmp_path / name, peft_type=peft_type, base_model_name_or_path=str(TINY_MODEL))
        for name, peft_type in (("adapter", "PROMPT_TUNING"), ("lora", "LORA"), ("prefix", "PREFIX_TUNING"))
    }
    folders["recorded"] = write_adapter(
        tmp_path / "recorded", peft_type="LORA", base_model_name_or_path=str(TINY_MODEL)
    )
    (folders["recorded"] / "run.json").write_text('{"flags": {"use_qlora": {"value": false, "origin": "default"}}}')
    tool, words, text = WRONG[case]
    script = f"open_instruct/{tool}.py" if tool == "merge_lora" else f"open_instruct/{tool}_peft.py"
    result, modules = start(script, *words.format(**folders).split(), cwd=tmp_path)
    check_error(result, text)
    check_imports(script, modules)
