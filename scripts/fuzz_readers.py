"""Feed the recipe reader and the row reader what is malformed: only our own errors may come out.

    make fuzz
    python scripts/fuzz_readers.py [--seconds 60 | --executions 1000000] [--reader recipe] [--out FILE]

An input is a recipe with command-line overrides, or a data file (jsonl, ndjson, json, csv, tsv, txt; plain,
.gz, .zst, or damaged ones of those). Mutants are made of bytes and of what these mean: lines, keys and
values of a recipe, of a row. With atheris (requirements-tools.lock; Linux) those that reach new code are
mutated further; without it, those that are refused in a new way.

A finding is anything but a QLoRAError (for a row: a RowError), a recipe or a record that does not survive
being written and read, more than a second or 500 MB for one input, or the end of the process. Each is kept
once, by where it arose, in --findings. Neither torch nor a model is loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib
import importlib.metadata
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from measure import ROOT, circumstances, positive, report, table

SLOW_SECONDS, HUNG_SECONDS, LARGE_BYTES = 1.0, 10.0, 500 * 10**6
MAX_INPUT = 4096
POOL = 4096  # inputs that are mutated further, without atheris
OVERRIDES = b"\n%%%\n"  # behind this, each line of an input is one
KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
PACKINGS = ("", ".gz", ".zst", "raw.gz", "raw.zst")  # raw: the payload as it is under such a name
COLUMNS: tuple[dict[str, str], ...] = (
    {}, {"prompt": "q", "completion": "a.0.text"}, {"text": "body"}, {"messages": "data.messages"},
)  # fmt: skip


class Hung(BaseException):
    """One input took longer than HUNG_SECONDS."""


@dataclass(frozen=True)
class Reader:
    """One reader under test: inputs to begin with, how to mutate one, and how to read one.

    ``read`` returns how often each error of a row was met; errors of the whole it raises.
    """

    name: str
    seeds: Sequence[bytes]
    mutate: Callable[[bytes, random.Random], bytes]
    read: Callable[[bytes], Counter[str]]


@dataclass
class Tally:
    """What came out of a reader."""

    reader: Reader
    findings: Path
    executions: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # by the name of the error
    ways: set[str] = field(default_factory=set)  # sentences without their names and numbers
    found: dict[str, str] = field(
        default_factory=dict
    )  # where it arose: what shows it, in findings
    slowest: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    def execute(self, data: bytes) -> bool:
        """Read one input; whether it was refused in a way that is new."""
        self.executions += 1
        known, peak = len(self.ways), peak_bytes()
        seconds, problem = self._timed(data)
        if seconds > SLOW_SECONDS and not problem:  # not if only the machine was busy
            seconds = min(seconds, self._timed(data)[0])
            problem = f"took {seconds:.1f} s" if seconds > SLOW_SECONDS else ""
        self.slowest = max(self.slowest, seconds)
        if peak_bytes() - peak > LARGE_BYTES:
            problem = problem or f"took {(peak_bytes() - peak) / 1e6:,.0f} MB"
        if problem:
            self.keep(problem, data)
        return len(self.ways) > known

    def _timed(self, data: bytes) -> tuple[float, str]:
        """Seconds, and the traceback of what should not have come out."""
        from qlora.errors import QLoRAError

        said: dict[str, str] = {}
        problem = ""
        began = time.perf_counter()
        try:
            with limited(HUNG_SECONDS):
                said = dict.fromkeys(self.reader.read(data), "RowError")
            self.accepted += not said
        except QLoRAError as error:
            said[str(error)] = type(error).__name__
        except KeyboardInterrupt:
            raise
        except BaseException:  # noqa: BLE001 - these are what is looked for
            problem = traceback.format_exc()
        seconds = time.perf_counter() - began
        self.refused.update(said.values())
        for text in said:
            self.ways.add(way(text))
        return seconds, problem

    def keep(self, problem: str, data: bytes) -> None:
        """Write a finding down, if there was none of its kind."""
        frames = re.findall(r'File "(.*?)([\w.]+)", line (\d+), in', problem)
        ours = [frame for frame in frames if Path(frame[0]).name == "qlora"] or frames
        last = problem.strip().splitlines()[-1]
        kind = last.partition(":")[0] if frames else last.partition(" ")[0]
        where = ":".join(ours[-1][1:]) if ours else ""
        key = " ".join(filter(None, (kind, where)))
        if key not in self.found:
            self.findings.mkdir(parents=True, exist_ok=True)
            stem = self.findings / f"{self.reader.name}-{re.sub(r'[^A-Za-z0-9]+', '-', key)}"
            stem.with_suffix(".input").write_bytes(data)
            stem.with_suffix(".txt").write_text(f"{data!r}\n\n{problem}\n", errors="replace")
            self.found[key] = f"{stem.name}.input"

    def to_json(self) -> dict[str, Any]:
        seconds = time.perf_counter() - self.began
        return {
            "executions": self.executions,
            "seconds": round(seconds, 1),
            "per_second": round(self.executions / seconds),
            "accepted": self.accepted,
            "refused": dict(self.refused.most_common()),
            "ways_refused": len(self.ways),
            "slowest_seconds": round(self.slowest, 3),
            "peak_megabytes": round(peak_bytes() / 1e6),
            "torch_loaded": "torch" in sys.modules,
            "findings": self.found,
        }


def way(text: str) -> str:
    """A sentence without what it quotes, lists and counts, and without the place before it.

    >>> way("a.jsonl:12: the key 'x' of 'y' (a, b) is there 2 times")
    'the key _ is there 0 times'
    """
    named = re.sub(r"['\"(].*['\")]", "_", text.partition("\n")[0])
    return re.sub(r"\d\w*[.,]?", "0", re.sub(r"^\S+?:(\d+:)? ", "", named))[:200]


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise Hung inside after so many seconds, where the system has such a timer."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise Hung(f"still at it after {seconds:.0f} s")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def peak_bytes() -> int:
    """The most memory this process ever held; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


