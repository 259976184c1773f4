"""Dataset files: every format is read, every fault is named by its line, nothing a file holds crashes the reader."""

import json
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from alto_common.dataset_rows import (
    AlpacaRow,
    DatasetError,
    DatasetLimits,
    Message,
    MessagesRow,
    PreferenceRow,
    PromptCompletionRow,
    RowFormat,
    TextRow,
    check_objective,
    read_rows,
    scan,
)
from alto_common.tuning import Objective, ObjectiveKind
from hypothesis import given
from hypothesis import strategies as st

GOOD = {"prompt": "2 + 2 = ", "completion": "4"}
SAMPLES = {
    RowFormat.TEXT: ({"text": "hello"}, TextRow("hello")),
    RowFormat.PROMPT_COMPLETION: ({"prompt": "", "completion": "b", "id": 7}, PromptCompletionRow("", "b")),
    RowFormat.MESSAGES: (
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        MessagesRow((Message("user", "hi"), Message("assistant", "ho"))),
    ),
    RowFormat.ALPACA: ({"instruction": "add", "output": "3"}, AlpacaRow("add", "", "3")),
    RowFormat.PREFERENCE: ({"prompt": "p", "chosen": "c", "rejected": "r"}, PreferenceRow("p", "c", "r")),
}


def write(folder: Path, *rows: object) -> Path:
    path = folder / "data.jsonl"
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def faults(path: Path, limits: DatasetLimits | None = None) -> list[tuple[str, object, str]]:
    with pytest.raises(DatasetError) as caught:
        scan(path, limits)
    return [(violation.field, violation.value, violation.cure) for violation in caught.value.violations]


@pytest.mark.parametrize("row_format", RowFormat)
def test_each_format_is_read_from_jsonl_and_parquet(tmp_path: Path, row_format: RowFormat) -> None:
    raw, expected = SAMPLES[row_format]
    jsonl = write(tmp_path, raw)
    parquet = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([raw]), parquet)
    for path in (jsonl, parquet):
        assert list(read_rows(path)) == [(1, expected)]
        assert scan(path).format is row_format


def test_facts_count_rows_duplicates_and_bytes(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, b"", {**GOOD, "id": 3}, {**GOOD, "completion": "5"})
    facts = scan(path)
    assert (facts.rows, facts.duplicates, facts.bytes) == (3, 1, path.stat().st_size)
    assert facts.longest_row_characters == len(json.dumps({**GOOD, "id": 3}))
    assert [line for line, _ in read_rows(path)] == [1, 3, 4]


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n" + json.dumps(GOOD).encode())
    assert scan(path).rows == 2


@pytest.mark.parametrize(
    ("bad", "field", "cure"),
    [
        (b'{"prompt": "a", ', "line[2]", "one whole JSON object a line"),
        (b'[{"prompt": "a", "completion": "b"}]', "line[2]", "array around the rows"),
        (b'"text"', "line[2]", "bare value"),
        (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "line[2]", "twice"),
        (b'{"prompt": "caf\xe9", "completion": "b"}', "line[2]", "UTF-8 (byte 16"),
        ({"prompt": "a"}, "line[2].completion", "add the missing field"),
        ({"question": "a"}, "line[2]", "give a row as {text}"),
        ({}, "line[2]", "give a row as {text}"),
        ({"prompt": "a", "completion": "  \n"}, "line[2].completion", "not empty"),
        ({"prompt": 3, "completion": "b"}, "line[2].prompt", "a string, not a number"),
        ({"prompt": "a", "completion": None}, "line[2].completion", "add the missing field"),
        ({"prompt": "a", "completion": "\ud800"}, "line[2].completion", "lone surrogate"),
        ({"text": "a"}, "line[2]", "line 1 has the prompt_completion format"),
        ({**GOOD, "text": "a"}, "line[2]", "one format only"),
        ({**GOOD, "tools": [{"name": "f"}]}, "line[2].tools", "remove it"),
        (b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", "line[2]", "at most 16 deep"),
        (b'{"n": ' + b"9" * 5000 + b"}", "line[2]", "whole JSON object"),
    ],
)
def test_a_fault_names_its_line_its_field_and_the_cure(tmp_path: Path, bad: object, field: str, cure: str) -> None:
    ((found_field, value, found_cure),) = faults(write(tmp_path, GOOD, bad))
    assert found_field == field
    assert cure in found_cure
    assert value is None or len(str(value)) < 100


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "line[1].messages"),
        ("hi", "line[1].messages"),
        (["hi"], "line[1].messages[0]"),
        ([{"role": "user", "content": "hi"}], "line[1].messages"),
        ([{"role": "bot", "content": "hi"}], "line[1].messages[0].role"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}], "line[1].messages[1].content"),
        ([{"role": "assistant", "content": "a", "tool_calls": [1]}], "line[1].messages[0].tool_calls"),
    ],
)
def test_a_bad_message_is_named_by_its_place(tmp_path: Path, messages: object, field: str) -> None:
    assert [found[0] for found in faults(write(tmp_path, {"messages": messages}))] == [field]


def test_an_empty_missing_or_blank_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(b"\n  \n")
    assert faults(path)[0][1] == "0 rows"
    assert "readable" in faults(tmp_path / "absent.jsonl")[0][2]


def test_a_field_that_is_null_is_one_that_the_row_does_not_have(tmp_path: Path) -> None:
    raw = {"instruction": "a", "input": None, "output": "b", "text": None}
    assert list(read_rows(write(tmp_path, raw))) == [(1, AlpacaRow("a", "", "b"))]


