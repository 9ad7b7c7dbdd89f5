"""The examples of docs/use.md print what the page says."""

import os
import re
import subprocess
import sys

from tests.conftest import ROOT


def test_the_examples_of_the_guide_print_what_it_says(tmp_path):
    text = (ROOT / "docs" / "use.md").read_text()
    for name in ("assets", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = re.search(r"    python open_instruct/finetune_peft.py((?:.*\\\n)*.*output/reverse)", text)
    assert command
    words = command.group(1).replace("\\\n", " ").split()
    subprocess.run(
        [sys.executable, str(ROOT / "open_instruct" / "finetune_peft.py"), *words],
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    examples = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 3
    for program, printed in examples:
        result = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.stdout == printed, result.stderr