# --- recipes

RECIPES = [
    "model: {name: embedded:base}\ndata: {train: rows.jsonl}\n",
    "model:\n  name: base\ndata:\n  train: [rows.jsonl, {name: rows.jsonl, weight: 3}]\n",
    "model: {name: Qwen/Qwen3-8B, revision: main}\ndata: {train: 'hub:a/b', split: 'train[:1%]'}\n",
    "model: {name: embedded:base}\ndata: {train: '*.jsonl', held_out: rows.jsonl}\n%%%\nlora.r=8",
    "model: {name: base}\ndata: {train: rows.jsonl, columns: {prompt: q}, max_length: 64}\n",
    "lora: {r: 16, lora_alpha: 3.2e1, target_modules: [q_proj, v_proj]}\n%%%\nrun.name=x",
    "quant: {cache: no, double_quant: true}\n%%%\ntrain.levels=[{a: 1}]\nlora.x.y=2",
    "train:\n  learning_rate: 2e-4 # peak\n  sft_config: {label_smoothing: .1, x: [1, {y: ~}]}\n",
    "run: {name: a, save_every: 10m, mirror: ../b}\neval: {exact_match: [a, b]}\n",
    "data:\n  train: >-\n    rows\n    .jsonl\n  chat_template: |\n    {{ a }}\n",
]  # fmt: skip
SCALARS = (
    b"", b"~", b"null", b"true", b"no", b"0", b"-1", b"012", b"1e400", b".nan", b"-.inf", b"2e-4",
    b"1:30", b"9" * 30, b"9" * 4400, b"''", b'"\\ud800"', b'"\\x00"', b"[]", b"{}", b"[[[]]]",
    b"{a: {b: [c]}}", b"x: y", b"*a", b"&a b", b"!!int 3", b"!x y", b"<<", b"|", b">-", b"'", b'"',
    b"- a", b"? a", b"%YAML 1.1", b"---", b"...", b"#", b"\t", b"\r", b"\xef\xbb\xbf", b"\xff",
    b"\xc2\x85", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"\x00", b"embedded:", b"embedded:../..", b"hub:",
    b"hub:a", b"~", b"~nobody/x", b"..", b".", b"a/" * 40, b"n" * 300, b"*", b"**", b"[", b"[!",
    b"rows.jsonl", b"2020-01-01", b"=", b"0x1F", b"1_000", b"+1", b".", b"-",
)  # fmt: skip


