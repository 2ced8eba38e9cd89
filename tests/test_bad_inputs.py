"""Bad inputs through the front door: each ends in a short message with its address, or in a counted note.

The table is :data:`CASES`. ``scripts/torture_inputs.py`` prints what every one of them gets.
"""

from __future__ import annotations

import contextlib
import errno
import http.server
import io
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from conftest import save_tiny

from qlora import cli

PRIVATE = "marzipan"  # stands in every bad row; no error may repeat it
MAX_LINES = 12
MAX_SECONDS = 5.0  # for any answer; the libraries retry an absent hub for most of a minute

RECIPE = """\
model:
  name: BASE
data:
  train: rows.jsonl
  max_length: 128
  held_out_fraction: 0
lora:
  r: 4
train:
  max_steps: 1
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 1
  learning_rate: 1e-2
  warmup_steps: 0
  activation_checkpointing: false
run:
  dir: runs
"""


# --- what a case is given, and what it gets


class Shelf:
    """What is slow to make and only copied: a random base, and a run of two steps on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def warm(self) -> None:
        """Make all of it now, and load what every verb loads: what a case takes is its own time."""
        assert self.run

    @cached_property
    def base(self) -> Path:
        """A random Llama of two layers."""
        return save_tiny(self.folder / "base")

    @cached_property
    def run(self) -> Path:
        """A finished run on it."""
        with pytest.MonkeyPatch.context() as patch:
            (self.folder / "made").mkdir()
            desk = Desk(self.folder / "made", self, patch)
            desk.rows()
            outcome = ask([*desk.words("train"), "train.max_steps=2", "run.name=made"], patch)
            assert outcome.code == 0, outcome.err
        (run,) = (self.folder / "made" / "runs" / "made").iterdir()
        return run


class Desk:
    """A folder to put a bad input in, as the current one."""

    def __init__(self, folder: Path, shelf: Shelf, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.shelf, self.patch = folder, shelf, patch
        self.closing = contextlib.ExitStack()
        patch.chdir(folder)
        patch.setenv("QLORA_CACHE", str(folder / "cache"))
        patch.setenv("WANDB_MODE", "disabled")
        self.rows()

    def words(self, verb: str, *overrides: str, **edits: str) -> list[str]:
        """The command on a recipe in which some lines are others; writes it."""
        lines = RECIPE.replace("BASE", edits.pop("base", str(self.shelf.base))).splitlines()
        for key, text in edits.items():
            lines = [text if line.strip().startswith(f"{key}:") else line for line in lines]
        (self.folder / "mine.yaml").write_text("\n".join(lines) + "\n")
        return [verb, "mine.yaml", *overrides]

    def rows(self, *rows: Any, name: str = "rows.jsonl") -> Path:
        """A file of rows; without any, of eight good ones."""
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows or GOOD))
        return path

    def model(self, change: Callable[[Path], None]) -> str:
        """A copy of the base that is changed."""
        folder = self.folder / "base"
        shutil.copytree(self.shelf.base, folder)
        change(folder)
        return str(folder)

    def run(self, model: str) -> Path:
        """A copy of the finished run, as if its base's folder now held another model."""
        shutil.copytree(self.shelf.run, self.folder / "runs" / "made" / self.shelf.run.name)
        run = self.folder / "runs" / "made" / self.shelf.run.name
        recipe = (run / "recipe.yaml").read_text()
        assert str(self.shelf.base) in recipe
        (run / "recipe.yaml").write_text(recipe.replace(str(self.shelf.base), model))
        return run


@dataclass(frozen=True)
class Outcome:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def said(self) -> str:
        """All of it in one line: where a message breaks does not matter."""
        return " ".join((self.err if self.code else self.out + self.err).split())


@dataclass(frozen=True)
class Case:
    """One bad input: how to make it, the exit code, and what has to be said.

    ``says`` are regular expressions: what was asked with its address, what was found, what to do.
    """

    name: str
    make: Callable[[Desk], list[str]]
    code: int
    says: tuple[str, ...]
    after: Callable[[Desk], None] = lambda desk: None
    lines: int = MAX_LINES

    def problems(self, outcome: Outcome) -> list[str]:
        """What is not as it should be."""
        found = [
            f"does not say {part!r}" for part in self.says if not re.search(part, outcome.said)
        ]
        if outcome.code != self.code:
            found.append(f"exit code {outcome.code}, not {self.code}")
        if outcome.seconds > MAX_SECONDS:
            found.append(f"took {outcome.seconds:.1f} s")
        if outcome.code:
            lines = len(outcome.err.splitlines())
            if lines > self.lines:
                found.append(f"{lines} lines, not {self.lines}")
            if PRIVATE in outcome.err or "Traceback" in outcome.err:
                found.append("shows a row's content, or a traceback")
        return found

    def line(self, outcome: Outcome) -> str:
        """The first line of the message, or the line of what is printed that holds the first note."""
        lines = (outcome.err if outcome.code else outcome.out).splitlines()
        if outcome.code:
            return next(iter(lines), "").removeprefix("qlora: ")
        return next((line.strip() for line in lines if re.search(self.says[0], line)), "")

    def silent(self, outcome: Outcome) -> bool:
        """Whether the input went through with none of what has to be said."""
        return not outcome.code and not any(re.search(part, outcome.said) for part in self.says)


