"""README.md and README.zh-CN.md name the same commands, and everything that they name exists."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import ROOT

ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
READMES = pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=lambda path: path.name)
MAX_LINES = 120
TOOLS = sorted([*ROOT.glob("open_instruct/*_peft.py"), ROOT / "arrow2json.py", ROOT / "sample_subsets.py"])
# Flags of other programs, and files of other projects or of the user.
FOREIGN_FLAGS = {"--num_processes"}
FOREIGN_FILES = {"finetune.py", "run.yaml", "my.jsonl", "heldout.jsonl"}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAG = re.compile(r"(?<![\w-])--[a-z]\w*")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"(?<![\w./-])[\w./-]+\.(?:py|sh|md|yaml|json|jsonl|sbatch|svg|png|safetensors)(?![\w-])")


def code_lines(text: str) -> list[str]:
    """Return the lines of all code blocks in order, each without its comment and trailing blanks."""
    lines = []
    for language, block in FENCE.findall(text):
        for line in block.splitlines():
            code = re.sub(r"(^|\s)#.*", "", line) if language == "bash" else line
            if code.strip():
                lines.append(code.rstrip())
    return lines


def inline_code(text: str) -> Counter[str]:
    """Count the words in backticks outside of code blocks."""
    return Counter(re.findall(r"`([^`\n]+)`", FENCE.sub("", text)))


def links(text: str) -> Counter[str]:
    """Count the targets of links and pictures; the link from each README to the other is left out."""
    return Counter(target for target in LINK.findall(text) if target not in (ENGLISH.name, CHINESE.name))


def differences(english: str, chinese: str) -> list[str]:
    """Return one line for each difference between the commands, names, links and sections of two READMEs."""
    problems = []
    if code_lines(english) != code_lines(chinese):
        changed = sorted(set(code_lines(english)) ^ set(code_lines(chinese)))
        problems.append(f"code blocks differ: {changed or 'in order or number of lines'}")
    for name, count in (("inline code", inline_code), ("links", links)):
        only_english, only_chinese = count(english) - count(chinese), count(chinese) - count(english)
        if only_english or only_chinese:
            problems.append(f"{name} only in English: {dict(only_english)}, only in Chinese: {dict(only_chinese)}")
    if outline(english) != outline(chinese):
        problems.append("sections differ in their code blocks, tables or links")
    return problems


def outline(text: str) -> list[tuple[int, int, list[str]]]:
    """Return (number of code blocks, number of table rows, links) of each section, in order."""
    sections = re.split(r"^## ", FENCE.sub("```", text), flags=re.MULTILINE)
    return [(part.count("```"), len(re.findall(r"^\|", part, re.MULTILINE)), sorted(links(part))) for part in sections]


def known_flags() -> set[str]:
    """Return every flag of the trainer (docs/flags.md) and of the tools (their source), with leading dashes."""
    trainer = re.findall(r"^\| `(?:--)?(\w+)` \|", (ROOT / "docs" / "flags.md").read_text(), re.MULTILINE)
    sources = "\n".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("open_instruct/**/*.py")])
    tools = re.findall(r"add_argument\(\s*(?:\"-\w\",\s*)?\"(--\w+)\"", sources)
    return {f"--{name}" for name in trainer} | set(tools)


def missing(text: str) -> list[str]:
    """Return the flags, files and link targets in a README that do not exist."""
    flags = set(FLAG.findall(text)) - known_flags() - FOREIGN_FLAGS
    targets = {target for target in LINK.findall(text) if not target.startswith("https://")}
    files = {name for name in FILE.findall(re.sub(r"https://\S+", "", text)) if not name.startswith("output/")}
    of_a_run = FILE.findall((ROOT / "docs" / "output.md").read_text())
    files = (files | targets) - FOREIGN_FILES - set(of_a_run)
    return sorted(flags) + sorted(name for name in files if not exists(name))


def exists(name: str) -> bool:
    """Say whether the repository has this path or, for a bare name, an entry point of this name."""
    return (ROOT / name).exists() or any(path.name == name for path in TOOLS)


def test_both_name_the_same_commands():
    assert differences(ENGLISH.read_text(), CHINESE.read_text()) == []


@READMES
def test_everything_that_is_named_exists(readme):
    assert missing(readme.read_text()) == []


@READMES
def test_it_is_short(readme):
    lines = readme.read_text().splitlines()
    assert len(lines) <= MAX_LINES
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


@READMES
def test_it_links_the_other_at_the_top(readme):
    other = CHINESE if readme == ENGLISH else ENGLISH
    assert f"]({other.name})" in "".join(readme.read_text().splitlines()[:4])


DOCTORED = {
    "a flag in a code block": ("--num_virtual_tokens 50", "--num_virtual_tokens 20"),
    "a lost line of a code block": ("bash scripts/run_tests.sh", "# bash scripts/run_tests.sh"),
    "an output": ("tuned 100% of 50", "tuned 99% of 50"),
    "an inline command": ("`pip install -e .`", "`pip install .`"),
    "an inline flag": ("`--dry_run`", "dry_run"),
    "a link": ("(docs/packing.md)", "(docs/data.md)"),
    "a table row": ("| `run.json` |", "`run.json`:"),
}


@pytest.mark.parametrize("change", DOCTORED)
def test_a_doctored_translation_is_noticed(change):
    before, after = DOCTORED[change]
    text = CHINESE.read_text()
    assert before in text
    assert differences(ENGLISH.read_text(), text.replace(before, after, 1))


@pytest.mark.parametrize(
    "change", ["--no_such_flag", "scripts/no_such_script.sh", "docs/no_such_page.md", "no_such.py"]
)
def test_a_name_that_does_not_exist_is_noticed(change):
    assert missing(f"{ENGLISH.read_text()}\nUse `{change}`.\n") == [change]


def test_guides_link_only_what_exists():
    pages: list[Path] = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]
    broken = [
        (str(page.relative_to(ROOT)), target)
        for page in pages
        for target in LINK.findall(page.read_text())
        if not target.startswith("https://") and not (page.parent / target.partition("#")[0]).exists()
    ]
    assert broken == []
