"""Rows on a host: verified, cached by content, and split the same way everywhere."""

import datetime
import decimal
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from alto.v1 import placement_pb2
from alto_common.artifacts import ArtifactStore
from alto_common.dataset_rows import read_rows
from alto_common.errors import DomainError
from alto_training.datasets import fetch, split
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def rows_of(path):
    return [line for line in path.read_bytes().splitlines() if line]


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(str(tmp_path / "artifacts"))


def stored(store, content):
    file = store.write("datasets/rows", [content])
    return placement_pb2.Artifact(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256)


def test_a_dataset_is_fetched_once_and_again_when_its_copy_is_damaged(store, tmp_path):
    artifact = stored(store, b'{"text": "a"}\n')
    copy = fetch(store, artifact, tmp_path / "cache")
    copy.write_bytes(b"damaged")
    assert fetch(store, artifact, tmp_path / "cache").read_bytes() == b'{"text": "a"}\n'
    store.delete(artifact.path)
    assert fetch(store, artifact, tmp_path / "cache") == copy


def test_content_that_is_not_what_was_uploaded_is_refused(store, tmp_path):
    artifact = stored(store, b"rows")
    artifact.sha256 = "0" * 64
    with pytest.raises(DomainError, match="SHA-256"):
        fetch(store, artifact, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 12), min_size=2, max_size=40), st.floats(0.01, 0.5))
def test_a_split_loses_nothing_and_keeps_repeated_rows_together(tmp_path, numbers, fraction):
    dataset = tmp_path / "rows"
    rows = [json.dumps({"text": str(number)}).encode() for number in numbers]
    dataset.write_bytes(b"\xef\xbb\xbf" + b"\n\n".join(rows))
    for old in tmp_path.glob("rows.*"):
        old.unlink()
    train, validation = (rows_of(path) for path in split(dataset, fraction, tmp_path))
    assert sorted(train + validation) == sorted(rows)
    assert train
    assert validation
    if len(set(rows)) > 1:
        assert not set(train) & set(validation)
    assert train == [row for row in rows if row in train][: len(train)]


def test_a_split_is_the_same_for_rows_in_another_order(tmp_path):
    rows = [json.dumps({"text": str(number)}).encode() for number in range(50)]
    chosen = []
    for name, order in (("one", rows), ("two", rows[::-1])):
        (tmp_path / name).write_bytes(b"\n".join(order))
        _, validation = split(tmp_path / name, 0.2, tmp_path)
        chosen.append(sorted(rows_of(validation)))
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 10


def test_parquet_is_split_into_rows_that_can_be_read(tmp_path):
    table = pyarrow.table({"prompt": [f"p{i}" for i in range(10)], "completion": [f"c{i}" for i in range(10)]})
    pyarrow.parquet.write_table(table, tmp_path / "rows")
    train, validation = split(tmp_path / "rows", 0.3, tmp_path)
    assert [len(list(read_rows(path))) for path in (train, validation)] == [7, 3]


def test_a_split_is_whole_again_after_its_files_were_cut_short(tmp_path):
    (tmp_path / "rows").write_bytes(b"".join(json.dumps({"text": str(n)}).encode() + b"\n" for n in range(50)))
    files = split(tmp_path / "rows", 0.2, tmp_path)
    whole = [path.read_bytes() for path in files]
    for path, content in zip(files, whole, strict=True):
        path.write_bytes(content[: len(content) // 2])
    assert [path.read_bytes() for path in split(tmp_path / "rows", 0.2, tmp_path)] == whole


def test_nothing_is_left_of_a_split_that_the_disk_has_no_room_for(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    rows = tmp_path / "rows"
    rows.write_bytes(b"".join(json.dumps({"text": "x" * 100 + str(n)}).encode() + b"\n" for n in range(2000)))
    # A limit on the size of files, in a process of its own, is a disk that fills up.
    code = (
        "import resource, signal, sys; from pathlib import Path; from alto_training.datasets import split;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "split(Path(sys.argv[1]), 0.2, Path(sys.argv[2]))"
    )
    ended = subprocess.run([sys.executable, "-c", code, rows, cache], capture_output=True, text=True, check=False)
    assert "File too large" in ended.stderr
    assert list(cache.iterdir()) == []


def test_one_row_cannot_be_split(tmp_path):
    (tmp_path / "rows").write_bytes(b'{"text": "a"}\n')
    with pytest.raises(DomainError, match="at least two"):
        split(tmp_path / "rows", 0.1, tmp_path)


def test_a_row_keeps_its_line_when_a_dataset_is_split(tmp_path):
    lines = ["", *(json.dumps({"text": f"row {n}"}) for n in range(6)), "  ", *(f'{{"text": "{n}"}}' for n in range(5))]
    (tmp_path / "rows").write_text("\n".join(lines))
    for path in split(tmp_path / "rows", 0.4, tmp_path):
        for line, row in read_rows(path):
            assert json.loads(lines[line - 1])["text"] == row.text


def test_parquet_with_empty_fields_and_values_that_json_does_not_know_can_be_split(tmp_path):
    rows = {"prompt": list("abcd"), "completion": list("efgh"), "text": pyarrow.array([None] * 4, pyarrow.string())}
    rows |= {"at": [datetime.datetime(2026, 1, 1)] * 4, "blob": [b"\xff"] * 4, "price": [decimal.Decimal("1.5")] * 4}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "rows")
    train, validation = split(tmp_path / "rows", 0.3, tmp_path)
    read = [row for path in (train, validation) for _, row in read_rows(path)]
    assert sorted((row.prompt, row.completion) for row in read) == list(zip("abcd", "efgh", strict=True))