def test_a_byte_order_mark_alone_on_its_line_is_a_blank_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + json.dumps(GOOD).encode())
    assert [line for line, _ in read_rows(path)] == [2]
    path.write_bytes(b"\xef\xbb\xbf")
    assert faults(path)[0][:2] == ("dataset", "0 rows")


def test_limits_on_bytes_rows_characters_and_reported_violations(tmp_path: Path) -> None:
    path = write(tmp_path, *[GOOD] * 5)
    assert "at most 10 bytes" in faults(path, DatasetLimits(max_bytes=10))[0][2]
    assert faults(path, DatasetLimits(max_rows=4))[0][0] == "line[5]"
    assert scan(path, DatasetLimits(max_rows=5)).rows == 5
    long = write(
        tmp_path, GOOD, {"prompt": "x" * 500, "completion": "y"}, {"prompt": "x" * 100, "completion": "y"}, GOOD
    )
    assert [found[0] for found in faults(long, DatasetLimits(max_row_characters=90))] == ["line[2]", "line[3]"]
    many = write(tmp_path, *[{"prompt": "a"}] * 30)
    assert len(faults(many)) == 20
    assert len(faults(many, DatasetLimits(max_violations=3))) == 3


def test_braces_inside_strings_are_not_depth(tmp_path: Path) -> None:
    assert scan(write(tmp_path, {"text": '{"[\\' * 40})).rows == 1


def test_a_torn_parquet_file_and_one_that_unpacks_too_far_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a" * 500}] * 200), path)
    assert path.stat().st_size < 10_000
    assert scan(path).rows == 200
    assert "unpack" in faults(path, DatasetLimits(max_bytes=50_000))[0][2]
    path.write_bytes(path.read_bytes()[:-200])
    assert "Parquet" in faults(path)[0][2]


def test_a_value_that_a_parquet_file_repeats_is_weighed_before_it_is_copied(tmp_path: Path) -> None:
    """A few kilobytes that stand for gigabytes."""
    path = tmp_path / "data.parquet"
    huge = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 32, pyarrow.int32()), pyarrow.array(["x" * 30_000_000])
    )
    listed = pyarrow.ListArray.from_arrays(pyarrow.array([0, 16, 32], pyarrow.int32()), huge)
    for table in ({"text": huge}, {"prompt": listed, "completion": ["a", "b"]}):
        pyarrow.parquet.write_table(pyarrow.table(table), path, compression="zstd")
        assert path.stat().st_size < 10_000
        tracemalloc.start()
        pool_bytes = pyarrow.default_memory_pool().max_memory()
        found = faults(path, DatasetLimits(max_bytes=500_000_000))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert "unpack" in found[0][2]
        assert peak < 10_000_000
        assert pyarrow.default_memory_pool().max_memory() - pool_bytes < 150_000_000
    assert "shorten" in faults(path, DatasetLimits(max_bytes=10_000_000_000))[0][2]


def test_columns_of_other_types_beside_the_text_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    maps = pyarrow.array([[("a", 1)], [("b", 2), ("c", 3)]], pyarrow.map_(pyarrow.string(), pyarrow.int32()))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", "y"], "about": maps}), path)
    assert scan(path).rows == 2


ON_MARS = pyarrow.timestamp("us", tz="Mars/Olympus")


@pytest.mark.parametrize(
    ("values", "kind", "cure"),
    [
        ([0, 1], ON_MARS, "UTC"),
        ([[0], [1]], pyarrow.list_(pyarrow.field("element", ON_MARS)), "UTC"),
        ([1, 10**8], pyarrow.date32(), "years 1 to 9999"),
        ([2**62, 1], pyarrow.timestamp("us"), "years 1 to 9999"),
        ([b"a", b"\xff"], pyarrow.binary(), "UTF-8"),
    ],
)
def test_a_parquet_column_that_cannot_be_read_is_named_with_its_type_and_the_cure(
    tmp_path: Path, values: list[object], kind: pyarrow.DataType, cure: str
) -> None:
    path = tmp_path / "data.parquet"
    column = pyarrow.array(values, kind)
    if kind == pyarrow.binary():
        column = column.view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", "y"], "on": column}), path)
    ((field, value, said),) = faults(path)
    assert (field, value) == ("column[on]", str(column.type))
    assert cure in said
    assert "leave the column out" in said


def test_a_parquet_column_that_comes_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"]), pyarrow.array(["c"])]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, ["prompt", "completion", "prompt"]), path)
    assert "a name of its own" in faults(path)[0][2]


def test_read_rows_stops_at_the_first_fault(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, GOOD, {"prompt": "a"}, GOOD))
    next(rows)
    with pytest.raises(DatasetError, match=r"line\[2\]\.completion"):
        next(rows)


def test_the_objective_must_suit_the_format() -> None:
    dpo = Objective(ObjectiveKind.DPO)
    assert check_objective(RowFormat.PREFERENCE, dpo) == []
    assert check_objective(RowFormat.TEXT, Objective()) == []
    assert check_objective(RowFormat.TEXT, dpo, "train")[0].field == "train"
    assert "DPO" in check_objective(RowFormat.PREFERENCE, Objective())[0].cure


def test_alpaca_rows_render_with_and_without_input() -> None:
    assert "### Input:\nx\n" in AlpacaRow("add", "x", "3").as_prompt_completion().prompt
    assert "### Input" not in AlpacaRow("add", "", "3").as_prompt_completion().prompt


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "messages", "text", "prompt", "completion"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(lines=st.lists(st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()), max_size=5))
def test_any_bytes_give_facts_or_a_dataset_error(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        described = scan(path).rows > 0
    except DatasetError as error:
        described = bool(error.violations) and bool(str(error).encode())
    assert described