def ask(words: list[str], patch: pytest.MonkeyPatch) -> Outcome:
    """The command line, in this process."""
    out, err, began, code = io.StringIO(), io.StringIO(), time.perf_counter(), 0
    patch.setattr(sys, "argv", ["qlora", *words])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
        except Exception:  # noqa: BLE001 - what a user would be shown
            traceback.print_exc()
            code = 1
    return Outcome(code, out.getvalue(), err.getvalue(), time.perf_counter() - began)


def answer(case: Case, shelf: Shelf, folder: Path, patch: pytest.MonkeyPatch) -> Outcome:
    """What a case gets. ``shelf`` has to be warm for the time to mean anything."""
    desk = Desk(folder, shelf, patch)
    with desk.closing:
        outcome = ask(case.make(desk), patch)
    case.after(desk)
    return outcome


# --- ways to make an input


GOOD = [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}."} for n in range(1, 9)]
TALK = [
    {
        "messages": [
            {"role": "user", "content": f"Hi {n}."},
            {"role": "assistant", "content": "Yes?"},
        ]
    }
    for n in range(1, 9)
]


def rows(
    *bad: Any, good: list[Any] = GOOD, asked: tuple[str, ...] = ()
) -> Callable[[Desk], list[str]]:
    """`qlora data` on eight good rows and these behind them: the first bad one is line 9."""

    def make(desk: Desk) -> list[str]:
        desk.rows(*good, *bad)
        return desk.words("data", *asked)

    return make


def messages(*turns: tuple[str, Any], asked: tuple[str, ...] = ()) -> Callable[[Desk], list[str]]:
    """Eight good conversations, then one of these turns."""
    row = {"messages": [{"role": role, "content": said} for role, said in turns]}
    return rows(row, good=TALK, asked=asked)


def raw(text: bytes, name: str = "rows.jsonl", *asked: str) -> Callable[[Desk], list[str]]:
    """`qlora data` on a file of these bytes."""

    def make(desk: Desk) -> list[str]:
        (desk.folder / name).write_bytes(text)
        return desk.words("data", f"data.train={name}", *asked)

    return make


def asked(*overrides: str, verb: str = "data") -> Callable[[Desk], list[str]]:
    """Good rows, and a wrong setting on the command line."""
    return lambda desk: desk.words(verb, *overrides)


def written(verb: str = "data", **edits: str) -> Callable[[Desk], list[str]]:
    """Good rows, and a wrong line in the recipe."""
    return lambda desk: desk.words(verb, **edits)


def base(
    change: Callable[[Path], None],
    verb: str = "data",
    *asked: str,
    rows: list[Any] = GOOD,
) -> Callable[[Desk], list[str]]:
    """Good rows, and a base that is changed."""

    def make(desk: Desk) -> list[str]:
        desk.rows(*rows)
        return desk.words(verb, *asked, base=desk.model(change))

    return make


def of_json(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change one JSON file of a base."""

    def edit(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return edit


def weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the tensors of a base."""

    def edit(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit


def on_card(
    capability: tuple[int, int], gib: float, *overrides: str, verb: str = "train"
) -> Callable[[Desk], list[str]]:
    """Good rows on a machine with another card."""

    def make(desk: Desk) -> list[str]:
        from qlora import hardware
        from qlora.cards import Card

        card = Card("Made-up Card", "cuda", int(gib * 2**30), int(gib * 2**30), capability)
        desk.patch.setattr(hardware, "card", lambda: card)
        return desk.words(verb, *overrides)

    return make


LARGE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8192,
    "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def too_large(desk: Desk) -> list[str]:
    return on_card(
        (8, 9), 8, f"model.name={desk.model(of_json('config.json', lambda c: c.update(LARGE)))}"
    )(desk)


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def template(text: str) -> Callable[[Path], None]:
    """Give a base this chat template."""

    def edit(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(text)

    return edit


def other_words(vocabulary: dict[str, Any]) -> None:
    """Another tokenizer of the same size: two words change places."""
    words = vocabulary["model"]["vocab"]
    one, other = list(words)[1000:1002]
    words[one], words[other] = words[other], words[one]


def chat(change: Callable[[Path], None]) -> Callable[[Desk], list[str]]:
    """`qlora chat` with a run whose base is another one now."""

    def make(desk: Desk) -> list[str]:
        desk.patch.setattr(sys, "stdin", io.StringIO("Hi.\n"))
        run = desk.run(desk.model(change))
        return ["chat", str(run), "--max-new-tokens", "4"]

    return make


def spoiled(change: Callable[[Path], object]) -> Callable[[Desk], list[str]]:
    """`qlora chat` with a finished run that is damaged."""

    def make(desk: Desk) -> list[str]:
        run = desk.run(str(desk.shelf.base))
        change(run)
        return ["chat", str(run)]

    return make


def wider(folder: Path) -> None:
    shutil.rmtree(folder)
    save_tiny(folder, hidden_size=128)


class _Hub(http.server.BaseHTTPRequestHandler):
    """A hub that has one gated model and shows no other."""

    def do_HEAD(self) -> None:
        is_gated = self.path.startswith("/owner/gated/")
        self.send_response(200 if self.path.startswith("/api/models?") else 401)
        self.send_header("X-Error-Code", "GatedRepo" if is_gated else "RepoNotFound")
        self.send_header("X-Error-Message", "Access is restricted.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args: object) -> None:
        pass


def _hub_at(desk: Desk, url: str) -> None:
    from huggingface_hub import constants

    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "HF_TOKEN"):
        desk.patch.delenv(name, raising=False)
    desk.patch.setenv("HF_ENDPOINT", url)
    desk.patch.setattr(constants, "ENDPOINT", url)
    desk.patch.setattr(constants, "HF_HUB_OFFLINE", False)
    place = url + "/{repo_id}/resolve/{revision}/{filename}"
    desk.patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", place)


def of_hub(verb: str, name: str) -> Callable[[Desk], list[str]]:
    """A model of a hub that answers; there is no token."""

    def make(desk: Desk) -> list[str]:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
        desk.closing.callback(server.server_close)
        desk.closing.callback(server.shutdown)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        _hub_at(desk, f"http://127.0.0.1:{server.server_port}")
        return desk.words(verb, f"model.name={name}")

    return make


def unplugged(verb: str) -> Callable[[Desk], list[str]]:
    """Nobody answers where the hub should be."""

    def make(desk: Desk) -> list[str]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        _hub_at(desk, f"http://127.0.0.1:{port}")
        return desk.words(verb, "model.name=owner/uncached")

    return make


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4096])


def recipe_of(text: str) -> Callable[[Desk], list[str]]:
    def make(desk: Desk) -> list[str]:
        (desk.folder / "mine.yaml").write_text(text)
        return ["train", "mine.yaml"]

    return make


def full_disk(desk: Desk) -> list[str]:
    """Folders can be made and nothing can be written."""
    real = Path.write_bytes

    def write(path: Path, data: bytes) -> int:
        if path.name == ".probe":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, data)

    desk.patch.setattr(Path, "write_bytes", write)
    return desk.words("train")