def recipe_reader(folder: Path) -> Reader:
    """Recipes as files in the folder, read as the command line reads them."""
    from qlora import document
    from qlora.recipe import load_recipe
    from qlora.settings import Recipe

    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    (folder / "base").mkdir(exist_ok=True)
    path = folder / "mine.yaml"
    keys = [
        (name, key)
        for name, section in Recipe.model_fields.items()
        for key in getattr(section.annotation, "model_fields", {})
    ]
    shipped = [
        re.sub(rb"(?m)^#.*\n", b"", file.read_bytes())
        for file in sorted((ROOT / "recipes").glob("*.yaml"))
    ]
    seeds = [text.encode().replace(b"\n%%%\n", OVERRIDES) for text in RECIPES] + shipped
    lines = sorted({line for seed in seeds for line in seed.split(b"\n")})

    def read(data: bytes) -> Counter[str]:
        text, _, rest = data.partition(OVERRIDES)
        path.write_bytes(text)
        given = [line.decode("utf-8", "surrogateescape") for line in rest.split(b"\n") if line]
        recipe = load_recipe(path, given)
        if zlib.crc32(data) % 8 == 0:  # it takes longer than all the rest
            written = recipe.dump()
            again = Recipe.model_validate(document.parse(written, "again").value)
            assert again.dump() == written, "a recipe changes when it is written and read"
        return Counter()

    def mutate(data: bytes, draw: random.Random) -> bytes:
        rows = data.split(b"\n")
        at = draw.randrange(len(rows))
        match draw.randrange(10):
            case 0:
                del rows[at]
            case 1:
                rows.insert(at, draw.choice(lines))
            case 2:
                rows[at] = b" " * draw.randrange(6) + rows[at].lstrip()
            case 3:
                key, colon, _ = rows[at].partition(b":")
                rows[at] = key + colon + b" " + draw.choice(SCALARS)
            case 4:
                section, key = (part.encode() for part in draw.choice(keys))
                rows.insert(at, section + b": {" + key + b": " + draw.choice(SCALARS) + b"}")
            case 5:
                section, key = (part.encode() for part in draw.choice(keys))
                data += b"" if OVERRIDES in data else OVERRIDES
                return data + b"\n" + section + b"." + key + b"=" + draw.choice(SCALARS)
            case 6:
                _, key = draw.choice(keys)
                rows[at] = re.sub(rb"[\w.]+(?=[:=])", key.encode(), rows[at], count=1)
            case 7:
                other = draw.choice(seeds).split(b"\n")
                rows[at:] = other[draw.randrange(len(other)) :]
            case _:
                return mutated_bytes(data, draw, SCALARS)
        return b"\n".join(rows)

    return Reader("recipe", seeds, mutate, read)


# --- rows

ROWS: list[dict[str, Any]] = [
    {"text": "one two"},
    {"prompt": "2+2?", "completion": "4"},
    {"q": "2+2?", "a": [{"text": "4"}]},
    {"instruction": "Add.", "input": "2 2", "output": "4", "system": "You add."},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    {"messages": [
        {"role": "system", "content": [{"type": "text", "text": "s"}]}, {"role": "user", "content": "é"},
        {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "tool", "content": "3", "tool_call_id": "1", "name": "f"},
        {"role": "assistant", "content": "three", "train": True}],
     "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}],
     "tools": "[]"},
]  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 1.5, 10**30, "", " ", "x", "assistant", "user", "tool", "\ud800",
    "\u0000", "\u2028", "[]", "{}", "[1", "null", '{"a": NaN}', "[" * 3000, '"\\ud800"', [], {}, [[]],
    [None], {"": None}, ["a"], {"type": "text"}, {"type": "tool_call", "value": "{}"},
    {"type": [], "text": 1}, {"name": "f", "arguments": ""}, {"function": None},
    {"function": {"name": "f", "arguments": "[]"}},
)  # fmt: skip
PIECES = (
    b"\n", b"\r\n", b"\r", b"\n\n", b'"', b'""', b",", b"\t", b"{", b"}", b"[", b"]", b"[" * 2000,
    b'{"a":' * 500, b":", b"NaN", b"-Infinity", b"1e999", b"9" * 4400, b"null", b"\\u", b"\\ud800",
    b"\\", b"\xff", b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xf0\x9f", b"\x00",
    b"\x0b", b"\x1c", b"\xc2\x85", b"\xe2\x80\xa8", b'{"a": 1}', b'{"a": 1, "a": 2}',
    b'{"text": "a"}\n', b"text\n", b"prompt,completion\n", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd",
)  # fmt: skip


