"""Rows from files: every format, each row with its address, and no content in an error."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qlora import sources
from qlora.errors import DataError

ROWS = [
    {"prompt": "plain", "completion": "text"},
    {"prompt": "naïve – 漢字 🙂", "completion": 'quotes " and , commas'},
    {"prompt": "line one\nline two", "completion": "tab\there"},
]
SECRET = "diagnosis"


def refusal(path: Path, origin: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        sources.read(path, origin)
    return str(caught.value)


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    """The rows as the file's ending says, by libraries other than the one under test."""
    kind = path.suffix
    if kind in (".jsonl", ".ndjson"):
        path.write_text(lines(rows), encoding="utf-8")
    elif kind == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_back_the_rows_in_order(kind: str, tmp_path: Path) -> None:
    rows = sources.read(write(tmp_path / f"rows{kind}", ROWS))
    assert [row.value for row in rows] == ROWS
    assert {row.origin for row in rows} == {f"rows{kind}"}


def test_every_known_ending_is_tested_here() -> None:
    tested = {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt"}
    assert set(sources._READERS) == tested


def test_an_ending_may_be_in_capitals(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS).rename(tmp_path / "ROWS.JSONL")
    assert len(sources.read(path)) == 3


def test_a_text_file_gives_one_row_a_paragraph(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\nOne,\ntwo.\n\n \t\n  Three.  \n\n\nFour.", encoding="utf-8")
    rows = sources.read(path)
    assert [row.value for row in rows] == [{"text": t} for t in ("One,\ntwo.", "Three.", "Four.")]
    assert [row.number for row in rows] == [3, 7, 10]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv", ".txt"])
def test_a_byte_order_mark_changes_nothing(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{kind}"
    plain = b"Once upon a time.\n" if kind == ".txt" else write(path, ROWS).read_bytes()
    path.write_bytes(plain)
    before = sources.read(path)
    path.write_bytes(b"\xef\xbb\xbf" + plain)
    assert sources.read(path) == before


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".tsv", ".txt"])
def test_windows_line_ends_change_nothing(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{kind}"
    flat = ROWS[:2]
    plain = b"One.\n\nTwo.\n" if kind == ".txt" else write(path, flat).read_bytes()
    plain = plain.replace(b"\r\n", b"\n")
    path.write_bytes(plain)
    before = sources.read(path)
    path.write_bytes(plain.replace(b"\n", b"\r\n"))
    assert sources.read(path) == before


def test_blank_lines_are_passed_over_and_lines_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"a": 1}\n\n  \n{"a": 2}')
    assert [(row.address, row.value) for row in sources.read(path)] == [
        ("rows.jsonl:2", {"a": 1}),
        ("rows.jsonl:5", {"a": 2}),
    ]


def test_unusual_line_separators_inside_a_text_do_not_split_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"a": "x\u2028y\u2029z\x85w\x0c"}, {"a": "b"}]
    path.write_text(lines(rows), encoding="utf-8")
    assert [row.value for row in sources.read(path)] == rows


def test_an_object_with_one_list_stands_for_the_list(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 2, "data": ROWS, "license": "CC0"}))
    rows = sources.read(path)
    assert [row.value for row in rows] == ROWS
    assert [row.number for row in rows] == [1, 2, 3]


def test_rows_can_be_given_another_origin(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert sources.read(path, "tickets")[1].address == "tickets:2"
    path.write_text("")
    assert refusal(path, "tickets").startswith("tickets: ")


def test_nested_values_come_out_of_parquet_as_plain_python(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "x"}], "n": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert [row.value for row in sources.read(tmp_path / "rows.parquet")] == rows


# --- malformed


def test_malformed_lines_are_listed_with_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = '{"prompt": "a", "completion": "b"}'
    bad = {3: f'{{"prompt": "{SECRET}", oops}}', 5: f'["{SECRET}"]', 6: f'"{SECRET}"', 7: "3"}
    bad |= {8: "null", 9: "true", 10: f'{{"prompt": "{SECRET}'}
    path.write_text("\n".join(bad.get(n, good) for n in range(1, 11)))
    message = refusal(path)
    head, *rest = message.splitlines()
    assert head.startswith("rows.jsonl: 7 lines cannot be read")
    assert [line.strip().partition(": ")[0] for line in rest] == [f"rows.jsonl:{n}" for n in bad]
    column = bad[3].index("oops") + 1
    assert f"not valid JSON (column {column})" in rest[0]
    assert "a JSON list" in rest[1] and "a JSON text" in rest[2] and "a JSON number" in rest[3]
    assert "a JSON null" in rest[4] and "a JSON boolean" in rest[5]
    assert SECRET not in message and "oops" not in message