def taken(desk: Desk) -> list[str]:
    """The directory of this second exists, and holds a run."""
    stamp = "20260101-120000"
    (desk.folder / "runs" / "mine" / stamp).mkdir(parents=True)
    (desk.folder / "runs" / "mine" / stamp / "result.json").write_text("{}")
    desk.patch.setattr("qlora.rundir.time.strftime", lambda *_: stamp)
    return desk.words("train")


def untouched(desk: Desk) -> None:
    old = desk.folder / "runs" / "mine" / "20260101-120000"
    assert [path.name for path in old.iterdir()] == ["result.json"]


UNPLUGGED = (
    r"model\.name is 'owner/uncached': not a folder here, not in the local hub cache",
    r"127\.0\.0\.1 cannot be reached", "download the model first",
)  # fmt: skip
GATED = (r"model\.name is 'owner/gated'", "is gated", "Accept its licence", "HF_TOKEN")
UNKNOWN = (
    r"model\.name is 'owner/nothing'",
    "does not know|not a valid model|gated",
    "HF_TOKEN|spelling",
)


USER, BOT = ("user", f"A {PRIVATE}?"), ("assistant", f"One {PRIVATE}.")
BAD_PAIR = {"prompt": f"A {PRIVATE}?", "completion": ""}
LONG = {"prompt": f"Why {PRIVATE}? " * 60, "completion": "Because."}
ENDLESS = {"prompt": "Why?", "completion": f"For {PRIVATE}. " * 60}
NINE = b"".join(json.dumps(row).encode() + b"\n" for row in GOOD)

