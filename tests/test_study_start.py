"""A mistake is answered before anything heavy is imported, and a clone needs no installation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

HEAVY = {"torch", "peft", "accelerate", "datasets", "matplotlib", "ray"}


def start(script: Path, *words: str, cwd: Path, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run a script as a file from another folder, with nothing that helps it to find its package."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *options, str(script), *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


MISTAKES = {
    "--help": (["--help"], 0, "--report_only"),
    "a mistyped flag": (["--cofnig", "s.yaml"], 2, "--config"),
    "a wrong key": (["--config", "wrong.yaml"], 2, "unknown serach, did you mean search?"),
    "a misspelt flag of the trainer": (["--config", "misspelt.yaml"], 2, "did you mean --clip_grad_norm"),
    "a flag of another method": (["--config", "unused.yaml"], 2, "--num_virtual_tokens has no meaning for ia3"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_before_heavy_imports(mistake, tmp_path):
    flags = "flags: {model_name_or_path: m, train_file: t.jsonl}\n"
    (tmp_path / "wrong.yaml").write_text(flags + "methods: [ia3]\nserach: {}\n")
    (tmp_path / "misspelt.yaml").write_text(flags + "methods: {ia3: {clip_grad_nrm: 1}}\n")
    (tmp_path / "unused.yaml").write_text(flags + "methods: {ia3: {num_virtual_tokens: 1}}\n")
    words, code, message = MISTAKES[mistake]
    script = ROOT / "open_instruct" / "study_peft.py"
    result = start(script, *words, cwd=tmp_path, options=("-X", "importtime"))
    lines = result.stderr.splitlines()
    imported = {line.rsplit("|", 1)[1].strip() for line in lines if line.startswith("import time:")}
    assert "open_instruct.study.config" in imported and not imported & HEAVY
    output = result.stdout + "\n".join(line for line in lines if not line.startswith("import time:"))
    assert result.returncode == code and message in output and "Traceback" not in output


def test_a_clone_runs_its_own_modules_without_being_installed(tmp_path):
    """Even where another clone is installed."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "open_instruct", clone / "open_instruct", ignore=shutil.ignore_patterns("__pycache__"))
    with (clone / "open_instruct" / "study" / "config.py").open("a") as file:
        file.write('\nSEARCH_KINDS = ("the clone\'s",)\n')
    (tmp_path / "s.yaml").write_text("methods: [ia3]\nsearch: {kind: gird}\n")
    result = start(clone / "open_instruct" / "study_peft.py", "--config", "s.yaml", cwd=tmp_path)
    assert result.returncode == 2 and "choose the clone's" in result.stderr


def test_an_installed_package_has_the_templates(tmp_path):
    """A wheel's build folder, made without network."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "open_instruct", source / "open_instruct", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.py", source)
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "built")]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    built = {path.name for path in (tmp_path / "built" / "open_instruct" / "study" / "templates").iterdir()}
    assert built == {path.name for path in (ROOT / "open_instruct" / "study" / "templates").iterdir()}
    assert built == {"report.html.j2", "report.md.j2"}