def row_reader(folder: Path) -> Reader:
    """Data files in the folder, each row also as a record, as a run reads them.

    The first four bytes of an input say how the rest becomes a file: its kind and names of columns, how it
    is packed, where that is damaged and how.
    """
    import pyarrow

    from qlora import records, sources

    zstd = pyarrow.Codec("zstd")
    written = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
    payloads = [
        *((0, line + b"\n" + line + b"\n") for line in written),
        *((2, b"[" + line + b",\n " + line + b"]") for line in written),
        (2, b'{"data": [' + written[1] + b'], "version": 1}'),
        (3, b'prompt,completion\n"a ""b"", c","d\ne"\nf,g\n'),
        (4, b"instruction\tinput\toutput\na\tb\tc\n"),
        (5, "\ufeffone\ntwo\n\nthrée\r\n\r\nfour".encode()),
    ]
    seeds = [
        bytes([kind + len(KINDS) * columns, packing, 0, 0]) + payload
        for kind, payload in payloads
        for columns in range(len(COLUMNS) if kind == 0 else 1)
        for packing in range(3)
    ]

    def read(data: bytes) -> Counter[str]:
        head, payload = data[:4].ljust(4, b"\0"), data[4:]
        columns, kind = divmod(head[0], len(KINDS))
        mapping, packing = COLUMNS[columns % len(COLUMNS)], PACKINGS[head[1] % len(PACKINGS)]
        if packing == ".gz":
            payload = gzip.compress(payload, 1, mtime=0)
        elif packing == ".zst":
            payload = zstd.compress(payload, asbytes=True)
        if head[3] and payload:
            at = head[2] * len(payload) // 256
            payload = payload[:at] + (
                bytes([payload[at] ^ head[3]]) + payload[at + 1 :] if head[3] % 2 else b""
            )
        path = folder / f"rows{KINDS[kind]}{packing.removeprefix('raw')}"
        path.write_bytes(payload)
        form: records.Format | None = None
        said: Counter[str] = Counter()
        for item in sources.stream(path):
            if isinstance(item, sources.Bad):
                assert item.reason
                said[item.reason] += 1
                continue
            row = records.renamed(item.value, mapping)
            form = form or records.detect(row, path.name)
            try:
                record = records.parse(row, form)
            except records.RowError as error:
                said[str(error)] += 1
                continue
            records.fingerprint(record)
            again = records.from_json(json.loads(json.dumps(record.to_json())))
            assert again == record, "a record changes when it is written and read"
        return said

    def mutate(data: bytes, draw: random.Random) -> bytes:
        head, payload = bytearray(data[:4].ljust(4, b"\0")), data[4:]
        match draw.randrange(8):
            case 0:
                at = draw.randrange(4)
                head[at] = draw.choice((0, draw.randrange(256)))
            case 1:
                other = draw.choice(seeds)
                cut = draw.randrange(len(payload) + 1)
                payload = payload[:cut] + other[4 + draw.randrange(len(other) - 3) :]
            case 2 | 3 | 4:
                payload = _other_json(payload, draw)
            case _:
                payload = mutated_bytes(payload, draw, PIECES)
        return bytes(head) + payload

    return Reader("rows", seeds, mutate, read)


def _other_json(payload: bytes, draw: random.Random) -> bytes:
    """One line (or the whole, if that is JSON) with one value inside exchanged; else other bytes."""
    lines = payload.splitlines(keepends=True) or [b""]
    at = draw.randrange(len(lines))
    for whole in (True, False):
        try:
            value = json.loads(payload if whole else lines[at])
        except (ValueError, RecursionError):
            continue
        text = json.dumps(_exchanged(value, draw), ensure_ascii=draw.random() < 0.5)
        encoded = text.encode(errors="surrogatepass")
        if whole:
            return encoded
        lines[at] = encoded + b"\n"
        return b"".join(lines)
    return mutated_bytes(payload, draw, PIECES)