@pytest.mark.parametrize(
    ("bad", "listed", "more"), [(20, 20, ""), (21, 20, "1"), (1500, 20, "1,480")]
)
def test_a_long_list_of_problems_is_cut_after_twenty(
    bad: int, listed: int, more: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{\n" * bad)
    head, *rest = refusal(path).splitlines()
    assert f"{bad:,} lines" in head
    assert sum("not valid JSON" in line for line in rest) == listed
    assert rest[listed:] == ([f"... and {more} more"] if more else [])


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.json", '[{"a": 1},\n {"a": ]', ["a.json:2", "column 8"]),
        ("a.json", '{"a": 1}\n{"a": 2}\n', ["a.json:2", "JSON lines", ".jsonl"]),
        ("a.json", "3", ["list of objects", "number"]),
        ("a.json", '"' + SECRET + '"', ["list of objects", "text"]),
        ("a.json", '{"a": 1}', ["one list"]),
        ("a.json", '{"a": [1], "b": [2]}', ["one list"]),
        ("a.json", f'[{{"a": 1}}, "{SECRET}", [3]]', ["2 entries", "a.json:2", "a.json:3"]),
        ("a.json", "[]", ["no rows"]),
        ("a.json", "[" * 100_000, ["nested too deeply"]),
        ("a.jsonl", "[" * 100_000, ["a.jsonl:1", "nested too deeply"]),
        ("a.jsonl", " \n\n", ["no rows"]),
        ("a.txt", " \n\n", ["no rows"]),
        ("a.csv", "prompt,completion\n", ["no rows"]),
        ("a.csv", f"a,b\n1,2\n{SECRET}\n3,4\n5,6,{SECRET}\n", ["2 lines", "a.csv:3", "a.csv:5"]),
        ("a.tsv", f"a\tb\n1\t2\t{SECRET}\n", ["a.tsv:2", "not as many fields"]),
        ("a.parquet", f"{SECRET} " * 9, ["not a parquet file"]),
    ],
)
def test_a_malformed_file_says_where_and_what_and_never_its_content(
    name: str, content: str, parts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(content)
    message = refusal(path)
    assert message.startswith(name)
    assert [part for part in parts if part not in message] == []
    assert SECRET not in message and str(tmp_path) not in message


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_a_number_of_thousands_of_digits_is_a_problem_of_its_row(kind: str, tmp_path: Path) -> None:
    """int() gives up at 4300 digits, with an error of its own."""
    path = tmp_path / f"a{kind}"
    path.write_text('[{"a": ' + "1" * 5000 + "}]")
    assert refusal(path).startswith(f"a{kind}")


def test_an_open_quote_does_not_swallow_the_rest_of_a_csv_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\na,b\nc,"d\ne,f\ng,h\n')
    assert refusal(path).startswith("a.csv:")


def test_a_long_field_is_no_error_in_a_csv(tmp_path: Path) -> None:
    """The csv module stops at 128 KiB unless told otherwise."""
    rows = [{"prompt": "a" * 200_000, "completion": "b"}]
    assert [row.value for row in sources.read(write(tmp_path / "a.csv", rows))] == rows


def test_a_damaged_parquet_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.parquet", [{"prompt": "a" * n, "completion": "b"} for n in range(99)]
    )
    whole = path.read_bytes()
    for broken in (whole[:-20], whole[:20] + b"\xff" * 300 + whole[320:]):
        path.write_bytes(broken)
        message = refusal(path)
        assert message.startswith("a.parquet: ") and "\n" not in message


def test_an_empty_parquet_table_has_no_rows(tmp_path: Path) -> None:
    table = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert refusal(tmp_path / "a.parquet") == "a.parquet: no rows in it."


# --- encodings


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".txt"])
@pytest.mark.parametrize(("encoding", "named"), [("latin-1", "latin"), ("utf-16", "utf-16")])
@pytest.mark.parametrize("filler", [0, 900], ids=["short", "long"])
def test_another_encoding_is_named_with_the_byte_and_a_command_that_mends_it(
    kind: str, encoding: str, named: str, filler: int, tmp_path: Path
) -> None:
    path = tmp_path / f"rows{kind}"
    rows = [{"prompt": "plain and long enough", "completion": "text"}] * filler
    rows = [*rows, {"prompt": "naïve", "completion": SECRET}]
    if kind == ".txt":
        text = "\n\n".join(f"{row['prompt']} {row['completion']}" for row in rows)
    elif kind == ".json":
        text = json.dumps(rows, ensure_ascii=False)
    else:
        text = write(path, rows).read_text(encoding="utf-8")
    path.write_text(text, encoding=encoding)
    message = refusal(path)
    at = 0 if encoding == "utf-16" else path.read_bytes().index("ï".encode("latin-1"))
    assert f"rows{kind}: not UTF-8 at byte {at}." in message
    assert SECRET not in message
    command = message.partition("convert it: ")[2]
    assert command.startswith("iconv -f ") and named in command.lower().replace("latin1", "latin-1")
    if shutil.which("iconv"):
        subprocess.run(command, shell=True, cwd=tmp_path, check=True)
        assert len(sources.read(tmp_path / f"fixed{kind}")) == len(rows)


# --- files that are none


def test_an_empty_file_is_named_as_such(tmp_path: Path) -> None:
    for kind in sources._READERS:
        (tmp_path / f"a{kind}").touch()
        assert refusal(tmp_path / f"a{kind}") == f"a{kind}: the file is empty (0 bytes)."


@pytest.mark.parametrize("name", ["rows", "rows.jsonl", "v1.5"])
def test_a_folder_is_named_as_such(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    assert refusal(tmp_path / name) == f"{name}: a folder; name the data files in it."


@pytest.mark.parametrize("name", ["rows", "rows.xlsx", "rows.jsonl.gz", ".jsonl"])
def test_an_unknown_ending_lists_the_known_ones(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(SECRET)
    message = refusal(tmp_path / name)
    assert message.startswith(f"{name}: ")
    for kind in (".csv", ".json", ".jsonl", ".ndjson", ".parquet", ".tsv", ".txt"):
        assert f" {kind}" in message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.jsonl") == "a.jsonl: cannot be read: No such file or directory."


def test_failing_without_problems_does_nothing() -> None:
    sources.fail([], "heading")
    with pytest.raises(DataError, match=r"^heading\n  one$"):
        sources.fail(["one"], "heading")
