"""Malformed recipes and rows, a few thousand of each: nothing but our own errors comes out."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora import sources
from qlora.errors import DataError

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
if str(SCRIPTS) not in sys.path:
    sys.path.insert(0, str(SCRIPTS))
fuzz = importlib.import_module("fuzz_readers")


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One that is the current folder, in memory if possible: thousands of files are written."""
    with tempfile.TemporaryDirectory(dir=fuzz.in_memory()) as made, monkeypatch.context() as here:
        here.chdir(made)
        yield Path(made)


def shown(tally: Any) -> str:
    texts = ((tally.findings / name).with_suffix(".txt") for name in tally.found.values())
    return "\n".join(path.read_text() for path in texts)


@pytest.mark.parametrize(("name", "executions"), [("recipe", 1000), ("rows", 4000)])
def test_only_our_own_errors_come_out_of_a_reader(folder: Path, name: str, executions: int) -> None:
    tally = fuzz.warmed(name, Path.cwd(), folder / "findings")
    fuzz.drive(tally, fuzz.limit(None, executions), seed=1)
    assert not tally.found, shown(tally)
    assert tally.executions == executions
    assert tally.accepted > executions / 100  # most of what follows validation is reached too
    assert len(tally.ways) > 50


def test_the_same_seed_draws_the_same_inputs(folder: Path) -> None:
    reader = fuzz.READERS["rows"](Path.cwd())

    def drawn() -> list[bytes]:
        draw = random.Random(7)
        return [reader.mutate(draw.choice(reader.seeds), draw) for _ in range(200)]

    first = drawn()
    assert first == drawn() and len(set(first)) > 150


def test_every_seed_of_a_row_is_read_whatever_it_is_packed_in(folder: Path) -> None:
    reader = fuzz.READERS["rows"](Path.cwd())
    plain = [seed for seed in reader.seeds if seed[0] < len(fuzz.KINDS)]
    assert {seed[1] for seed in plain} == {0, 1, 2} and {seed[0] for seed in plain} == {
        0,
        2,
        3,
        4,
        5,
    }
    for seed in plain:
        if seed[4:].startswith((b'{"q"', b'[{"q"')):
            continue  # its columns are only read under other names
        assert not reader.read(seed), seed


NAMES = {
    "a" * 300 + ".jsonl": "cannot be read: File name too long",
    "a" * 300 + "*.jsonl": "matches no file",
    "a\0b.jsonl": "a NUL character",
    "a\0b/*.jsonl": "a NUL character",
    "circle/*.jsonl": "which does not exist",
    "circle/a.jsonl": "cannot be read: Too many levels of symbolic links",
}


@pytest.mark.skipif(os.name != "posix", reason="other names are impossible elsewhere")
@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[-9:].replace("\0", "-"))
def test_a_name_that_no_file_can_have_is_refused_in_words(folder: Path, name: str) -> None:
    Path("circle").symlink_to("circle")
    with pytest.raises(DataError, match=NAMES[name]):
        for path in sources.expand(name):
            list(sources.stream(path))


def read(data: bytes) -> None:
    if data == b"deep":
        read(data)
    raise ValueError(data)


def test_a_finding_is_kept_once_by_where_it_arose_with_what_shows_it(folder: Path) -> None:
    reader = fuzz.Reader("demo", [b"1"], lambda data, draw: data + b"1", read)
    tally = fuzz.Tally(reader, folder / "findings")
    for data in (b"1", b"2", b"deep"):
        tally.execute(data)
    kinds = [key.partition(" ")[0] for key in tally.found]
    assert kinds == ["ValueError", "RecursionError"]
    first = tally.findings / next(iter(tally.found.values()))
    assert (
        first.read_bytes() == b"1" and "raise ValueError" in first.with_suffix(".txt").read_text()
    )


def test_what_is_slow_twice_is_a_finding_and_what_was_slow_once_is_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "SLOW_SECONDS", 0.2)
    pauses = iter([0.3, 0.0, 0.3, 0.3])

    def read(data: bytes) -> dict[str, int]:
        time.sleep(next(pauses))
        return {}

    tally = fuzz.Tally(fuzz.Reader("demo", [], lambda data, draw: data, read), folder / "findings")
    tally.execute(b"x")
    assert not tally.found
    tally.execute(b"y")
    assert list(tally.found) == ["took"] and tally.slowest >= 0.3


@pytest.mark.skipif(os.name != "posix", reason="needs a timer that signals")
def test_what_hangs_is_ended_and_found() -> None:
    def hang() -> None:
        while True:
            pass

    with pytest.raises(fuzz.Hung), fuzz.limited(0.05):
        hang()


def test_the_command_reports_each_reader_and_loads_no_torch(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = [
        sys.executable, str(SCRIPTS / "fuzz_readers.py"), "--executions", "300", "--engine", "random",
        "--out", str(out), "--findings", str(tmp_path / "findings"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert set(found["readers"]) == {"recipe", "rows"} and found["engine"] == "random"
    for name, tally in found["readers"].items():
        assert name in done.stdout
        assert tally["executions"] >= 300 and not tally["torch_loaded"] and tally["findings"] == {}


def test_a_process_that_ends_before_its_time_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = fuzz.parser().parse_args(["--executions=1", f"--findings={tmp_path / 'found'}"])
    arguments.engine = "random"
    monkeypatch.setattr(fuzz.sys, "executable", "false" if os.name == "posix" else "where")
    tally = fuzz.fuzz("rows", arguments)
    assert list(tally["findings"]) == ["the process ended with 1"]
    assert "the process of rows ended with 1" in capsys.readouterr().err
    assert fuzz.row("rows", tally)[-1] == "1"


def test_the_examples_are_true() -> None:
    assert doctest.testmod(fuzz).failed == 0


def test_bad_arguments_end_in_a_sentence() -> None:
    for bad in (["--seconds=0"], ["--executions=x"], ["--reader=all"], ["extra"]):
        command = [sys.executable, str(SCRIPTS / "fuzz_readers.py"), *bad]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and "error:" in done.stderr.splitlines()[-1]
