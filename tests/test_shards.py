"""Which files hold a source's rows: folders that `datasets` wrote, data sets on the Hub, configurations."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from open_instruct.data import reading, shards
from open_instruct.data.kinds import file_kind
from open_instruct.errors import InputError

QUESTION = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ROWS = [{"id": str(i), "messages": QUESTION} for i in range(6)]


def rows_in(files):
    return [row for _, row in reading.read_files(files)]


def test_a_folder_of_save_to_disk_gives_its_rows_and_not_its_json_files(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=2)
    assert rows_in(reading.files_of(str(tmp_path / "saved"))) == ROWS
    parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "parts")
    assert rows_in(reading.files_of(str(tmp_path / "parts"))) == ROWS
    assert rows_in(reading.files_of(str(tmp_path / "parts"), "test")) == ROWS[:2]
    with pytest.raises(InputError, match="has the splits train, test, not dev"):
        reading.files_of(str(tmp_path / "parts"), "dev")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`load_dataset` with a data set of two configurations, kept as Arrow files as the Hub's are; lists its calls."""
    calls = []

    def load_dataset(name, configuration=None, *, split):
        calls.append((name, configuration, split))
        if name != "org/name" or configuration not in (None, "hard"):
            raise ValueError(f"no {configuration}\nin {name}")
        path = tmp_path / f"{configuration}-{split}.arrow"
        table = pa.Table.from_pylist(ROWS[3:] if configuration == "hard" else ROWS)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return SimpleNamespace(cache_files=[{"filename": str(path)}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_configuration_reaches_the_hub(hub):
    assert rows_in(reading.files_of("org/name")) == ROWS
    assert rows_in(reading.files_of("org/name", "test", "hard")) == ROWS[3:]
    assert hub == [("org/name", None, "train"), ("org/name", "hard", "test")]


@pytest.mark.parametrize(
    "source, split, configuration, says",
    [
        ("org/nothing", "train", None, "no file, folder or data set org/nothing .no None in org/nothing.: check"),
        ("org/name", "train[:10%]", None, "is not the name of one split"),
        ("{folder}/rows.jsonl", "train", "hard", "is on this disk, and configurations .here hard."),
        ("{folder}/rows.arr*", "train", "hard", "is on this disk"),
        ("{folder}", "train", "hard", "is on this disk"),
        ("./nowhere", "train", "hard", "no such file or folder: ./nowhere"),
    ],
)
def test_a_source_that_can_not_be_is_named(source, split, configuration, says, hub, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.raises(InputError, match=says):
        reading.files_of(source.replace("{folder}", str(tmp_path)), split, configuration)


def test_a_data_set_that_is_only_in_memory_is_refused(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: SimpleNamespace(cache_files=[]))
    with pytest.raises(InputError, match="not kept on the disk"):
        shards.hub_files("org/name", "train")


def test_the_kind_of_a_file_is_in_its_first_bytes(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "parquet")
    with pa.OSFile(str(tmp_path / "arrow stream"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "arrow file"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "json array").write_text("\n [" + json.dumps(ROWS[0]) + "]")
    (tmp_path / "json lines").write_text(json.dumps(ROWS[0]))
    for path in tmp_path.iterdir():
        assert file_kind(path) == path.name
    with pa.CompressedOutputStream(str(tmp_path / "rows.json.gz"), "gzip") as sink:
        sink.write(json.dumps(ROWS).encode())
    assert file_kind(tmp_path / "rows.json.gz") == "json array"
    assert rows_in([tmp_path / "rows.json.gz"]) == ROWS


def saved(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("record", ["state.json", "dataset_dict.json"])
@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "5", '"x"', "{}", '{"_data_files": [], "splits": {}}', '{"_data_files": 5, "splits": 5}',
     '{"_data_files": [{}], "splits": [5]}', '{"_data_files": [{"filename": "../x"}], "splits": ["../x"]}',
     '{"_data_files": [{"filename": "/etc/passwd"}], "splits": ["/"]}', "[" * 100_000],
)  # fmt: skip
def test_damaged_records_of_a_saved_folder_are_named(record, content, tmp_path):
    (saved(tmp_path) / record).write_text(content)
    with pytest.raises(InputError, match=record):
        reading.files_of(str(tmp_path / "saved"))


def test_rows_chosen_by_indices_are_not_read_as_all(tmp_path):
    state = json.loads((saved(tmp_path) / "state.json").read_text())
    (tmp_path / "saved" / "state.json").write_text(
        json.dumps({**state, "_indices_data_files": [{"filename": "i.arrow"}]})
    )
    with pytest.raises(InputError, match="chooses rows by indices"):
        reading.files_of(str(tmp_path / "saved"))


def test_a_folder_of_this_projects_tools_is_read_without_its_manifests(tmp_path):
    import arrow2json

    folder = tmp_path / "out"
    assert arrow2json.main([str(saved(tmp_path)), "-o", str(folder / "train.jsonl"), "--shards", "2"]) == 0
    assert rows_in(reading.files_of(str(folder))) == ROWS
    assert rows_in(reading.files_of(str(folder / "*.json*"))) == ROWS


@pytest.mark.parametrize("source", ["{folder}", "{folder}/*.jsonl"])
def test_a_file_and_its_subsets_are_not_read_together(source, tmp_path):
    import sample_subsets

    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert sample_subsets.main([str(tmp_path / "t.jsonl"), "--sizes", "1", "3"]) == 0
    with pytest.raises(InputError, match=r"of which one is a part of the other .t_subsets.manifest.json says so"):
        reading.files_of(source.replace("{folder}", str(tmp_path)))
    (tmp_path / "t.jsonl").unlink()
    (tmp_path / "t_1.jsonl").unlink()
    assert len(rows_in(reading.files_of(str(tmp_path)))) == 3


def test_a_folder_of_json_and_of_tables_is_ambiguous(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]))
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="holds JSON files and tables"):
        reading.files_of(str(tmp_path))


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_the_current_folder(name, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="name of a data file is empty"):
        reading.files_of(name)
    with pytest.raises(InputError, match="name of a data file is empty"):
        shards.find_shards([name])


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".arrow", ".parquet", ".jsonl.gz", ""])
def test_pipes_and_devices_are_refused_at_once(ending, tmp_path):
    os.mkfifo(tmp_path / f"pipe{ending}")
    for path in (tmp_path / f"pipe{ending}", "/dev/zero", "/dev/null"):
        with pytest.raises(InputError, match="is a pipe, socket or device"):
            rows_in(reading.files_of(str(path)) if ending or path == "/dev/zero" else [Path(path)])


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path):
    table = pa.table([pa.array(["q"]), pa.array(["a"]), pa.array(["b"])], names=["prompt", "completion", "completion"])
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(InputError, match="several columns 'completion'"):
        rows_in([tmp_path / "t.arrow"])


def test_a_batch_that_claims_rows_without_bytes_is_refused(tmp_path):
    table = pa.table({"prompt": pa.nulls(10**9)})
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=10**9)
    with pytest.raises(InputError, match="is said to hold 1000000000 rows"):
        rows_in([tmp_path / "t.arrow"])
