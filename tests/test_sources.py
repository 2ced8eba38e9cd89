"""Rows from files: every format, each row with its address, and no content in an error."""

from __future__ import annotations

import csv
import gzip
import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from qlora import sources
from qlora.errors import DataError
from qlora.sources import Bad, Row

ROWS = [
    {"prompt": "plain", "completion": "text"},
    {"prompt": "naïve – 漢字 🙂", "completion": 'quotes " and , commas'},
    {"prompt": "line one\nline two", "completion": "tab\there"},
]
SECRET = "diagnosis"
TEXTS = [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt"]
GOOD = '{"a": 1}'


def refusal(path: Path, origin: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        sources.read(path, origin)
    return str(caught.value)


def items(path: Path) -> list[Row | Bad]:
    return list(sources.stream(path))


def problems(path: Path) -> list[str]:
    """What is wrong with a file's rows; and that saying so gives nothing of them away."""
    bad = [item for item in items(path) if isinstance(item, Bad)]
    said = [f"{item.address}: {item.reason}" for item in bad]
    assert SECRET not in "".join(said) + repr(bad)
    return said


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
    elif kind == ".arrow":
        table = pyarrow.Table.from_pylist(rows)
        with (
            pyarrow.OSFile(str(path), "wb") as sink,
            pyarrow.ipc.new_file(sink, table.schema) as to,
        ):
            to.write_table(table, max_chunksize=2)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def packed(path: Path, packing: str) -> Path:
    """The file as gzip or zstd leave it, by the writers of Python and pyarrow."""
    data = path.read_bytes()
    target = path.with_name(path.name + packing)
    if packing == ".gz":
        target.write_bytes(gzip.compress(data))
    else:
        with pyarrow.CompressedOutputStream(str(target), "zstd") as file:
            file.write(data)
    path.unlink()
    return target


FORMATS = [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow"]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_back_the_rows_in_order(kind: str, tmp_path: Path) -> None:
    rows = sources.read(write(tmp_path / f"rows{kind}", ROWS))
    assert [row.value for row in rows] == ROWS
    assert {row.origin for row in rows} == {f"rows{kind}"}


def test_every_known_ending_is_tested_here() -> None:
    assert set(sources.ENDINGS) == {*FORMATS, *TEXTS}


def test_an_ending_may_be_in_capitals(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS).rename(tmp_path / "ROWS.JSONL")
    assert len(sources.read(path)) == 3
    assert len(sources.read(packed(path, ".gz").rename(tmp_path / "ROWS.JSONL.GZ"))) == 3


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


def test_a_json_file_of_one_object_a_line_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for mark in ("", "\ufeff"):
        path.write_text(mark + lines(ROWS) + "{oops\n", encoding="utf-8")
        assert sources.holds_json_lines(path)
        rows = list(sources.stream(path))
        assert [row.value for row in rows[:-1]] == ROWS
        assert rows[-1].address == f"rows.json:{len(ROWS) + 1}"
    for other in (
        "[]",
        json.dumps(ROWS),
        json.dumps(ROWS, indent=1),
        '{"data": [{"a": 1}]}\n',
        "{",
    ):
        path.write_text(other)
        assert not sources.holds_json_lines(path)


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


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("kind", TEXTS)
def test_every_text_format_is_read_through_compression(
    kind: str, packing: str, tmp_path: Path
) -> None:
    path = tmp_path / f"rows{kind}"
    if kind == ".txt":
        path.write_text("One.\n\nTwo.\n")
    else:
        write(path, ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    before = sources.read(path)
    after = sources.read(packed(path, packing))
    assert [(row.number, row.value) for row in after] == [(r.number, r.value) for r in before]
    assert {row.origin for row in after} == {f"rows{kind}{packing}"}


def test_compressed_parts_one_after_the_other_are_one_file(tmp_path: Path) -> None:
    """As ``cat a.gz b.gz`` leaves them."""
    for packing in (".gz", ".zst"):
        path = packed(write(tmp_path / "rows.jsonl", ROWS), packing)
        path.write_bytes(path.read_bytes() * 2)
        assert [row.number for row in sources.read(path)] == [1, 2, 3, 4, 5, 6]


def test_arrow_is_read_as_a_file_and_as_a_stream(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"x{n}"}], "n": None} for n in range(3000)]
    table = pyarrow.Table.from_pylist(rows)
    for opened in (pyarrow.ipc.new_file, pyarrow.ipc.new_stream):
        for size in (7, 3000):
            path = tmp_path / "rows.arrow"
            with pyarrow.OSFile(str(path), "wb") as sink, opened(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=size)
            read = sources.read(path)
            assert [row.value for row in read] == rows
            assert [row.number for row in read] == list(range(1, 3001))


def test_a_quoted_field_over_several_lines_does_not_shift_the_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('\nprompt,completion\na,"b\n\nc"\n\nd,e\n')
    assert [(row.number, row.value["prompt"]) for row in sources.read(path)] == [(3, "a"), (7, "d")]


def test_commas_after_the_last_column_of_a_csv_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b,,\n1,2,,\n")
    assert [row.value for row in sources.read(tmp_path / "a.csv")] == [{"a": "1", "b": "2", "": ""}]


def test_the_line_ends_of_old_macs_are_line_ends_in_csv_and_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a,b\r1,2\r3,4\r")
    (tmp_path / "a.txt").write_bytes(b"One,\rtwo.\r\rThree.\r")
    assert [row.number for row in sources.read(tmp_path / "a.csv")] == [2, 3]
    texts = [row.value["text"] for row in sources.read(tmp_path / "a.txt")]
    assert texts == ["One,\ntwo.", "Three."]


# --- one row at a time


def test_bad_rows_are_reported_in_their_places_and_reading_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{GOOD}\r\n{{"{SECRET}"}}\r\n{GOOD}\n["{SECRET}"]\n{GOOD}\n')
    found = items(path)
    assert [type(item) for item in found] == [Row, Bad, Row, Bad, Row]
    assert [item.address for item in found] == [f"rows.jsonl:{n}" for n in range(1, 6)]
    raw = [item.raw for item in found if isinstance(item, Bad)]
    assert raw == [f'{{"{SECRET}"}}', f'["{SECRET}"]'], "the sidecar gets the text as it was"
    assert len(problems(path)) == 2


@pytest.mark.parametrize(
    ("name", "content", "raw"),
    [
        ("a.csv", b'a,b\n1,2\n"x\ny"\n3,4\n', '"x\ny"'),
        ("a.tsv", b"a\tb\n1\t2\n1\t2\t3\n3\t4\n", "1\t2\t3"),
        ("a.csv", b"a,b\n1,2\n\xef,2\n3,4\n", "\ufffd,2"),
        ("a.txt", b"One.\n\nTwo\xef.\n\nThree.\n", "Two\ufffd."),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xef"}\n{"a": 3}\n', '{"a": "\ufffd"}'),
        ("a.json", b'[{"a": 1}, "\\ud800", {"a": 3}]', '"\\ud800"'),
    ],
)
def test_the_text_of_a_bad_row_is_kept_for_a_sidecar(
    name: str, content: bytes, raw: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    first, bad, last = items(tmp_path / name)
    assert isinstance(first, Row) and isinstance(last, Row)
    assert isinstance(bad, Bad) and bad.raw == raw


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".tsv", ".txt"])
def test_the_first_row_is_there_before_the_rest_is_read(kind: str, tmp_path: Path) -> None:
    """The rest is gone before it is asked for; only what lay in a buffer still comes."""
    path = tmp_path / f"a{kind}"
    unit = {".jsonl": f"{GOOD}\n", ".txt": "One.\n\n"}.get(kind, "1\n")
    path.write_text(unit * 200_000)
    rows = sources.stream(path)
    assert isinstance(next(rows), Row)
    path.write_bytes(b"")
    assert sum(1 for _ in rows) < 100_000


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".txt"])
def test_rows_come_before_the_damage_in_a_compressed_file(
    kind: str, packing: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a{kind}"
    path.write_text({".jsonl": f"{GOOD}\n", ".csv": "a\n1\n", ".txt": "One.\n\n"}[kind])
    path.write_text(path.read_text() + random_text(400_000))
    path = packed(path, packing)
    path.write_bytes(path.read_bytes()[:-5000])
    rows = sources.stream(path)
    first = next(rows)
    assert isinstance(first, Row) and first.origin == path.name
    with pytest.raises(DataError, match="stream is cut short"):
        list(rows)


def test_a_file_that_is_left_half_read_is_closed(tmp_path: Path) -> None:
    """Warnings are errors here: a file left open would fail this."""
    for kind in sources.ENDINGS:
        path = tmp_path / f"rows{kind}"
        paths = [path]
        if kind == ".txt":
            path.write_text("One.\n\nTwo.\n")
        else:
            write(path, ROWS)
        if kind in TEXTS:
            copies = (path.with_name(f"{n}{kind}") for n in "ab")
            for copy, packing in zip(copies, (".gz", ".zst"), strict=True):
                copy.write_bytes(path.read_bytes())
                paths.append(packed(copy, packing))
        for each in paths:
            next(sources.stream(each))


def test_the_first_batch_of_a_table_is_there_before_the_rest_is_read(tmp_path: Path) -> None:
    rows = [{"a": random_text(200) + str(n)} for n in range(8000)]
    for kind in (".parquet", ".arrow"):
        table = pyarrow.Table.from_pylist(rows)
        path = tmp_path / f"a{kind}"
        if kind == ".parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=2000, compression="none")
        else:
            with pyarrow.OSFile(str(path), "wb") as f, pyarrow.ipc.new_file(f, table.schema) as to:
                to.write_table(table, max_chunksize=2000)
        data = bytearray(path.read_bytes())
        middle = len(data) * 5 // 8
        data[middle - 300_000 : middle + 300_000] = b"\xff" * 600_000
        path.write_bytes(data)
        found = sources.stream(path)
        assert next(found) == Row(f"a{kind}", 1, rows[0])
        with pytest.raises(DataError, match=rf"^a{kind}: not {kind[1:]}, or damaged: "):
            list(found)


def test_nothing_is_opened_before_the_first_row_is_asked_for(tmp_path: Path) -> None:
    rows = sources.stream(tmp_path / "later.jsonl")
    (tmp_path / "later.jsonl").write_text(GOOD)
    assert next(rows) == Row("later.jsonl", 1, {"a": 1})


def random_text(size: int) -> str:
    """Text that no compression makes small."""
    return "".join(random.Random(size).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=size))


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
        ("a.json", "3", ["list of objects", "number"]),
        ("a.json", '"' + SECRET + '"', ["list of objects", "text"]),
        ("a.json", '{"a": 1}', ["one list"]),
        ("a.json", '{"a": [1], "b": [2]}', ["one list"]),
        ("a.json", f'[{{"a": 1}}, "{SECRET}", [3]]', ["2 entries", "a.json:2", "a.json:3"]),
        ("a.json", "[]", ["no rows"]),
        ("a.json", "[" * 100_000, ["nested too deeply"]),
        ("a.jsonl", "[" * 100_000, ["a.jsonl:1", "nested too deeply"]),
        (
            "a.json",
            f'[{{"a": "{SECRET}"}},\n{{"b":\n[NaN]}},\n{{"a": 1}}]',
            ["a.json:3: NaN is not"],
        ),
        ("a.json", '[{"a": "NaN"},\n{"a": -Infinity}]', ["a.json:2: -Infinity is not JSON"]),
        (
            "a.json",
            '[{"a": 1},\n{"b": 1,\n"b": 2\n},\n{}]',
            ["a.json:4: the key 'b' is there twice"],
        ),
        ("a.json", '{"a": [], "a": [{"b": 1}]}', ["a.json:1: the key 'a' is there twice"]),
        ("a.csv", f"a,{SECRET},b,{SECRET}\n1,2,3,4\n", ["a.csv:1: two columns", "same name"]),
        ("a.arrow", f"{SECRET} " * 9, ["not arrow, or damaged"]),
        ("a.arrow", "ARROW1" + SECRET * 9, ["not arrow, or damaged"]),
        ("a.jsonl.gz", f"{SECRET} " * 9, ["not a gzip file"]),
        ("a.jsonl.zst", f"{SECRET} " * 9, ["not a zstd file"]),
        ("a.jsonl", " \n\n", ["no rows"]),
        ("a.txt", " \n\n", ["no rows"]),
        ("a.csv", "prompt,completion\n", ["no rows"]),
        ("a.csv", f"a,b\n1,2\n{SECRET}\n3,4\n5,6,{SECRET}\n", ["2 lines", "a.csv:3", "a.csv:5"]),
        ("a.tsv", f"a\tb\n1\t2\t{SECRET}\n", ["a.tsv:2", "not as many fields"]),
        ("a.parquet", f"{SECRET} " * 9, ["not parquet, or damaged"]),
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


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have_are_refused(literal: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{GOOD}\n{{"a": [{{"b": {literal}}}]}}\n{{"a": "{literal}"}}\n')
    said = f"a.jsonl:2: {literal} is not JSON; write null or a number"
    assert problems(path) == [said]
    assert [item.number for item in items(path)] == [1, 2, 3]


def test_a_key_that_is_there_twice_is_refused_at_any_depth(tmp_path: Path) -> None:
    """Python's decoder lets the last one win in silence."""
    path = tmp_path / "a.jsonl"
    twice = f'{{"x": "{SECRET}", "y": 1, "x": 2}}'
    path.write_text(f'{twice}\n{{"m": [{twice}]}}\n{{"x": {{"x": 1}}, "y": [{{"x": 1}}]}}\n')
    assert problems(path) == [f"a.jsonl:{n}: the key 'x' is there twice" for n in (1, 2)]
    path.write_text(f'{{"{"k" * 900}": 1, "{"k" * 900}": 1}}\n')
    assert len(problems(path)[0]) < 100


@pytest.mark.parametrize("row", [f'{{"m": [{{"r": "{SECRET}"}}, null, tru', '{"a": "漢字"}'])
def test_a_last_line_that_is_cut_short_is_named_as_such(row: str, tmp_path: Path) -> None:
    """Cut anywhere: within a word, an object, or a letter of several bytes."""
    path = tmp_path / "a.jsonl"
    for size in range(1, len(row.encode())):
        path.write_bytes(f"{GOOD}\n".encode() + row.encode()[:size])
        (said,) = problems(path)
        assert said.startswith("a.jsonl:2: not valid JSON")
        assert said.endswith(": the file's last line is cut short")
        path.write_bytes(path.read_bytes() + b"\n")
        assert "cut" not in problems(path)[0], "a line with an end was written so"


@pytest.mark.parametrize("row", ['{"a": oops}', '{"a": 1} {"b": 2}', "oops", '["a"]', '{"a": NaN}'])
def test_a_last_line_that_is_whole_but_wrong_is_not_called_cut(row: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{GOOD}\n{row}")
    (said,) = problems(path)
    assert said.startswith("a.jsonl:2: ") and "cut" not in said


def test_an_open_quote_does_not_swallow_the_rest_of_a_csv_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\na,b\nc,"d\ne,f\ng,h\n')
    assert refusal(path).startswith("a.csv:3: "), "where the quote is, not where the file ends"


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


def test_only_the_row_is_bad_that_python_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = pyarrow.array([b"a", SECRET.encode() + b"\xff", b"c"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    assert problems(path) == ["a.parquet:2: a text that is not UTF-8"]
    assert [item.number for item in items(path) if isinstance(item, Row)] == [1, 3]
    years = pyarrow.array([0, 10**15], pyarrow.int64()).cast(pyarrow.timestamp("ms"))
    pyarrow.parquet.write_table(pyarrow.table({"when": years}), path)
    assert problems(path) == [
        "a.parquet:2: a value that Python cannot hold, such as a date out of range"
    ]


def test_an_arrow_file_with_a_text_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    """Arrow holds no check of its own, and what is damaged must not be looked into."""
    texts = pyarrow.array([b"a", SECRET.encode() + b"\xff"]).view(pyarrow.string())
    table = pyarrow.table({"text": texts})
    path = tmp_path / "a.arrow"
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as to:
        to.write_table(table)
    message = refusal(path)
    assert message.startswith("a.arrow: not arrow, or damaged: ") and "UTF8" in message
    assert SECRET not in message


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_short_is_named_as_such(packing: str, tmp_path: Path) -> None:
    path = packed(write(tmp_path / "a.jsonl", ROWS), packing)
    whole = path.read_bytes()
    for left in (3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:left])
        assert "stream is cut short" in refusal(path), left
    path.write_bytes(whole[:12] + b"\xff" * 20 + whole[32:])
    assert refusal(path).startswith(f"a.jsonl{packing}: ")


# --- encodings


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".txt"])
@pytest.mark.parametrize(("encoding", "named"), [("latin-1", "latin"), ("utf-16", "utf-16")])
@pytest.mark.parametrize("filler", [0, 900], ids=["short", "long"])
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_another_encoding_is_named_with_the_byte_and_a_command_that_mends_it(
    kind: str, encoding: str, named: str, filler: int, packing: str, tmp_path: Path
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
    at = 0 if encoding == "utf-16" else path.read_bytes().index("ï".encode("latin-1"))
    if packing:
        path = packed(path, packing)
    message = refusal(path)
    assert message.startswith(path.name) and f": not UTF-8 at byte {at}." in message
    assert SECRET not in message
    command = message.partition("convert it: ")[2]
    tool = {"": "iconv", ".gz": "gzip", ".zst": "zstd"}[packing]
    assert command.startswith(tool) and named in command.lower().replace("latin1", "latin-1")
    if shutil.which("iconv") and shutil.which(tool):
        subprocess.run(command, shell=True, cwd=tmp_path, check=True)
        assert len(sources.read(tmp_path / f"fixed{kind}")) == len(rows)


def test_a_line_in_another_encoding_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good, bad = '{"a": "漢字"}\n'.encode(), f'{{"a": "{SECRET} \xef"}}\n'.encode("latin-1")
    path.write_bytes(b"\xef\xbb\xbf" + good + bad + good + bad + good)
    found = items(path)
    assert [item.number for item in found if isinstance(item, Row)] == [1, 3, 5]
    first, second = problems(path)
    one = path.read_bytes().index(b"\xef", 3)
    two = path.read_bytes().index(b"\xef", one + 1)
    assert first.startswith(f"rows.jsonl:2: not UTF-8 at byte {one}. If it is LATIN1, convert it: ")
    assert second == f"rows.jsonl:4: not UTF-8 at byte {two}", "the command stands there once"


def test_the_byte_is_counted_over_everything_before_it(tmp_path: Path) -> None:
    for name, text in {
        "a.csv": 'é,b\r\n\r\n1,2\r\n"x\r\né",\xef',
        "a.txt": "\r\n\r\né.\r\n \r\n\r\nb\nc\xef\n",
    }.items():
        head, _, tail = text.encode().partition("\xef".encode())
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + head + b"\xef" + tail)
        (said,) = problems(tmp_path / name)
        assert f": not UTF-8 at byte {3 + len(head)}." in said


def test_a_header_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a,\xef\n1,2\n")
    assert refusal(tmp_path / "a.csv").startswith("a.csv:1: not UTF-8 at byte 2. ")


def test_the_command_that_mends_a_file_holds_for_a_name_with_spaces(tmp_path: Path) -> None:
    (tmp_path / "my rows; ls.jsonl").write_bytes(b'{"a": "\xef"}\n')
    command = refusal(tmp_path / "my rows; ls.jsonl").partition("convert it: ")[2]
    assert " 'my rows; ls.jsonl' > " in command


# --- files that are none


def test_an_empty_file_is_named_as_such(tmp_path: Path) -> None:
    for kind in [*sources.ENDINGS, ".jsonl.gz", ".txt.zst"]:
        (tmp_path / f"a{kind}").touch()
        assert refusal(tmp_path / f"a{kind}") == f"a{kind}: the file is empty (0 bytes)."
    (tmp_path / "a.jsonl").touch()
    assert refusal(packed(tmp_path / "a.jsonl", ".gz")) == "a.jsonl.gz: no rows in it."


@pytest.mark.parametrize("name", ["rows", "rows.jsonl", "v1.5"])
def test_a_folder_is_named_as_such(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    assert refusal(tmp_path / name) == f"{name}: a folder; name the data files in it."


@pytest.mark.parametrize(
    "name",
    ["rows", "rows.xlsx", "rows.jsonl.bz2", "rows.gz", "rows.parquet.gz", "a.arrow.zst", ".jsonl"],
)
def test_an_unknown_ending_lists_the_known_ones(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(SECRET)
    message = refusal(tmp_path / name)
    assert message.startswith(f"{name}: ")
    for kind in (*FORMATS, ".txt", ".gz", ".zst"):
        assert f" {kind}" in message
    assert SECRET not in message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.jsonl") == "a.jsonl: cannot be read: No such file or directory."


def test_failing_without_problems_does_nothing() -> None:
    sources.fail([], "heading")
    with pytest.raises(DataError, match=r"^heading\n  one$"):
        sources.fail(["one"], "heading")
    with pytest.raises(DataError, match=r"^heading\n  one\n\.\.\. and 1,499 more$"):
        sources.fail(["one"], "heading", 1500)


# --- patterns


def names(pattern: Path) -> list[str]:
    return [path.name for path in sources.expand(pattern)]


def test_a_pattern_stands_for_the_sorted_files_it_matches(tmp_path: Path) -> None:
    deep = tmp_path / "x" / "y"
    deep.mkdir(parents=True)
    (tmp_path / "folder.jsonl").mkdir()
    for path in (tmp_path / "b.jsonl", tmp_path / "a.jsonl", tmp_path / "a.csv", deep / "c.jsonl"):
        path.write_text(GOOD)
    (tmp_path / "._a.jsonl").write_text(SECRET)  # macOS leaves such files in archives
    assert names(tmp_path / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(tmp_path / "?.[cj]s*") == ["a.csv", "a.jsonl", "b.jsonl"]
    assert names(tmp_path / "**" / "*.jsonl") == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert names(tmp_path / "x" / "**") == ["c.jsonl"]
    assert [len(sources.read(path)) for path in sources.expand(str(tmp_path / "*.jsonl"))] == [1, 1]


def test_a_name_without_a_pattern_stands_for_itself_even_if_it_is_missing(tmp_path: Path) -> None:
    assert sources.expand(tmp_path / "a.jsonl") == [tmp_path / "a.jsonl"]
    assert sources.expand("a.jsonl") == [Path("a.jsonl")]


def test_a_name_that_exists_is_meant_literally(tmp_path: Path) -> None:
    for name in ("rows[1].jsonl", "rows1.jsonl"):
        (tmp_path / name).write_text(GOOD)
    assert names(tmp_path / "rows[1].jsonl") == ["rows[1].jsonl"]
    (tmp_path / "rows[1].jsonl").unlink()
    assert names(tmp_path / "rows[1].jsonl") == ["rows1.jsonl"]


def test_a_pattern_that_matches_nothing_says_what_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    said = {
        "data/*.jsonl": f"{tmp_path / 'data'}.",
        "*.jsonl": f"{tmp_path}.",
        "dat*/x/a.jsonl": f"{tmp_path}.",
        "date/*.jsonl": f"{tmp_path / 'date'}, which does not exist.",
    }
    for pattern, where in said.items():
        with pytest.raises(DataError) as caught:
            sources.expand(pattern)
        assert str(caught.value) == f"the pattern {pattern!r} matches no file. Looked in {where}"


def test_what_makes_a_name_a_pattern() -> None:
    assert all(sources.is_pattern(name) for name in ("*.jsonl", "a?.csv", Path("a[12].txt")))
    assert not any(sources.is_pattern(name) for name in ("a.jsonl", Path("a b/c{1}.txt"), ""))
