"""Whatever a checkpoint's files and names hold: the run continues from a sound one, or one line says why not."""

import json
import math
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from open_instruct.files import sha256
from open_instruct.training.checkpoint import complete_checkpoints, damage
from tests.conftest import without_measurements

RUN = ["--max_train_steps", "4", "--eval_steps", "1", "--per_device_train_batch_size", "4", "--num_virtual_tokens", "4"]
RUN += ["--use_prompt_tuning", "--prompt_tuning_init", "sample_vocab", "--checkpointing_steps", "1"]
RUN += ["--keep_last_n_checkpoints", "-1"]
DEEP = "[" * 900 + "]" * 900


def mark(folder: Path) -> None:
    """Give a checkpoint the right checksums."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != "COMPLETED")
    (folder / "COMPLETED").write_text(json.dumps({name: sha256(folder / name) for name in names}))


@pytest.fixture
def stopped(train) -> Callable[..., Any]:
    """A run that was stopped after step 3 of 4, with a checkpoint of each step; gives what resumes it."""
    full = train("full", *RUN)
    assert full.code == 0, full.err

    def resume(name: str, change: Callable[[Path], object], *flags: str) -> Any:
        folder = full.folder.parent / name
        shutil.copytree(full.folder, folder)
        shutil.rmtree(folder / "checkpoints" / "step_4")
        for file in ("summary.json", "loss.png", "adapter_model.safetensors", "adapter_config.json"):
            (folder / file).unlink(missing_ok=True)
        change(folder / "checkpoints")
        result = train(name, *RUN, "--resume_from_checkpoint", *flags)
        result.is_equal = result.code == 0 and without_measurements(result.metrics) == without_measurements(
            full.metrics
        )
        result.left = {path.parent.name for path in folder.glob("checkpoints/*/trained.safetensors")}
        shutil.rmtree(folder)
        return result

    return resume


def accepted_or_one_line(result: Any, what: object) -> None:
    """Either the uninterrupted run's curve, or exit code 2 and an error of one line."""
    assert "Traceback" not in result.err, (what, result.err)
    if result.code == 0:
        assert result.is_equal, (what, result.err)
    else:
        errors = [line for line in result.err.splitlines() if not line.startswith("warning: ")]
        assert result.code == 2 and len(errors) == 1 and errors[0].startswith("error: "), (what, result.err)


def test_damaged_bytes_are_caught_by_checksums(stopped):
    """Truncated, flipped, emptied, replaced: the checkpoint before is used, or nothing is."""
    rng = random.Random(0)

    def damaged(path: Path, kind: str) -> None:
        content = bytearray(path.read_bytes())
        if kind == "truncated":
            del content[rng.randrange(len(content)) :]
        elif kind == "flipped":
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        else:
            content = bytearray(
                rng.choice([b"", b"null", b"[]", b"{}", b"[" * 10**5, b"9" * 5000, b"\xff", b"\x80\x04N."])
            )
        path.write_bytes(content)

    for number in range(10):
        name = rng.choice(["COMPLETED", "state.json", "trained.safetensors", "optimizer.pt", "best.safetensors"])
        kind = rng.choice(["truncated", "flipped", "replaced"])
        result = stopped(f"run{number}", lambda folder, n=name, k=kind: damaged(folder / "step_3" / n, k))
        assert result.is_equal and "is damaged" in result.err, (name, kind, result.err)


