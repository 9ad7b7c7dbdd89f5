"""Outputs of the tools and of studies: files of others survive, two processes don't mix, nothing is left unsaid."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

import sample_subsets
from open_instruct import InputError
from open_instruct.adapters import answering, folders, merging
from open_instruct.locks import Occupied
from open_instruct.report import pictures
from open_instruct.report.result_files import result_folder, write_result
from open_instruct.study import config, folder, plots
from tests.conftest import ROOT, write_conversations
from tests.test_folders import write_adapter


def a_study(path: Path, name: str, output_dir: Path) -> config.Study:
    """Write a study's file and read it."""
    path.write_text(f"name: {name}\noutput_dir: {output_dir}\nflags: {{}}\nmethods: [ia3]\n")
    return config.read_study(path)


@pytest.mark.parametrize("name", folder.FILES)
def test_a_study_replaces_only_its_own_files(name, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("precious")
    study = a_study(tmp_path / "s.yaml", "s", out)
    with pytest.raises(Occupied, match=f"holds {name}, which no study made"), folder.opened(study, (0, 1)):
        pass
    assert (out / name).read_text() == "precious" and os.listdir(out) == [name]
    (out / name).unlink()
    with folder.opened(study, (0, 1)):
        (out / name).write_text("its own")
        with pytest.raises(Occupied, match="is in use by process"), folder.opened(study, (0, 1)):
            pass
        with folder.opened(study, (0, 2)), folder.opened(study, (1, 2)):  # shards run at the same time
            pass
    with folder.opened(study, (0, 1)):
        pass
    with (
        pytest.raises(Occupied, match="holds the study s"),
        folder.opened(a_study(tmp_path / "t.yaml", "t", out), (0, 1)),
    ):
        pass


def test_a_study_in_the_folder_of_its_file_keeps_that(tmp_path):
    study = a_study(tmp_path / "study.yaml", "s", tmp_path)
    before = (tmp_path / "study.yaml").stat().st_mtime_ns
    with folder.opened(study, (0, 1)):
        pass
    assert (tmp_path / "study.yaml").stat().st_mtime_ns == before


def test_every_picture_of_a_study_is_among_its_files():
    source = Path(plots.__file__).read_text()
    assert all(f'"{name}"' in source for name in folder.PICTURES) and source.count('.png"') == len(folder.PICTURES)


@pytest.mark.parametrize("kind", ["evaluation", "inspection"])
@pytest.mark.parametrize("ending", ["md", "json", "png"])
def test_a_result_replaces_nothing(kind, ending, tmp_path):
    (tmp_path / f"{kind}.{ending}").write_text("precious")
    with pytest.raises(InputError, match=f"holds an {kind}"), result_folder(str(tmp_path), kind):
        pass
    assert os.listdir(tmp_path) == [f"{kind}.{ending}"]


def test_a_result_is_written_without_its_picture(tmp_path, capsys):
    def plot(result, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    name = str(tmp_path / "new")
    with result_folder(name, "evaluation"):
        with pytest.raises(Occupied), result_folder(name, "evaluation"):
            pass
        write_result(name, "evaluation", "text", plot, {"a": 1})
    assert sorted(os.listdir(name)) == ["evaluation.json", "evaluation.md"]
    assert "evaluation.png could not be drawn" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["x/..", "..", ".", "nowhere", "file/merged", "file", "taken"])
def test_an_output_of_a_merge_is_checked_before_anything_is_computed(output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("taken").mkdir()
    Path("nowhere").symlink_to("nothing")
    adapter = folders.read_folder("a", str(write_adapter(tmp_path / "a")))
    with pytest.raises(InputError, match=f"--output {output} (exists already|can't be made)"):
        folders.check_mergeable([adapter], output)
    folders.check_mergeable([adapter], "new/merged")


def test_a_merged_model_takes_another_name_if_its_own_is_taken_meanwhile(tmp_path, capsys):
    assert merging.free_name(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    (tmp_path / "a-2").mkdir()
    assert merging.free_name(tmp_path / "a") == tmp_path / "a-3" and "the result is in" in capsys.readouterr().err


def test_answers_have_one_writer_and_replace_nothing(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    with answering.locked_output(path):
        assert answering.prepare_output(path, {"seed": 1}, resume=False) == 0
        with pytest.raises(Occupied), answering.locked_output(path):
            pass
    assert sorted(os.listdir(tmp_path / "new")) == ["answers.jsonl", "answers.jsonl.run.json"]
    (tmp_path / "a.jsonl.run.json").write_text('{"precious": 1}')
    with pytest.raises(InputError, match="which is not of such a run"):
        answering.prepare_output(tmp_path / "a.jsonl", {"seed": 1}, resume=False)
    for name in ("new", "/dev/null", str(tmp_path / "a.jsonl.run.json" / "answers")):
        with pytest.raises(InputError), answering.locked_output(tmp_path / name):
            pass


def test_subsets_of_other_sizes_do_not_replace_the_manifest_of_the_first(tmp_path, capsys, monkeypatch):
    data = write_conversations(tmp_path / "t.jsonl", "reverse", 20)
    assert sample_subsets.main([str(data), "--sizes", "5"]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert sample_subsets.main([str(data), "--sizes", "6"]) == 2
    assert "t_subsets.manifest.json exists: pass --overwrite" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(sample_subsets, "write_json", full)
    assert sample_subsets.main([str(data), "--sizes", "6", "-o", str(tmp_path / "out")]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert "t_6.jsonl: complete, but without t_subsets.manifest.json" in warning and error.startswith("error: ")


def test_an_interrupted_conversion_leaves_nothing(tmp_path):
    """Interrupted as soon as bytes are on the disk, twice, as an impatient user does."""
    table = pa.table({"text": ["some text " * 20] * 200_000})
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    words = [
        sys.executable,
        str(ROOT / "arrow2json.py"),
        str(tmp_path / "t.arrow"),
        "-o",
        str(tmp_path / "o" / "t.jsonl"),
    ]
    process = subprocess.Popen([*words, "--compression", "gzip"], stderr=subprocess.PIPE, text=True)
    while not any(path.stat().st_size for path in (tmp_path / "o").glob(".*.writing")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130, error
    assert error.endswith("interrupted: nothing half-written remains\n") and os.listdir(tmp_path / "o") == []


def test_names_of_files_are_drawn_as_they_are():
    assert pictures.literal("a\nb \udcff $x^$") == "a b ? $x^$" and len(pictures.literal("x" * 100_000)) == 100