def _exchanged(value: Any, draw: random.Random) -> Any:
    """The value with one of those inside it gone, doubled, or replaced."""
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.15:
        return draw.choice((*VALUES, *ROWS))
    if isinstance(value, dict):
        key = draw.choice(list(value))
        match draw.randrange(6):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return value | {
                    draw.choice(("system", "tools", "weight", "train", "input", "x")): draw.choice(
                        VALUES
                    )
                }
        return value | {key: _exchanged(value[key], draw)}
    at = draw.randrange(len(value))
    match draw.randrange(6):
        case 0:
            return value[:at] + value[at + 1 :]
        case 1:
            return [*value, value[at]]
    return [*value[:at], _exchanged(value[at], draw), *value[at + 1 :]]


def mutated_bytes(data: bytes, draw: random.Random, pieces: Sequence[bytes]) -> bytes:
    """A few bytes gone, doubled, flipped, or exchanged for a piece."""
    start = draw.randrange(len(data) + 1)
    end = min(len(data), start + draw.choice((0, 1, 1, 2, 8, 64)))
    match draw.randrange(5):
        case 0:
            middle = b""
        case 1:
            middle = data[start:end] * 2
        case 2:
            middle = bytes(byte ^ 1 << draw.randrange(8) for byte in data[start:end])
        case 3:
            middle = draw.choice(pieces)
        case _:
            middle = draw.randbytes(end - start)
    return data[:start] + middle + data[end:]


# --- what drives them

READERS: dict[str, Callable[[Path], Reader]] = {"recipe": recipe_reader, "rows": row_reader}
Limit = Callable[[Tally], bool]


def limit(seconds: float | None, executions: int | None) -> Limit:
    """Whether a tally has come to its end."""
    return lambda tally: (
        bool(executions and tally.executions >= executions)
        or bool(seconds and time.perf_counter() - tally.began >= seconds)
    )


def warmed(name: str, folder: Path, findings: Path) -> Tally:
    """A reader in the current folder, with everything imported that its own inputs need."""
    reader = READERS[name](folder)
    tally = Tally(reader, findings)
    for seed in reader.seeds:
        tally.execute(seed)
    tally.slowest, tally.began = 0.0, time.perf_counter()
    return tally


def drive(tally: Tally, done: Limit, seed: int) -> None:
    """Mutate seeds, and what was refused in a new way, at random."""
    draw, pool = random.Random(seed), list(tally.reader.seeds)
    while not done(tally):
        data = draw.choice(pool)
        for _ in range(draw.choice((1, 1, 2, 3, 5))):
            data = tally.reader.mutate(data, draw)[:MAX_INPUT]
        if tally.execute(data) and len(pool) < POOL:
            pool.append(data)


def drive_by_coverage(
    atheris: Any, tally: Tally, done: Limit, seed: int, ending: Callable[[], None]
) -> None:
    """Let libFuzzer choose by what code is reached. Does not return: libFuzzer would end the process."""
    corpus = Path("corpus")
    corpus.mkdir()
    for number, data in enumerate(tally.reader.seeds):
        (corpus / str(number)).write_bytes(data)

    def one(data: bytes) -> None:
        tally.execute(data)
        if done(tally):
            ending()
            os._exit(0)

    def mutate(data: bytes, size: int, number: int) -> bytes:
        draw = random.Random(number)
        if draw.random() < 0.4:
            return bytes(atheris.Mutate(data, size))
        for _ in range(draw.choice((1, 1, 2, 3))):
            data = tally.reader.mutate(data, draw)
        return data[:size]

    tally.findings.mkdir(parents=True, exist_ok=True)
    options = [
        f"-seed={seed + 1}", f"-max_len={MAX_INPUT}", "-timeout=0", "-rss_limit_mb=8192", "-verbosity=0",
        f"-artifact_prefix={tally.findings}/{tally.reader.name}-", str(corpus),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options], one, custom_mutator=mutate)
    atheris.Fuzz()


