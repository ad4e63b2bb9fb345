"""Rows from files: told apart by their columns, refused with file and line where they are damaged."""

import gzip
import hashlib
import json
import lzma
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rankwise.errors import DataError
from rankwise.workflows.config import RunConfig
from rankwise.workflows.data import RunData, load_data

Row = Mapping[str, Any]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_rows(path: Path, rows: Sequence[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(train: str | Path, task: str = "causal-lm", seed: int = 0, **data: Any) -> RunData:
    values = {"model": "m", "task": task, "data": {"train": str(train), **data}, "training": {"seed": seed}}
    return load_data(RunConfig.model_validate(values))


TEXT = [{"text": f"row {number}"} for number in range(10)]
LABELED = [{"text": f"row {number}", "label": "ab"[number % 2]} for number in range(10)]


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.parquet", "r.jsonl.gz", "r.jsonl.xz"]
)
def test_every_allowed_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    lines = "".join(json.dumps(row) + "\n" for row in LABELED)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".xz"):
        path.write_bytes(lzma.compress(lines.encode()))
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(LABELED), path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(LABELED))
    elif name.endswith("sv"):
        separator = "," if name.endswith(".csv") else "\t"
        path.write_text(
            "".join(separator.join(row) + "\n" for row in [("text", "label"), *(r.values() for r in LABELED)])
        )
    else:
        path.write_text(lines)
    found = load(path, "classification")
    assert found.train[:] == {"text": [row["text"] for row in LABELED], "label": [n % 2 for n in range(10)]}
    assert found.label_names == ("a", "b")
    source = found.sources["train"]
    assert (source.rows, source.columns) == (10, ("text", "label"))
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"text": "a"}, "text"),
        ({"prompt": "a", "completion": "b"}, "prompt-completion"),
        ({"prompt": "a", "completion": "b", "text": "c"}, "prompt-completion"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages"),
    ],
)
def test_the_columns_tell_the_form_and_others_are_left_out(tmp_path: Path, row: Row, form: str) -> None:
    found = load(write_rows(tmp_path / "rows.jsonl", [{**row, "id": 1}, {**row, "id": 2}]))
    assert found.form == form
    assert "id" not in found.train.column_names


def test_missing_columns_are_answered_with_the_columns_that_are_there(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"body": "a", "kind": "b"}])
    with pytest.raises(DataError, match=r"has the columns body, kind; causal-lm needs 'text', or 'prompt' and"):
        load(path)
    with pytest.raises(DataError, match=r"no column 'text' and no column 'label'.*it has body, kind"):
        load(path, "classification")
    found = load(path, "causal-lm", dataset_text_field="body")
    assert found.train.column_names == ["body"]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b", \n{"text": "c"}\n')
    with pytest.raises(DataError, match=rf"{path}:2: not valid JSON at column 14"):
        load(path)
    path.write_text('{"text": "a"}\n["b"]\n')
    with pytest.raises(DataError, match=rf"{path}:2: a row must be an object with named columns, got list"):
        load(path)


def test_a_damaged_file_of_another_kind_says_what_its_reader_found(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 this is no parquet file")
    with pytest.raises(DataError, match=r"cannot read .*rows\.parquet"):
        load(path)
    (tmp_path / "rows.csv").write_text('text,label\n"a,b\n')
    with pytest.raises(DataError, match=r"cannot read .*rows\.csv"):
        load(tmp_path / "rows.csv", "classification")


def test_empty_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("")
    with pytest.raises(DataError, match=r"rows.jsonl is empty \(0 bytes\)"):
        load(path)
    (tmp_path / "rows.csv").write_text("text,label\n")
    with pytest.raises(DataError, match="holds no row"):
        load(tmp_path / "rows.csv", "classification")


def test_missing_paths_are_refused_without_asking_the_hub(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.train: .*none.jsonl does not exist; give a file, a folder or a hub id"):
        load(tmp_path / "none.jsonl")
    path = write_rows(tmp_path / "rows.jsonl", TEXT)
    with pytest.raises(DataError, match=r"data.test: .*none.jsonl does not exist"):
        load(path, test="none.jsonl")


def test_an_unknown_kind_of_file_is_refused_with_the_allowed_ones(tmp_path: Path) -> None:
    (tmp_path / "rows.docx").write_text("text")
    with pytest.raises(DataError, match=r"allowed are \.jsonl"):
        load(tmp_path / "rows.docx")


def test_rows_without_a_value_are_refused_with_the_first_row(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": None}, {"text": None}])
    with pytest.raises(DataError, match=r"2 rows have no 'text', the first is row 2"):
        load(path)


@pytest.mark.parametrize(
    ("row", "task", "message"),
    [
        ({"text": 3}, "causal-lm", "column 'text' holds int64; expected text"),
        ({"text": "a", "label": 0.5}, "classification", "column 'label' holds float64; expected text or whole numbers"),
        ({"messages": "hello"}, "causal-lm", r"column 'messages' holds string; expected a list of {role, content}"),
    ],
)
def test_columns_of_a_wrong_kind_are_refused(tmp_path: Path, row: Row, task: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(write_rows(tmp_path / "rows.jsonl", [row, row]), task)


def test_labels_are_numbered_in_sorted_order_and_keep_their_names(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": label} for label in (30, 10, 20, 10)]
    found = load(write_rows(tmp_path / "rows.jsonl", rows), "classification")
    assert list(found.train["label"]) == [2, 0, 1, 0]
    assert found.label_names == ("10", "20", "30")


def test_a_label_that_training_never_sees_is_refused(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", LABELED)
    test = write_rows(tmp_path / "test.jsonl", [{"text": "x", "label": "c"}])
    with pytest.raises(DataError, match=r"data.test: labels that no training row has: 'c' \(1 in all\)"):
        load(train, "classification", test=test)


def test_one_label_is_not_a_classification(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="every row has the label 'a'"):
        load(write_rows(tmp_path / "rows.jsonl", [{"text": "x", "label": "a"}] * 3), "classification")


def test_a_share_is_set_aside_by_the_seed_and_no_row_is_lost(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", TEXT)
    first, again, other = (load(path, seed=seed, validation=0.3) for seed in (0, 0, 1))
    assert first.validation is not None
    assert again.validation is not None
    assert other.validation is not None
    assert len(first.validation) == 3
    assert sorted([*first.train["text"], *first.validation["text"]]) == [row["text"] for row in TEXT]
    assert list(first.validation["text"]) == list(again.validation["text"]) != list(other.validation["text"])


def test_a_share_that_is_no_row_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", TEXT)
    with pytest.raises(DataError, match=r"0\.01 of 10 rows is 0 rows"):
        load(path, validation=0.01)


def test_a_folder_gives_each_part_by_the_names_of_its_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "train-0.jsonl", TEXT[:4])
    write_rows(tmp_path / "train-1.jsonl", TEXT[4:6])
    write_rows(tmp_path / "valid.jsonl", TEXT[6:7])
    found = load(tmp_path, validation=str(tmp_path))
    assert found.validation is not None
    assert (len(found.train), len(found.validation)) == (6, 1)
    with pytest.raises(DataError, match=r"data.test: no file of .* has 'test' in its name; it holds train-0.jsonl"):
        load(tmp_path, test=str(tmp_path))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        load(tmp_path / "empty")


def test_the_library_is_left_as_it_was_found(tmp_path: Path) -> None:
    import datasets

    before = (datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled())
    load(write_rows(tmp_path / "rows.jsonl", TEXT))
    with pytest.raises(DataError):
        load(tmp_path / "none.jsonl")
    assert (datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()) == before