def edited(path: Path, *keys: Any, to: Any) -> None:
    """Change one value of a JSON file."""
    content = json.loads(path.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    if to is KeyError:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = json.loads(to) if isinstance(to, str) else to
    path.write_text(json.dumps(content))


ODD = [
    None,
    True,
    -1,
    10**9,
    10**30,
    1.5,
    math.nan,
    math.inf,
    '"text"',
    "{}",
    "[]",
    '[["a"]]',
    '{"a": 1}',
    DEEP,
    KeyError,
]


def test_edited_states_with_right_checksums_end_in_a_line(stopped):
    """A seeded draw of entries and odd values; those that a run can't have are refused, the rest changes nothing."""
    rng, names = random.Random(1), []

    def change(folder: Path, key: str, value: Any) -> None:
        for step in (1, 2, 3):
            edited(folder / f"step_{step}" / "state.json", "progress", *key.split("."), to=value)
            mark(folder / f"step_{step}")

    def look(folder: Path) -> None:
        progress = json.loads((folder / "step_3" / "state.json").read_text())["progress"]
        names.extend([*progress, *(f"history.{name}" for name in progress["history"]), "identity.learning_rate"])

    assert stopped("look", look).is_equal
    for number in range(16):
        key, value = rng.choice(names), rng.choice(ODD)
        result = stopped(f"run{number}", lambda folder, k=key, v=value: change(folder, k, v))
        assert "Traceback" not in result.err and result.code in (0, 2), (key, value, result.err)
        if key in ("step", "best_step", "history.losses", "identity.learning_rate") and result.code == 0:
            assert value in (None, KeyError), (key, value)
    far = stopped("far", lambda folder: change(folder, "step", 10**9))
    assert far.code == 2 and "at step 1000000000 of 4" in far.err, far.err


def moments(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the optimizer's file."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change a file of parameters."""
    values = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(values)
    save_file(values, path)


def first_of(values: dict[str, torch.Tensor]) -> str:
    return next(iter(values))


PARAMETERS = {
    "renamed": lambda values: values.update(other=values.pop(first_of(values))),
    "missing": lambda values: values.pop(first_of(values)),
    "more": lambda values: values.update(more=torch.zeros(2)),
    "transposed": lambda values: values.update({first_of(values): values[first_of(values)].T.contiguous()}),
    "nan": lambda values: values[first_of(values)].view(-1)[:1].fill_(math.nan),
    "inf": lambda values: values[first_of(values)].view(-1)[:1].fill_(math.inf),
}
MOMENTS = {
    "8-bit": lambda state: state["state"][0].update(state1=state["state"][0].pop("exp_avg")),
    "no second moment": lambda state: state["state"][0].pop("exp_avg_sq"),
    "another shape": lambda state: state["state"][0].update(exp_avg=torch.zeros(3)),
    "another type": lambda state: state["state"][0].update(exp_avg=torch.zeros(4, 64, dtype=torch.int64)),
    "nan": lambda state: state["state"][0]["exp_avg"].fill_(math.nan),
    "step is text": lambda state: state["state"][0].update(step="1"),
    "another parameter": lambda state: state["state"].update({7: state["state"].pop(0)}),
    "text as key": lambda state: state["state"].update(a=1),
    "no state": lambda state: state.pop("state"),
    "state is a list": lambda state: state.update(state=[1]),
}
PICKLES = {
    "no pickle": b"text",
    "empty": b"",
    "a list": pickle.dumps([1, 2]),
    "an object": pickle.dumps(Path("/")),
    "code": b"cos\nsystem\n(S'touch executed'\ntR.",
}


def test_edited_tensors_with_right_checksums_are_refused(stopped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes: dict[str, Callable[[Path], object]] = {}
    for name in ("trained.safetensors", "best.safetensors"):
        for kind in PARAMETERS if name == "trained.safetensors" else ("missing", "nan"):
            change = PARAMETERS[kind]
            changes[f"{name} {kind}"] = lambda folder, n=name, c=change: tensors(folder / n, c)
    for kind, change in MOMENTS.items():
        changes[f"moments {kind}"] = lambda folder, c=change: moments(folder / "optimizer.pt", c)
    for kind, content in PICKLES.items():
        changes[f"pickle {kind}"] = lambda folder, c=content: (folder / "optimizer.pt").write_bytes(c)
    changes["no best"] = lambda folder: (folder / "best.safetensors").unlink()
    for number, (what, change) in enumerate(changes.items()):

        def apply(folder: Path, change=change) -> None:
            change(folder / "step_3")
            mark(folder / "step_3")

        result = stopped(f"run{number}", apply)
        accepted_or_one_line(result, what)
        assert result.code == 2, what
    assert not (tmp_path / "executed").exists()


COPIES = ("step_3.bak", "step_abc", "step_", "step_²", "step_٣", "step_-1", "step_1e9", "STEP_9")


def test_what_lies_beside_the_checkpoints_is_left_alone(stopped):
    """Users keep copies and notes there; only step_N with digits is a checkpoint."""

    def beside(folder: Path) -> None:
        for name in COPIES:
            shutil.copytree(folder / "step_3", folder / name)
        (folder / ".step_2.writing").mkdir()

    result = stopped("run", beside)
    assert result.code == 0, result.err
    assert "resuming after step 3" in result.out
    assert result.left.issuperset(COPIES)


@pytest.mark.parametrize("kind", ["file", "folder", "pipe", "copy"])
def test_later_checkpoints_that_the_run_did_not_write_are_named(stopped, kind):
    """They would be taken for the run's, or pruned instead of its own."""

    def beside(folder: Path) -> None:
        place = folder / "step_77"
        if kind == "file":
            place.write_text("a file")
        elif kind == "copy":
            shutil.copytree(folder / "step_1", place)
        else:
            place.mkdir()
        if kind == "pipe":
            os.mkfifo(place / "COMPLETED")

    result = stopped("run", beside)
    assert result.code == 2 and "step_77" in result.err and result.err.count("error:") == 1


def test_the_checkpoint_that_was_just_written_is_never_pruned(train):
    """Back at an earlier checkpoint, the later ones of the same folder have higher numbers."""
    full = train("run", *RUN, "--keep_last_n_checkpoints", "-1")
    (full.folder / "summary.json").unlink()
    first = full.folder / "checkpoints" / "step_1"
    again = train("run", *RUN, "--keep_last_n_checkpoints", "2", "--resume_from_checkpoint", str(first))
    assert again.code == 0, again.err
    assert [path.name for path in complete_checkpoints(full.folder / "checkpoints")] == ["step_3", "step_4"]
    assert all(damage(path) is None for path in complete_checkpoints(full.folder / "checkpoints"))


@pytest.mark.parametrize("name", ["COMPLETED", "state.json", "metrics.jsonl", "\0", "x" * 300, "/dev/null", ".", ""])
def test_a_path_that_is_no_checkpoint_is_one_line(name, train):
    full = train("run", *RUN)
    path = name if name in ("\0", "/dev/null", ".", "") else str(full.folder / "checkpoints" / "step_2" / name)
    result = train("other", *RUN, "--resume_from_checkpoint", path)
    assert result.code == 2 and result.err.count("\n") == 1, result.err


def test_rows_of_metrics_that_are_none_are_dropped(stopped):
    """In the middle of the file, too; what is left is a part of the uninterrupted curve."""
    odd = [
        "",
        "null",
        "[1]",
        '{"step": "1"}',
        '{"step": 1e400}',
        '{"step": 2, "loss": "x"}',
        "[" * 10**5,
        "\0",
        "9" * 5000,
    ]

    def change(folder: Path) -> None:
        path = folder.parent / "metrics.jsonl"
        lines = path.read_text().splitlines()
        path.write_bytes("\n".join([*odd, *lines, *odd, '{"step": 3, "lo']).encode() + b"\xff\xfe")

    result = stopped("run", change)
    assert result.is_equal, result.err


def test_moments_of_the_8_bit_optimizer_are_restored(train):
    pytest.importorskip("bitsandbytes")
    flags = [*RUN, "--use_8bit_optimizer", "--keep_last_n_checkpoints", "-1", "--num_virtual_tokens", "80"]
    full = train("full", *flags)
    assert full.code == 0, full.err
    again = train("again", *flags, "--resume_from_checkpoint", str(full.folder / "checkpoints" / "step_2"))
    assert again.code == 0, again.err
    assert again.summary["final_eval_loss"] == full.summary["final_eval_loss"]