def child(arguments: argparse.Namespace) -> None:
    """One reader in a process of its own; its tally goes to a file."""
    folder = Path.cwd()
    done = limit(arguments.seconds, arguments.executions)

    def ending() -> None:
        arguments.child.write_text(json.dumps(tally.to_json()))

    atheris = found_atheris() if arguments.engine == "atheris" else None
    if atheris is None:
        tally = warmed(arguments.reader, folder, arguments.findings)
        drive(tally, done, arguments.seed)
        ending()
        return
    with atheris.instrument_imports(include=["qlora"]):  # with yaml it is three times slower
        tally = warmed(arguments.reader, folder, arguments.findings)
    drive_by_coverage(atheris, tally, done, arguments.seed, ending)


def found_atheris() -> Any:
    try:
        return importlib.import_module("atheris")
    except ImportError:
        return None


def fuzz(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The tally of one reader, also if its process ended before its time."""
    with tempfile.TemporaryDirectory(prefix="qlora-fuzz-", dir=in_memory()) as made:
        out = Path(made) / "tally.json"
        folder = Path(made) / "work"
        folder.mkdir()
        command = [
            sys.executable, str(Path(__file__).resolve()), "--child", str(out), "--reader", name,
            "--engine", arguments.engine, "--seed", str(arguments.seed),
            "--findings", str(arguments.findings.resolve()),
        ]  # fmt: skip
        for option in ("seconds", "executions"):
            if value := getattr(arguments, option):
                command += [f"--{option}", str(value)]
        done = subprocess.run(
            command, cwd=folder, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        if out.exists():
            return dict(json.loads(out.read_text()))
        kept = arguments.findings / f"{name}-ended"
        shutil.copytree(folder, kept, dirs_exist_ok=True, ignore=shutil.ignore_patterns("corpus"))
        said = "\n".join(done.stderr.strip().splitlines()[-20:])
        print(f"the process of {name} ended with {done.returncode}:\n{said}", file=sys.stderr)
        return {"findings": {f"the process ended with {done.returncode}": kept.name}}


def in_memory() -> str | None:
    """A folder that is kept in memory, if there is one: files are rewritten much faster there."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def row(name: str, tally: dict[str, Any]) -> tuple[str, ...]:
    """A reader's line of the table."""
    return (
        name, f"{tally.get('executions', 0):,}", f"{tally.get('per_second', 0):,}",
        f"{tally.get('accepted', 0):,}",
        ", ".join(f"{kind} {count:,}" for kind, count in tally.get("refused", {}).items()),
        str(tally.get("ways_refused", 0)), f"{tally.get('slowest_seconds', 0):.3f} s",
        f"{tally.get('peak_megabytes', 0)} MB", str(len(tally["findings"])),
    )  # fmt: skip


HEADINGS = (
    "reader", "executions", "per second", "accepted", "refused", "in ways", "slowest", "memory", "findings",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--seconds", type=positive, help="in all (60, if --executions is not given)")
    made.add_argument("--executions", type=positive, help="of each reader")
    made.add_argument("--reader", choices=(*READERS, "both"), default="both")
    made.add_argument("--engine", choices=("atheris", "random"), help="atheris, if it is there")
    made.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    made.add_argument("--findings", type=Path, default=ROOT / "build" / "fuzz", metavar="FOLDER")
    made.add_argument("--out", type=Path, metavar="FILE", help="write the figures there as JSON")
    made.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return made


def main() -> None:
    arguments = parser().parse_args()
    if arguments.child:
        child(arguments)
        return
    if not arguments.engine:
        arguments.engine = "atheris" if found_atheris() else "random"
    elif arguments.engine == "atheris" and not found_atheris():
        parser().error("atheris is not installed; `make fuzz` brings it where it has a build")
    if not arguments.executions:
        arguments.seconds = arguments.seconds or 60
    names = list(READERS) if arguments.reader == "both" else [arguments.reader]
    if arguments.seconds:
        arguments.seconds = max(1, arguments.seconds // len(names))
    tallies = {name: fuzz(name, arguments) for name in names}
    print(table(HEADINGS, [row(name, tally) for name, tally in tallies.items()]))
    found = {what: file for tally in tallies.values() for what, file in tally["findings"].items()}
    for what, file in found.items():
        print(f"found: {what}: {arguments.findings / file}")
    if arguments.out:
        engine = arguments.engine
        if engine == "atheris":
            engine += f" {importlib.metadata.version('atheris')}"
        about = {**circumstances(), "engine": engine, "seed": arguments.seed}
        report({**about, "readers": tallies}, arguments.out)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