CASES = [
    # --- files
    Case("malformed JSONL line", raw(NINE + b'{"prompt": "marzipan" "x"}\n'), 2,
         (r"rows\.jsonl:9: not valid JSON \(column 23\)", "1 of 9 rows cannot be used",
          "on_bad_row: skip")),
    Case("cut last line", raw(NINE + b'{"prompt": "marzipan", "compl'), 2,
         (r"rows\.jsonl:9: .*last line is cut short", "1 of 9 rows", "Mend or remove")),
    Case("empty file", raw(b""), 2, (r"rows\.jsonl: the file is empty \(0 bytes\)",)),
    Case("only blank lines", raw(b"\n \n\n"), 2, (r"rows\.jsonl: no rows in it",)),
    Case("empty list", raw(b"[]", "rows.json"), 2, (r"rows\.json: no rows in it",)),
    Case("lines of scalars", rows(7), 2, (r"rows\.jsonl:9: a JSON number, expected an object", "Mend")),
    Case("lines of lists", rows([PRIVATE]), 2, (r"rows\.jsonl:9: a JSON list, expected an object",)),
    Case("latin-1", raw(NINE + '{"prompt": "marzipan é", "completion": "x"}\n'.encode("latin-1")), 2,
         (r"rows\.jsonl:9: not UTF-8 at byte \d+", "LATIN1", "iconv -f LATIN1 -t UTF-8")),
    Case("UTF-16", raw(NINE.decode().encode("utf-16")), 2,
         (r"rows\.jsonl: not UTF-8 at byte 0", "UTF-16", "iconv -f UTF-16")),
    Case("BOM", raw(b"\xef\xbb\xbf" + NINE), 0, (r"rows read +8\b", r"rows that train +8\b")),
    Case("blank lines", raw(NINE.replace(b"\n", b"\n\n \n")), 0,
         (r"rows read +8\b", r"rows that train +8\b")),
    Case("lone surrogate", raw(NINE + b'{"prompt": "marzipan \\ud800", "completion": "x"}\n'), 2,
         (r"rows\.jsonl:9: prompt holds half of a surrogate pair",)),
    Case("key twice in a row", raw(NINE + b'{"prompt": "a", "prompt": "marzipan", "completion": "b"}'), 2,
         (r"rows\.jsonl:9: the key 'prompt' is there twice",)),
    Case("NaN in a row", raw(NINE + b'{"prompt": NaN, "completion": "marzipan"}\n'), 2,
         (r"rows\.jsonl:9: NaN is not JSON",)),
    Case("CSV with a field too many", raw(b"prompt,completion\na,b\nmarzipan,b,c\n", "rows.csv"), 2,
         (r"rows\.csv:3: not as many fields as the header has \(3 instead of 2\)",)),
    Case("file that is not there", asked("data.train=row.jsonl"), 2,
         (r"mine\.yaml: data\.train names '.*row\.jsonl', which is not there",
          "Did you mean 'rows.jsonl'")),
    Case("folder as data", asked("data.train=."), 2,
         (r"mine\.yaml: data\.train names '.*', which is a folder", "Name the files in it")),
    Case("kind of file nobody reads", raw(b"%PDF-1.7", "rows.pdf"), 2,
         (r"rows\.pdf: files of kind '\.pdf' are not read", r"Known endings: .*\.jsonl")),
    # --- the shape of rows
    Case("messages, then text", rows({"text": PRIVATE}, good=TALK), 2,
         (r"rows\.jsonl:9: has the columns \(text\), which is text; one format a file",
          "read as messages")),
    Case("text, then messages", rows(*TALK, good=[{"text": "Once upon a time."}] * 8), 2,
         (r"rows\.jsonl:9: has the columns \(messages\), which is messages; one format a file",
          "read as text")),
    Case("content as a list of texts", messages(USER, ("assistant", [PRIVATE])), 2,
         (r"rows\.jsonl:9: turn 2 of 'messages', part 1 has no 'type'",)),
    Case("content with an image", messages(USER, ("assistant", [{"type": "image", "url": PRIVATE}])), 2,
         (r"rows\.jsonl:9: turn 2 of 'messages', part 1 has the type 'image'; known are text",)),
    Case("content as a number", messages(USER, ("assistant", 7)), 2,
         (r"rows\.jsonl:9: turn 2 of 'messages' must be text or a list of parts, found int",)),
    Case("null content", messages(USER, ("assistant", None)), 2,
         (r"rows\.jsonl:9: turn 2 of 'messages': content is missing",)),
    Case("null completion", rows({"prompt": PRIVATE, "completion": None}), 2,
         (r"rows\.jsonl:9: column 'completion' is missing",)),
    Case("number as completion", rows({"prompt": PRIVATE, "completion": 4}), 2,
         (r"rows\.jsonl:9: completion must be text, found int",)),
    Case("prompt as list, completion as text",
         rows({"prompt": [{"role": "user", "content": PRIVATE}], "completion": "x"}), 2,
         (r"rows\.jsonl:9: prompt is a list and the other is not; .* must be text both",)),
    Case("alpaca columns", rows(good=[{"instruction": f"Say {n}.", "output": f"{n}!"} for n in range(9)]),
         0, (r"format +alpaca", "detected", r"rows that train +9\b")),
    Case("alpaca columns asked for as text",
         rows(good=[{"instruction": PRIVATE, "output": "x"}], asked=("data.format=text",)), 2,
         (r"rows\.jsonl:1: has the columns \(instruction, output\), which is alpaca", "read as text")),
    Case("columns of no known format", rows(good=[{"question": PRIVATE, "answer": "x"}]), 2,
         (r"rows\.jsonl: the columns \(answer, question\) fit no known format",
          "Known formats: messages", r"data\.columns: \{prompt: question")),
    Case("columns of two formats", rows(good=[{"text": PRIVATE, "prompt": "a", "completion": "b"}]), 2,
         (r"rows\.jsonl: the columns .* fit several formats: prompt_completion, text", r"data\.format")),
    Case("column mapped that is not there", rows(asked=("data.columns={prompt: frage}",)), 2,
         (r"data\.columns names 'frage', but rows\.jsonl has the columns prompt, completion",)),
    # --- who says what
    Case("empty messages list", messages(), 2, (r"rows\.jsonl:9: there are no turns in 'messages'",)),
    Case("empty assistant turn", messages(USER, ("assistant", "  ")), 2,
         (r"rows\.jsonl:9: turn 2 of 'messages': the answer is empty",)),
    Case("empty completion", rows(BAD_PAIR), 2, (r"rows\.jsonl:9: completion is empty", "Mend or remove")),
    Case("no assistant turn", messages(USER), 2,
         (r"rows\.jsonl:9: there is no assistant turn, so there is nothing to learn",)),
    Case("no assistant turn, loss on assistants", messages(USER, asked=("data.loss_on=assistant",)), 2,
         (r"rows\.jsonl:9: there is no assistant turn, so there is nothing to learn",)),
    Case("assistant first", messages(BOT, USER, BOT), 2,
         (r"rows\.jsonl:9: turn 1 of 'messages' is 'assistant'; at the beginning may only stand system or "
          "user",)),
    Case("user twice", messages(USER, USER, BOT), 2,
         (r"rows\.jsonl:9: turn 2 of 'messages' is 'user'; after user may only stand assistant",)),
    Case("user last", messages(USER, BOT, USER), 2,
         (r"rows\.jsonl:9: turn 3 of 'messages' is 'user', but the last must be assistant",)),
    Case("role bot", messages(USER, ("bot", PRIVATE)), 2,
         (r"rows\.jsonl:9: turn 2 of 'messages' has the role 'bot'; known are system, ",)),
    Case("message without a role", rows({"messages": [{"content": PRIVATE}]}, good=TALK), 2,
         (r"rows\.jsonl:9: turn 1 of 'messages' has no 'role'",)),
    Case("every answer marked train: false",
         rows({"messages": [{"role": "user", "content": PRIVATE},
                            {"role": "assistant", "content": "x", "train": False}]}, good=TALK), 2,
         (r"rows\.jsonl:9: every assistant turn says train: false .*, so nothing is learned",)),
    Case("every row bad", rows(good=[BAD_PAIR] * 40), 2,
         ("40 of 40 rows cannot be used", r"rows\.jsonl:1: completion is empty",
          r"rows\.jsonl:20: completion is empty", "and 20 more"), lines=22),
    Case("bad row left out", rows(BAD_PAIR, asked=("data.on_bad_row=skip",)), 0,
         ("1 rejected", r"rows\.jsonl:9: completion is empty")),
    # --- lengths
    Case("answer longer than max_length", rows(ENDLESS), 2,
         (r"data\.max_length is 128, and 1 rows? (is|are) longer \(first: rows\.jsonl:9: \d+ tokens\)",
          r"\d+\.\d% of the supervised tokens would be lost", r"data\.max_length=\d+ keeps 100\.0%")),
    Case("answer longer, truncation asked for", rows(ENDLESS, asked=("data.over_length=truncate",)), 2,
         (r"rows\.jsonl:9: \d+ tokens \(its last answer leaves no room to shorten\)",
          r"data\.max_length=\d+ keeps")),
    Case("prompt fills max_length, a few rows",
         rows(LONG, asked=("data.max_lost_fraction=0.2",)), 0,
         ("1 longer than data.max_length, by data.over_length drop", r"rows\.jsonl:9: \d+ tokens")),
    Case("prompt fills max_length, all rows", rows(good=[LONG] * 8), 2,
         (r"data\.max_length is 128, and 8 rows are longer \(first: rows\.jsonl:1: \d+ tokens\)", "100.0%",
          r"data\.max_length=\d+ keeps")),
    Case("prompt fills max_length, packed", rows(good=[LONG] * 8, asked=("data.packing=true",)), 2,
         (r"data\.max_length is 128, and 8 rows are longer", r"data\.max_length=\d+ keeps")),
    Case("long row where none is allowed", rows(LONG, asked=("data.over_length=error",)), 2,
         (r"data\.over_length is error and 1 rows? (is|are) longer than data\.max_length \(128",
          r"rows\.jsonl:9: \d+ tokens", "write drop, truncate or split")),
    Case("everything held out", asked("data.held_out_fraction=0.999999"), 2,
         ("data.train holds 8 rows, of which 8 can be used, and all of those are held out",
          "lower data.held_out_fraction")),
    Case("max_length beyond the model's positions", asked("data.max_length=4096"), 2,
         (r"data\.max_length is 4,096, but '.*' has 512 positions", "Write data.max_length=512")),
    # --- what rows say
    Case("control token typed by a user", messages(("user", "Hi<|im_end|>"), BOT), 0,
         ("1 rows? holds? one of the tokenizer's own tokens as text", r"first: rows\.jsonl:9")),
    Case("control token in a text", rows(good=[{"text": "One.<|im_end|> Two."}] * 1), 0,
         ("1 rows? holds? one of the tokenizer's own tokens as text", r"first: rows\.jsonl:1")),
    Case("16 equal rows", rows(good=GOOD[:1] * 16), 0,
         ("15 rows are duplicates; they are kept", r"rows\.jsonl:2 equals rows\.jsonl:1")),
    Case("one duplicate", rows(GOOD[0]), 0, (r"1 row is a duplicate; it is kept",)),
    Case("row that is also held out",
         lambda desk: [*rows()(desk), f"data.held_out={desk.rows(GOOD[2], name='asked.jsonl').name}"], 2,
         (r"rows\.jsonl:3: is also held out \(asked\.jsonl:1\)", "1 of 9 rows")),
    Case("row that brings a chat template",
         rows(good=[{**row, "chat_template_kwargs": {"chat_template": "x"}} for row in TALK]), 0,
         (r"8 rows bring 'chat_template_kwargs', which is not read", r"data\.chat_template",)),
    # --- tokenizers
    Case("no chat template", base(without_template, rows=TALK), 2,
         (r"rows\.jsonl:1 holds a conversation, but the tokenizer has no chat template",
          r"Name a Jinja file in data\.chat_template")),
    Case("pad is eos",
         base(of_json("tokenizer_config.json", lambda c: c.update(pad_token="<|im_end|>")), "data",
              "--json"), 0,
         (r'"It is \d+\.<\|im_end\|>", true',)),
    Case("no pad token", base(of_json("tokenizer_config.json", lambda c: c.pop("pad_token"))), 0,
         (r"The tokenizer names no pad token; '.*' (of its vocabulary )?is used",)),
    Case("template that never ends a turn",
         base(template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")), 2,
         ("the chat template closes an assistant turn with no special token",
          r"Name another template in data\.chat_template")),
    Case("template that hides turns",
         base(template("{{ messages[-1].content }}<|im_end|>")), 2,
         (r"rows\.jsonl:1: the chat template does not show turn 1 \(user\) to the model",)),
    Case("template that is no Jinja", base(template("{% for m in messages %}<|im_end|>")), 2,
         ("chat template", r"refuses|Jinja|line \d")),
    Case("no end-of-text token",
         base(of_json("tokenizer_config.json", lambda c: c.pop("eos_token"))), 2,
         (r"model\.name is '.*base', whose tokenizer has no end-of-text token", "Set eos_token in its")),
    Case("tokenizer larger than the embedding",
         base(of_json("config.json", lambda c: c.update(vocab_size=300))), 2,
         (r"the tokenizer gives token \d+, but the model's embedding has 300 rows",
          "belongs to another model")),
    Case("no tokenizer", base(lambda f: (f / "tokenizer.json").unlink()), 2,
         (r"model\.name is '.*base', whose tokenizer cannot be loaded", "Fetch the whole model again")),
    Case("pad token beyond the embedding",
         base(of_json("tokenizer_config.json", lambda c: c.update(pad_token="<|nowhere|>"))), 2,
         (r"the tokenizer pads with '<\|nowhere\|>', token 2048, .* embedding has 2,048 rows",
          r"Name a pad_token of the vocabulary in its tokenizer_config\.json")),
    Case("tokenizer configuration that is none",
         base(lambda f: (f / "tokenizer_config.json").write_text("[]") and None), 2,
         (r"model\.name is '.*base', whose tokenizer cannot be loaded",)),
    Case("tokenizer of another base, same size",
         chat(of_json("tokenizer.json", other_words)), 2,
         (r"runs/made/\S+: the run was trained with another tokenizer than '.*base' has now",
          "2,048 tokens", r"model\.name in \S+/recipe\.yaml is '.*base'",
          "name the one that the run was trained on")),
    # --- the base and its adapter
    Case("adapter of another base", chat(wider), 2,
         (r"runs/made/\S+: the run's base has hidden_size 64, and '.*base' has 128 now",
          r"model\.name in \S+/recipe\.yaml is '.*base'",
          "name the one that the run was trained on")),
    Case("adapter that is cut short",
         spoiled(lambda run: (run / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 64)), 2,
         (r"runs/made/\S+/adapter: ", "adapter does not fit this base|cannot be read|damaged")),
    Case("run without its adapter", spoiled(lambda run: shutil.rmtree(run / "adapter")), 2,
         (r"runs/made/\S+/adapter: not an adapter: adapter_config\.json is missing",)),
    Case("run of another version", spoiled(lambda run: (run / "data.json").write_text("{}")), 2,
         (r"runs/made/\S+/data\.json: does not say how the run's rows were rendered", "train again")),
    Case("all target_modules wrong", asked("lora.target_modules=[query]", verb="train"), 2,
         (r"lora\.target_modules(:| names) '?query'?,? .*matches no", "linears are q_proj, .*v_proj")),
    Case("one of two target_modules wrong",
         written("train", r="  target_modules: [q_proj, v_prj]"), 2,
         (r"lora\.target_modules(:| names) '?v_prj'?,? .*matches no", "linears are q_proj, .*v_proj")),
    Case("NaN in the base's weights",
         base(weights(lambda t: t["model.layers.1.mlp.up_proj.weight"][3, 3].fill_(float("nan"))), "train"),
         2, (r"layers\.1\.mlp\.up_proj\.weight of the base holds values that are not finite",
             "download is damaged")),
    Case("infinity in the base's embedding",
         base(weights(lambda t: t["model.embed_tokens.weight"][9, 3].fill_(float("inf"))), "train"), 2,
         (r"embed_tokens\.weight of the base holds values that are not finite",)),
    Case("NaN at one step",
         base(weights(lambda t: t["lm_head.weight"].mul_(1e38)), "train", "train.max_steps=9"), 2,
         (r"step \d: the (loss|gradient) is not a finite number", r"rows( of the batch)?: rows\.jsonl:\d",
          r"lower train\.learning_rate")),
    Case("weights that are missing",
         base(lambda f: (f / "model.safetensors").unlink(), "train"), 2,
         (r"model\.name is '.*base'", "no safetensors|is missing")),
    Case("weights that are cut", base(cut, "train"), 2, (r"model\.name is '.*base'",)),
    Case("model folder without a model", asked("model.name=."), 2,
         (r"model\.name is '.*', which is not a model: there is no config\.json in it",
          "Name a folder written by save_pretrained, or a hub id")),
    # --- recipes
    Case("unknown key", written(r="  rank: 4"), 2,
         (r"mine\.yaml:8: unknown key 'lora\.rank'", "did you mean 'r'")),
    Case("unknown section", written(lora="lorra:"), 2,
         (r"mine\.yaml:7: unknown key 'lorra'", "did you mean 'lora'")),
    Case("key of another section", written(max_length="  learning_rate: 1e-4"), 2,
         (r"mine\.yaml:5: unknown key 'data\.learning_rate'", "did you mean 'train.learning_rate'")),
    Case("missing key", written(name="  revision: main"), 2,
         (r"mine\.yaml:1: 'model\.name' is missing", "A folder with safetensors, a hub id")),
    Case("synonym of a key", written(learning_rate="  lr: 2e-4"), 2,
         (r"mine\.yaml:13: unknown key 'train\.lr'", "did you mean 'learning_rate'")),
    Case("learning rate as YAML 1.1's text", written(learning_rate="  learning_rate: 2e-4"), 0,
         (r"rows that train +8\b",)),
    Case("learning rate as text on the command line",
         lambda desk: ["recipes", "show", "mine.yaml", "train.learning_rate=2e-4"]
         if desk.words("recipes") else [], 0, (r"learning_rate: 0\.0002",)),
    Case("learning rate as a word", written(learning_rate='  learning_rate: "fast"'), 2,
         (r"mine\.yaml:13: 'train\.learning_rate' must be a number; found the text 'fast'",)),
    Case("learning rate of a million", written(learning_rate="  learning_rate: 1e6"), 2,
         (r"mine\.yaml:13: 'train\.learning_rate' must be less than 1; found 1000000\.0",)),
    Case("negative learning rate", asked("train.learning_rate=-1e-4"), 2,
         (r"command line: 'train\.learning_rate' must be greater than 0; found -0\.0001",)),
    Case("steps as a word", written(max_steps="  max_steps: four"), 2,
         (r"mine\.yaml:10: 'train\.max_steps' must be a whole number; found the text 'four'",)),
    Case("batch of zero", written(per_device_train_batch_size="  per_device_train_batch_size: 0"), 2,
         (r"mine\.yaml:11: 'train\.per_device_train_batch_size' must be .* equal to 1; found 0",
          )),
    Case("negative batch", asked("train.per_device_train_batch_size=-4"), 2,
         (r"command line: 'train\.per_device_train_batch_size' must be .* equal to 1; found -4",
          )),
    Case("accumulation of zero", asked("train.gradient_accumulation_steps=0"), 2,
         (r"command line: 'train\.gradient_accumulation_steps' must be .* 1; found 0",)),
    Case("rank of zero", written(r="  r: 0"), 2, (r"mine\.yaml:8: 'lora\.r' must be .* 1; found 0",)),
    Case("negative max_length", written(max_length="  max_length: -5"), 2,
         (r"mine\.yaml:5: 'data\.max_length' must be greater than or equal to 8; found -5",)),
    Case("max_length of zero", asked("data.max_length=0"), 2,
         (r"command line: 'data\.max_length' must be greater than or equal to 8; found 0",)),
    Case("true as a number", written(max_steps="  max_steps: true"), 2,
         (r"mine\.yaml:10: 'train\.max_steps' must be a whole number; found True",)),
    Case("NaN as a learning rate", written(learning_rate="  learning_rate: .nan"), 2,
         (r"mine\.yaml:13: 'train\.learning_rate' must be a finite number; found nan",)),
    Case("key twice", written(r="  r: 4\n  r: 8"), 2,
         (r"mine\.yaml:9: 'lora\.r' is set twice \(first on line 8\)", "Keep one")),
    Case("recipe that is no YAML", written(r="  r: [4"), 2, (r"mine\.yaml:\d+: not valid YAML",)),
    Case("empty recipe", recipe_of(""), 2, (r"mine\.yaml: the file is empty", "qlora init")),
    Case("data file as a recipe", lambda desk: ["train", desk.rows().name], 2,
         (r"rows\.jsonl: a data file, not a recipe", r"qlora init rows\.jsonl --model")),
    Case("two settings that contradict each other",
         written(learning_rate="  learning_rate: 1e-4\n  kernels: 'off'\n  mlp_tile: 64"), 2,
         (r"mine\.yaml:15: train\.mlp_tile is about the layers of .*, and train\.kernels is off",
          "Leave one of the two out")),
    Case("two settings that contradict each other, by the command line",
         asked("train.kernels=off", "train.mlp_tile=64"), 2,
         (r"command line: train\.mlp_tile is about the layers", "Leave one of the two out")),
    Case("unknown optimizer", asked("train.optim=adam9", verb="train"), 2,
         (r"train\.optim is 'adam9', which is no optimizer of transformers", "Write auto|Did you mean")),
    Case("unknown field of SFTConfig", asked("train.sft_config={packign: true}", verb="train"), 2,
         (r"train\.sft_config", "packign")),
    Case("value of an SFTConfig field",
         asked("train.sft_config={label_smoothing_factor: much}", verb="train"), 2,
         (r"train\.sft_config\.label_smoothing_factor must be a number; found 'much'",)),
    Case("seed beyond 32 bits", asked("train.seed=1099511627776", verb="train"), 2,
         (r"command line: 'train\.seed' must be less than .*; found 1099511627776",)),
    Case("weight for one of two sources",
         lambda desk: desk.words(
             "data", f"data.train=[{{name: rows.jsonl, weight: 2}}, {desk.rows(name='b.jsonl').name}]"), 2,
         (r"command line: data\.train gives some sources a weight and '.*b\.jsonl' none",
          "give every source one, or none")),
    Case("a token in the recipe", written(dir="  project: hf_" + "a" * 34), 2,
         (r"mine\.yaml(:17)?: 'run\.project' looks like a secret", "HF_TOKEN")),
    # --- the machine
    Case("bf16 on a T4", on_card((7, 5), 15, "quant.compute_dtype=bfloat16"), 2,
         (r"quant\.compute_dtype is bfloat16, which the Made-up Card does not compute in",
          r"compute capability 8\.0", "Write auto or float16")),
    Case("bf16 planned for a T4",
         lambda desk: [*desk.words("plan", "quant.compute_dtype=bfloat16"), "--card", "t4"], 2,
         (r"quant\.compute_dtype is bfloat16, which the T4 does not compute in", "Write auto or float16")),
    Case("FlashAttention that is not installed",
         asked("model.attn_implementation=flash_attention_2", verb="train"), 2,
         (r"model\.attn_implementation is 'flash_attention_2'", "card of capability 8 or newer",
          "Write 'auto' or 'sdpa'")),
    Case("FlashAttention not installed on a card that could run it",
         on_card((8, 9), 24, "model.attn_implementation=flash_attention_2"), 2,
         (r"model\.attn_implementation is 'flash_attention_2'", "flash_attn", "Write 'auto' or 'sdpa'")),
    Case("packing with eager attention",
         asked("model.attn_implementation=eager", "data.packing=true", verb="train"), 0,
         (r"packing +on, proven on this model: logits move by 0",)),
    Case("warmup longer than the run", asked("train.warmup_steps=9", verb="train"), 2,
         ("warmup", "the run")),
    Case("unknown card", lambda desk: [*desk.words("plan"), "--card", "rtx9999"], 2,
         ("'rtx9999' is not a card known here", "12GB")),
    Case("model too large", too_large, 2,
         (r"needs \d+\.\d+ GiB", r"8\.0 GiB", "siblings?|Cheapest|smaller|would fit")),
    Case("run directory under a file", asked("run.dir=rows.jsonl/runs", verb="train"), 2,
         (r"run\.dir is '.*rows\.jsonl/runs', but .* cannot be written: Not a directory",
          r"Choose another with run\.dir=DIR")),
    Case("read-only disk", asked("run.dir=/proc/runs", verb="train"), 2,
         (r"run\.dir is '/proc/runs', but /proc/runs/.* cannot be written", r"run\.dir=DIR")),
    Case("full disk", full_disk, 2,
         (r"run\.dir is '.*runs', but .* cannot be written: No space left", r"run\.dir=DIR")),
    Case("run directory that exists", taken, 0, (r"runs/mine/20260101-120000-2",), untouched),
    Case("finished run resumed",
         lambda desk: [*desk.words("train"), "--resume", str(desk.run(str(desk.shelf.base)))], 2,
         ("this run has finished; there is nothing to resume",)),
    Case("recipe that exists",
         lambda desk: ["init", "rows.jsonl", "--model", str(desk.shelf.base), "--out", desk.words("x")[1]],
         2, (r"mine\.yaml: exists already", "--out")),
    Case("uncached model without a network, to train", unplugged("train"), 2, UNPLUGGED),
    Case("uncached model without a network, to plan", unplugged("plan"), 2, UNPLUGGED),
    Case("uncached model offline", asked("model.name=owner/uncached", verb="train"), 2,
         (r"model\.name is 'owner/uncached': not a folder here", "HF_HUB_OFFLINE forbids asking")),
    Case("gated model without a token, to train", of_hub("train", "owner/gated"), 2, GATED),
    Case("gated model without a token, to plan", of_hub("plan", "owner/gated"), 2, GATED),
    Case("model that the hub does not know, to train", of_hub("train", "owner/nothing"), 2, UNKNOWN),
    Case("model that the hub does not know, to plan", of_hub("plan", "owner/nothing"), 2, UNKNOWN),
    Case("hub data set offline", asked("data.train=hub:owner/name"), 2,
         (r"data\.train names 'hub:owner/name' \(split 'train'\), which cannot be read",
          "HF_HUB_OFFLINE", "download it and name the files")),
]  # fmt: skip
NAMES = [case.name for case in CASES]


# --- the table, asked


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    found = Shelf(tmp_path_factory.mktemp("shelf"))
    found.warm()
    yield found


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_bad_input_is_told_with_its_address_and_what_to_do(
    case: Case, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = answer(case, shelf, tmp_path, monkeypatch)
    assert case.problems(outcome) == [], outcome.out[-3000:] + outcome.err
    assert not case.silent(outcome)


def test_the_table_is_whole() -> None:
    assert len(CASES) >= 57 and len(set(NAMES)) == len(CASES)
    assert all(case.says for case in CASES)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("made", ["the same base", "another template", "before digests were kept"])
def test_a_run_is_spoken_to_where_its_words_mean_the_same(
    made: str, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is refused above is refused for its vocabulary, and for nothing else."""
    changes: dict[str, Callable[[Path], None]] = {
        "the same base": lambda folder: None,
        "another template": template("{{ messages[-1].content }}<|im_end|>"),
        "before digests were kept": of_json("tokenizer.json", other_words),
    }
    desk = Desk(tmp_path, shelf, monkeypatch)
    words = chat(changes[made])(desk)
    if made == "before digests were kept":
        of_json("data.json", lambda kept: kept.pop("vocabulary"))(Path(words[1]))
    outcome = ask(words, monkeypatch)
    assert (outcome.code, outcome.err) == (0, "")
    assert re.search("^tuned ", outcome.out, re.MULTILINE)


def test_the_check_sees_each_way_of_being_wrong() -> None:
    case = Case("", lambda desk: [], 2, ("rows.jsonl:9",))
    good = Outcome(2, "", "qlora: rows.jsonl:9: empty\n", 0.1)
    assert not case.problems(good) and not case.silent(good)
    for wrong in (
        Outcome(2, "", f"qlora: rows.jsonl:9: {PRIVATE}\n", 0.1),
        Outcome(2, "", "qlora: rows.jsonl:9\nTraceback (most recent call last):\n", 0.1),
        Outcome(2, "", "qlora: rows.jsonl:9\n" * 13, 0.1),
        Outcome(2, "", "qlora: rows.jsonl\n", 0.1),
        Outcome(1, "", "qlora: rows.jsonl:9\n", 0.1),
        Outcome(2, "", "qlora: rows.jsonl:9\n", 6.0),
    ):
        assert len(case.problems(wrong)) == 1 and not case.silent(wrong)
    assert case.silent(Outcome(0, "done\n", "", 0.1))
