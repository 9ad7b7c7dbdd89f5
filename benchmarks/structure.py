"""Count what keeps the control side readable: who sees the raw flags, who names methods, how deep the loop lies.

    python -m benchmarks.structure

The bounds are those of CONTRIBUTING.md; exit code 1 if one is exceeded. Frames are counted in a real run of one step.
"""

from __future__ import annotations

import ast
import contextlib
import io
import subprocess
import sys
import tempfile
import traceback
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "open_instruct"
ENTRY_NAMES = {"main", "run", "parse", "build_parser"}
BOUNDS = {
    "functions that take the raw flags": 6,
    "writes to flags after parsing": 0,
    "comparisons with a method's name outside methods/": 0,
    "names defined in more than one module": 5,
    "lines over 120 columns": 0,
    "modules over 400 lines": 0,
    "frames between main and the model's forward": 3,
}


def main() -> int:
    """Print every count beside its bound."""
    counts = {**count_source(), "frames between main and the model's forward": frames()}
    for name, places in counts.items():
        mark = "ok" if len(places) <= BOUNDS[name] else "TOO MANY"
        print(f"{name:52} {len(places):3} (at most {BOUNDS[name]})  {mark}")
        for place in places:
            print(f"    {place}")
    return int(any(len(places) > BOUNDS[name] for name, places in counts.items()))


def count_source() -> dict[str, list[str]]:
    """Return the places that each count counts, from the package's source."""
    from open_instruct.flags import METHOD_NAMES
    from open_instruct.methods import METHODS

    method_names = {*METHOD_NAMES, *(kind for method in METHODS.values() for kind in method.peft_types)} - {"full"}
    takers, writes, comparisons, definitions, modules = [], [], [], defaultdict(list), []
    for path in sorted(PACKAGE.rglob("*.py")):
        name, text = str(path.relative_to(ROOT)), path.read_text()
        tree = ast.parse(text)
        modules += [f"{name}: {len(text.splitlines())}"] if len(text.splitlines()) > 400 else []
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in ENTRY_NAMES:
                definitions[node.name].append(name)
        for node in ast.walk(tree):
            place = f"{name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.FunctionDef) and "flags/" not in name:
                annotations = [ast.unparse(a.annotation) for a in node.args.args if a.annotation]
                takers += [f"{place} {node.name}"] if "Flags" in annotations else []
            if isinstance(node, ast.Call) and ast.unparse(node).startswith(("setattr(flags", "object.__setattr__(")):
                writes.append(place)
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "flags"
            ):
                writes.append(place)
            if isinstance(node, ast.Compare) and "methods/" not in name:
                constants = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
                comparisons += [place] if constants & method_names else []
    tracked = subprocess.check_output(["git", "ls-files", "*.py", "*.sh", "*.toml"], cwd=ROOT, text=True).split()
    long_lines = [
        f"{name}:{number}"
        for name in tracked
        for number, line in enumerate((ROOT / name).read_text().splitlines(), start=1)
        if len(line) > 120
    ]
    twice = [f"{name}: {', '.join(files)}" for name, files in definitions.items() if len(files) > 1]
    lists = (takers, writes, comparisons, twice, long_lines, modules)
    return dict(zip(BOUNDS, lists, strict=False))


def frames() -> list[str]:
    """Return this project's functions between `main` and the forward pass of the model, in a real run of one step."""
    from open_instruct import finetune_peft
    from open_instruct.model.training_model import PackedModel

    stacks: list[list[str]] = []
    forward = PackedModel.forward

    def recording(self: PackedModel, *args: object, **inputs: object) -> object:
        stack = traceback.extract_stack()
        own = [frame.name for frame in stack if Path(frame.filename).is_relative_to(PACKAGE)]
        stacks.append(own[own.index("main") + 1 :])
        return forward(self, *args, **inputs)

    PackedModel.forward = recording  # type: ignore[method-assign, assignment]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        words = ["--model_name_or_path", str(ROOT / "assets" / "tiny-model"), "--use_lora", "--dataset_skip_cache"]
        words += ["--train_file", str(ROOT / "data" / "sample" / "train.jsonl"), "--output_dir", folder]
        words += ["--max_train_steps", "1", "--num_sample_answers", "0", "--overwrite_output_dir"]
        try:
            code = finetune_peft.main(words)
        finally:
            PackedModel.forward = forward  # type: ignore[method-assign]
    assert code == 0
    return next(stack for stack in stacks if "step_gradient" in stack)


if __name__ == "__main__":
    sys.exit(main())
