"""What `qlora data` shows is what training would be given, row by row and token by token."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from io import StringIO
from itertools import groupby
from typing import Any, NamedTuple

import pytest
from conftest import BASE, ROWS
from rich.console import Console
from transformers import AutoTokenizer

import qlora
from qlora import cli, loader, preview


@pytest.fixture(scope="module")
def tok():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    """A cache and a folder of its own; and nobody may read a weight."""

    def fail(*args: object, **named: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(loader, "load_base", fail)
    monkeypatch.chdir(tmp_path)


class Answer(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """`qlora data` on a recipe, in this process."""

    def call(recipe: Any, *words: str) -> Answer:
        (tmp_path / "mine.yaml").write_text(recipe.dump())
        monkeypatch.setattr(sys, "argv", ["qlora", "data", "mine.yaml", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        code = caught.value.code
        return Answer(code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(row: dict[str, str]) -> list[tuple[str, bool]]:
    """What the embedded base's template makes of a row, and which of it is the answer."""
    before = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
    return [(before, False), (f"{row['completion']}<|im_end|>", True), ("\n", False)]


def figures(tok: Any, row: dict[str, str]) -> tuple[int, int]:
    """(tokens, tokens that train), counted without our code."""

    def count(text: str) -> int:
        return len(tok(text, add_special_tokens=False)["input_ids"])

    return count("".join(text for text, _ in texts(row))), count(texts(row)[1][0])


def cells(out: str, name: str) -> list[str]:
    """The figures of the first line that is called so."""
    (line, *_) = [line for line in out.splitlines() if re.match(rf" *{re.escape(name)}  ", line)]
    return line.strip().removeprefix(name).split()


def section(out: str, title: str) -> str:
    """From a title to the next one."""
    return re.split(r"\n\n(?=\S)", out[out.index(f"{title}\n") :])[0]


def row_of(out: str, title: str) -> str:
    """One rendered row, its gutter taken away."""
    lines = out[out.index(f"  {title}") :].splitlines()[1:]
    shown = [line.removeprefix("  │ ") for line in lines]
    return "\n".join(shown[: next((i for i, line in enumerate(lines) if "│" not in line), None)])


ALL = {"data__held_out_fraction": 0.0}


# --- the figures


def test_every_figure_of_one_source_is_right(make_recipe, tok, told):
    counted = [figures(tok, row) for row in ROWS]
    tokens, learned = (sum(column) for column in zip(*counted, strict=True))
    lengths = sorted(length for length, _ in counted)
    answer = told(make_recipe(**ALL))
    assert (answer.code, answer.err) == (0, "")
    out = answer.out
    sources = section(out, "sources")
    assert "through the chat template" in sources and "data.max_length: 128" in sources
    assert cells(sources, "format") == ["prompt_completion"] and "detected" in sources
    for name, number in (
        ("rows read", 40), ("rejected", 0), ("of them leaked", 0), ("held out", 0), ("over-long", 0),
        ("not drawn (weights)", 0), ("rows that train", 40), ("tokens", tokens), ("supervised", learned),
    ):  # fmt: skip
        assert cells(sources, name) == [f"{number:,}"]
    assert cells(sources, "of its tokens") == [f"{learned / tokens:.1%}"]
    assert cells(sources, "of all supervised") == ["100.0%"]
    assert "nothing: every row trains" in section(out, "left out, or worth a look")
    totals = section(out, "totals")
    share = f"{learned / tokens:.1%}"
    assert cells(totals, "train") == ["40", f"{tokens:,}", f"{learned:,}", share, str(lengths[-1])]
    assert cells(totals, "held out")[:3] == ["0", "0", "0"]
    assert cells(totals, "assistant turn 1") == ["40", f"{learned:,}", f"{learned:,}", "100.0%"]
    assert cells(totals, "the rest") == [f"{tokens - learned:,}", "0", "0.0%"]
    said = section(out, "lengths of the rows that train, in tokens")
    assert f"median {lengths[19]};" in said and f"longest {lengths[-1]}" in said
    assert f"90% have at most {lengths[35]}, 99% at most {lengths[39]};" in said
    bars = re.findall(r"^ +(\d+)-(\d+)  (█*) ?(\d+)$", said, re.M)
    assert sum(int(count) for *_, count in bars) == 40
    for low, high, bar, count in bars:
        assert int(count) == sum(int(low) <= length <= int(high) for length in lengths)
        assert bool(bar) == (count != "0")
    serving = section(out, "training beside serving")
    assert "16 rows were asked as `qlora chat` asks: the same tokens as in training" in serving
    assert cells(serving, "<|im_start|>") == ["1", "80"]
    assert cells(serving, "<|im_end|>") == ["2", "80"]


def test_sections_come_in_the_order_of_the_questions(make_recipe, told):
    titles = re.findall(r"^\S.*$", told(make_recipe()).out, re.M)
    assert titles == [
        "sources", "left out, or worth a look", "totals", "lengths of the rows that train, in tokens",
        "packing", "training beside serving", "rows",
    ]  # fmt: skip


def test_two_sources_stand_beside_each_other_with_their_shares(make_recipe, tok, told, tmp_path):
    second = [{"prompt": f"Count to {n}.", "completion": "One, two. " * n} for n in range(1, 9)]
    path = tmp_path / "b.csv"
    path.write_text(
        "prompt,completion\n" + "".join(f'"{r["prompt"]}","{r["completion"]}"\n' for r in second)
    )
    recipe = make_recipe(
        data__train=[
            str(tmp_path / "rows.jsonl"),
            {"name": str(path), "format": "prompt_completion"},
        ],
        **ALL,
    )
    sources = section(told(recipe).out, "sources")
    both = [[figures(tok, row) for row in rows] for rows in (ROWS, second)]
    learned = [sum(n for _, n in one) for one in both]
    assert "rows.jsonl" in sources and "b.csv" in sources
    assert cells(sources, "rows that train") == ["40", "8"]
    assert cells(sources, "tokens") == [f"{sum(n for n, _ in one):,}" for one in both]
    assert cells(sources, "supervised") == [f"{n:,}" for n in learned]
    assert cells(sources, "of all supervised") == [f"{n / sum(learned):.1%}" for n in learned]
    assert re.search(r"detected +asked for", sources)


def test_many_sources_do_not_make_lines_wider_than_the_screen(make_recipe, tmp_path):
    names = [write(tmp_path / f"source-{n:02}.jsonl", ROWS[n : n + 2]) for n in range(12)]
    seen = preview.preview(make_recipe(data__train=names, **ALL))
    told = StringIO()
    seen.print(Console(file=told, width=80))
    lines = section(told.getvalue(), "sources").splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.count(".jsonl") for line in lines) == 12
    assert sum(line.startswith("  rows that train ") for line in lines) == 4


def test_rows_that_the_weights_leave_out_are_counted(make_recipe, told, tmp_path):
    other = [
        {"prompt": f"Say {n}.", "completion": f"It is {n}, and nothing else."} for n in range(4)
    ]
    recipe = make_recipe(
        data__train=[
            {"name": str(tmp_path / "rows.jsonl"), "weight": 1},
            {"name": write(tmp_path / "b.jsonl", other), "weight": 1},
        ],
        **ALL,
    )
    answer = told(recipe)
    trained, second = map(int, cells(answer.out, "rows that train"))
    assert second == 4 and 0 < trained < 40
    assert cells(answer.out, "not drawn (weights)") == [str(40 - trained), "0"]
    totals = section(answer.out, "totals")
    assert "of all rows before the draw" in totals and "the rest" not in totals
    seen = preview.preview(recipe)
    gone = set(range(1, 41)) - {int(a.split(":")[1]) for a in seen.prepared.train["address"][:]}
    out = told(recipe, "--row", f"rows.jsonl:{min(gone)}").out
    assert "not drawn: the weights of data.train leave it out" in section(out, "rows")


def test_packing_says_what_is_computed_for_nothing(make_recipe, tok, told):
    recipe = make_recipe(train__per_device_train_batch_size=4, **ALL)
    packing = section(told(recipe).out, "packing")
    assert "tried on 10 of 10 steps of an epoch (at most 200), 4 rows a step" in packing
    assert "computed tokens per useful token" in packing
    for name in ("packed", "padded"):
        fill, useful, passes, cost = cells(packing, name)
        assert float(cost) == pytest.approx(100 / float(useful.rstrip("%")), abs=0.006)
        assert 0 < float(fill.rstrip("%")) <= 100 and float(passes) >= 1
    # Four rows padded to a step's longest: any order of 40 rows gives ten such steps.
    total = sum(figures(tok, row)[0] for row in ROWS)
    assert cells(packing, "padded")[0] == f"{total / (10 * 4 * 128):.1%}"


def test_later_turns_are_told_one_by_one_and_a_difference_is_named(
    make_recipe, tok, told, tmp_path
):
    talks = [
        {"messages": [
            {"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."},
            {"role": "user", "content": f"And {n}?"}, {"role": "assistant", "content": f"Also {n}."},
        ]}
        for n in range(5)
    ]  # fmt: skip
    train = write(tmp_path / "t.jsonl", talks)
    recipe = make_recipe(data__train=train, data__loss_on="last_assistant", **ALL)
    totals = section(told(recipe).out, "totals")

    def count(said: str) -> int:
        return len(tok(f"{said}<|im_end|>", add_special_tokens=False)["input_ids"])

    second = sum(count(f"Also {n}.") for n in range(5))
    assert cells(totals, "assistant turn 1") == ["5", str(5 * count("Good day.")), "0", "0.0%"]
    assert cells(totals, "assistant turn 2") == ["5", str(second), str(second), "100.0%"]
    template = tmp_path / "t.jinja"  # earlier answers lose their full stop
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and not loop.last %}<think></think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    recipe = make_recipe(data__train=train, data__chat_template=str(template), **ALL)
    serving = section(told(recipe).out, "training beside serving")
    assert re.search(r"5 rows were asked as `qlora chat` asks, and differ", serving)
    assert "5 rows: an earlier answer trains in another form" in serving
    assert serving.count("an earlier answer trains in another form") == 1


def test_more_turns_than_fit_are_told_together(make_recipe, told, tmp_path):
    talk = [
        {"role": role, "content": f"{role} {n}"}
        for n in range(15)
        for role in ("user", "assistant")
    ]
    train = write(tmp_path / "t.jsonl", [{"messages": talk}] * 2)
    totals = section(
        told(make_recipe(data__train=train, data__max_length=512, **ALL)).out, "totals"
    )
    assert cells(totals, "assistant turn 12")[0] == "2"
    assert cells(totals, "assistant turns 13 to 15")[0] == "6"


# --- rows that are left out, and what became of one


@pytest.fixture
def mixed(make_recipe, tmp_path):
    """Forty rows, a duplicate, a broken line, one without an answer, a leaked one and an over-long one."""
    held = write(tmp_path / "held.jsonl", [{"prompt": "Who?", "completion": "Nobody."}])
    lines = [json.dumps(row) for row in [*ROWS, ROWS[2]]]
    lines += ['{"prompt": "broken', '{"prompt": "And?", "completion": ""}']
    lines += [json.dumps({"prompt": "Who?", "completion": "Nobody."})]
    lines += [json.dumps({"prompt": "Why? " * 90, "completion": "Because."})]
    (tmp_path / "m.jsonl").write_text("\n".join(lines) + "\n")
    return make_recipe(
        data__train=str(tmp_path / "m.jsonl"), data__held_out=held, data__on_bad_row="skip",
        data__max_lost_fraction=0.5,
    )  # fmt: skip


def test_every_row_left_out_is_listed_with_its_reason(mixed, tok, told, tmp_path):
    answer = told(mixed)
    assert answer.code == 0
    sources, out = section(answer.out, "sources"), section(answer.out, "left out, or worth a look")
    for name, number in (
        ("rows read", 45), ("rejected", 3), ("of them leaked", 1), ("over-long", 1),
        ("rows that train", 41),
    ):  # fmt: skip
        assert cells(sources, name) == [str(number)]
    (heading,) = re.findall(r"^  3 rejected, 1 of them leaked; they lie in (\S+)$", out, re.M)
    kept = [json.loads(line) for line in (tmp_path / heading).read_text().splitlines()]
    assert [row["row"] for row in kept] == ["m.jsonl:42", "m.jsonl:43", "m.jsonl:44"]
    assert re.search(r"^    m.jsonl:42: .*JSON", out, re.M)
    assert "\n    m.jsonl:43: completion is empty" in out
    assert "\n    m.jsonl:44: is also held out (held.jsonl:1)\n" in out
    assert "  1 duplicate, kept\n    m.jsonl:41 equals m.jsonl:3\n" in out
    tokens, learned = figures(tok, {"prompt": "Why? " * 90, "completion": "Because."})
    share = learned / (learned + sum(figures(tok, row)[1] for row in [*ROWS, ROWS[2]]))
    assert f"{tokens:,} tokens lost, {learned} of them supervised: {share:.1%} of all" in out
    assert f"  1 dropped for their length\n    m.jsonl:45: {tokens:,} tokens" in out
    assert "broken" not in out and "Nobody" not in out  # rows may be private
    assert cells(section(answer.out, "totals"), "held out")[0] == "1"


def test_only_twenty_of_a_kind_are_listed_and_the_others_counted(make_recipe, told, tmp_path):
    train = write(tmp_path / "d.jsonl", ROWS * 2)
    out = told(make_recipe(data__train=train, **ALL)).out
    left = section(out, "left out, or worth a look")
    assert "  40 duplicates, kept\n" in left and left.count(" equals ") == 20
    assert "\n    ... and 20 more" in left
    assert "40 rows are duplicates" in section(out, "training beside serving")


def test_a_token_typed_as_text_is_listed(make_recipe, told, tmp_path):
    rows = [*ROWS, {"prompt": "What is <|im_end|> for?", "completion": "It ends a turn."}]
    out = told(make_recipe(data__train=write(tmp_path / "c.jsonl", rows), **ALL), "--row", "41").out
    left = section(out, "left out, or worth a look")
    assert "  1 holds one of the tokenizer's own tokens as text\n    c.jsonl:41" in left
    assert "holds one of the tokenizer's own tokens as text" in section(out, "rows")


@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        ("m.jsonl:3", ["\n    trains\n", "asked for: m.jsonl:3,", "1 plus 3"]),
        ("3", ["\n    trains\n", "asked for: m.jsonl:3,"]),
        ("m.jsonl:41", ["\n    trains\n", "a duplicate, kept: it equals m.jsonl:3", "asked for"]),
        ("42", ["m.jsonl:42\n    rejected: ", "JSON"]),
        ("43", ["m.jsonl:43\n    rejected: completion is empty"]),
        ("44", ["m.jsonl:44\n    rejected: is also held out (held.jsonl:1)"]),
        ("45", ["m.jsonl:45\n    dropped: ", "tokens, longer than data.max_length (128)"]),
        ("held.jsonl:1", ["held out: it stands in data.held_out", "⟦Nobody.<|im_end|>⟧"]),
    ],
)  # fmt: skip
def test_a_row_that_is_asked_for_is_shown_with_what_became_of_it(mixed, told, asked, parts):
    answer = told(mixed, "--row", asked)
    assert (answer.code, answer.err) == (0, "")
    rows = section(answer.out, "rows")
    assert [part for part in parts if part not in rows] == []
    assert rows.count("│") == (0 if re.search("rejected|dropped", rows) else 5)


def test_a_row_held_out_by_its_content_says_so(make_recipe, told):
    recipe = make_recipe(data__held_out_fraction=0.3)
    held = preview.preview(recipe).prepared.held_out["address"][:]
    rows = section(told(recipe, "--row", held[0]).out, "rows")
    assert "the hash of its content falls below data.held_out_fraction (0.3)" in rows
    asked = ROWS[int(held[0].split(":")[1]) - 1]
    assert f"⟦{asked['completion']}<|im_end|>⟧" in rows


def test_a_held_out_row_that_is_too_long_is_not_unknown(make_recipe, told, tmp_path):
    long = {"prompt": "Why? " * 90, "completion": "Because."}
    recipe = make_recipe(
        data__held_out=write(tmp_path / "h.jsonl", [ROWS[0] | {"prompt": "?"}, long])
    )
    rows = section(told(recipe, "--row", "h.jsonl:2").out, "rows")
    assert "dropped: held out and 378 tokens, longer than data.max_length (128)" in rows


@pytest.mark.parametrize("asked", ["46", "m.jsonl:0", "other.jsonl:1", "m.jsonl", "-1", "²"])
def test_an_unknown_row_is_refused_with_the_names_of_the_files(mixed, told, asked):
    answer = told(mixed, f"--row={asked}")
    assert (answer.code, answer.out) == (2, "")
    assert "no row has this address" in answer.err and "m.jsonl, held.jsonl" in answer.err
    assert "Traceback" not in answer.err


def test_shortened_and_split_rows_say_so(make_recipe, tok, told, tmp_path):
    rows = [{"prompt": "Why? " * 90, "completion": "Because."}, ROWS[0]]
    train = write(tmp_path / "l.jsonl", rows)
    out = told(
        make_recipe(data__train=train, data__over_length="truncate", **ALL), "--row", "1"
    ).out
    tokens = figures(tok, rows[0])[0]
    assert f"  1 shortened for their length\n    l.jsonl:1: {tokens:,} tokens" in out
    assert f"shortened: it had {tokens} tokens, longer than data.max_length (128)" in out
    assert "⟦Because.<|im_end|>⟧" in out
    train = write(tmp_path / "s.jsonl", [{"text": "Once upon a time. " * 100}])
    recipe = make_recipe(data__train=train, data__over_length="split", **ALL)
    out = told(recipe, "--row", "1").out
    pieces = re.findall(r"asked for, piece (\d+) of (\d+): s.jsonl:1, (\d+) tokens", out)
    assert [int(n) for n, _, _ in pieces] == list(range(1, int(pieces[0][1]) + 1))
    assert sum(int(tokens) for *_, tokens in pieces) == len(
        tok("Once upon a time. " * 100)["input_ids"]
    ) + 1  # fmt: skip
    assert "0 tokens lost, 0 of them supervised" in out
    assert "no row was tried" in section(out, "training beside serving")


# --- which rows are shown


def test_the_first_longest_random_and_most_masked_rows_are_shown_once(
    make_recipe, tok, told, tmp_path
):
    rows = [
        {"prompt": "Hi?", "completion": f"{'Yes, ' * 6}{n}."} for n in range(9)
    ] + [{"prompt": "And then? " * 6, "completion": "No."}]  # fmt: skip
    rows.append({"prompt": "Hi?", "completion": "Yes, indeed, of course, why not? " * 5})
    train = write(tmp_path / "r.jsonl", rows)
    out = section(told(make_recipe(data__train=train, **ALL)).out, "rows")
    titles = re.findall(
        r"^  ([a-z, ]+): r.jsonl:(\d+), (\d+) tokens, (\d+) of them train \((.*)\)$", out, re.M
    )
    named = {name: int(line) for names, line, *_ in titles for name in names.split(", ")}
    assert len(titles) == len(set(named.values())) and len(named) == 4
    counted = [figures(tok, row) for row in rows]
    assert counted[10][0] == max(tokens for tokens, _ in counted)
    assert (named["first"], named["longest"], named["most masked"]) == (1, 11, 10)
    for _, line, tokens, learned, share in titles:
        expected = counted[int(line) - 1]
        assert (int(tokens), int(learned)) == expected
        assert share == f"{expected[1] / expected[0]:.1%}"
    assert row_of(out, "most masked: r.jsonl:10") == "".join(
        f"⟦{text}⟧" if trains else text for text, trains in texts(rows[9])
    )
    changed = {
        preview.preview(make_recipe(data__train=train, train__seed=seed, **ALL)).shown[2].address
        for seed in range(6)
    }
    assert len(changed) > 1  # by chance, but by the recipe's seed


def test_one_row_that_is_everything_is_shown_once_under_every_label(make_recipe, told, tmp_path):
    train = write(tmp_path / "one.jsonl", ROWS[:1])
    out = section(told(make_recipe(data__train=train, **ALL)).out, "rows")
    assert out.count("one.jsonl:1,") == 1
    assert "  first, longest, random, most masked: one.jsonl:1, " in out


def test_the_first_n_rows_are_shown_when_they_are_asked_for(make_recipe, told):
    out = section(told(make_recipe(**ALL), "--rows", "3").out, "rows")
    assert re.findall(r"^  (row \d): rows.jsonl:(\d)", out, re.M) == [
        ("row 1", "1"), ("row 2", "2"), ("row 3", "3"),
    ]  # fmt: skip
    for row in ROWS[:3]:
        assert f"⟦{row['completion']}<|im_end|>⟧" in out
    assert "none" in section(told(make_recipe(**ALL), "--rows", "0").out, "rows")
    answer = told(make_recipe(**ALL), "--rows", "1", "--row", "1")
    assert answer.code == 2 and "exclude each other" in answer.err and answer.out == ""


def test_a_long_row_loses_its_middle_on_the_screen_and_says_how_much(
    make_recipe, tok, told, tmp_path
):
    row = {"prompt": "the " * 220, "completion": "and " * 230 + "end"}
    train = write(tmp_path / "l.jsonl", [row])
    recipe = make_recipe(data__train=train, data__max_length=512, **ALL)
    tokens, learned = figures(tok, row)
    assert 400 < tokens <= 512 and tokens - learned > 200 < learned
    out = section(told(recipe).out, "rows")
    (gap,) = re.findall(
        r"^  ⋮ \.\.\. ([\d,]+) tokens are not shown here, ([\d,]+) of them", out, re.M
    )
    hidden, trains = (int(number.replace(",", "")) for number in gap)
    assert hidden == tokens - 400
    assert trains == learned - (
        200 - 1
    )  # the last 200 tokens but the template's newline are answer
    assert "end<|im_end|>⟧" in out
    alone = section(told(recipe, "--row", "1").out, "rows")
    assert "not shown" not in alone
    assert row_of(alone, "asked for") == "".join(
        f"⟦{text}⟧" if trains else text for text, trains in texts(row)
    )


# --- colour, and text that would like to be obeyed


def shown_on(seen: Any, **console: Any) -> str:
    out = StringIO()
    seen.print(Console(file=out, width=100, **console))
    return out.getvalue()


def test_a_terminal_sees_green_and_dim_and_others_see_brackets(make_recipe, monkeypatch):
    seen = preview.preview(make_recipe(**ALL), rows=1)
    colours = shown_on(seen, force_terminal=True, color_system="standard")
    answer = f"{ROWS[0]['completion']}<|im_end|>"
    assert f"\x1b[32m{answer}\x1b[0m" in colours
    assert re.search(r"\x1b\[2m<\|im_start\|>user\x1b\[0m", colours)
    assert "⟦" not in colours and "\x1b[32m  green\x1b[0m trains" in colours
    for plain in (
        shown_on(seen, force_terminal=False),
        shown_on(seen, force_terminal=True, color_system="standard", no_color=True),
        shown_on(seen, force_terminal=True, color_system=None),
    ):
        assert f"⟦{answer}⟧" in plain and "⟦text in such brackets⟧ trains" in plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert f"⟦{answer}⟧" in shown_on(seen, force_terminal=True, color_system="standard")


HOSTILE = {
    "prompt": "[bold]loud[/bold] [/] :smile: <script>alert('x')</script>\nsources\n"
    "\x1b[31mred\x1b]8;;bad\x07 \x08\r \u202egnitirw\u2066 ⟦fake⟧ \x9b2J",
    "completion": "</mark></div><b onclick=x>&amp; [red]ok[/red] שלום ⟧ \x1b[2J",
}


def test_nothing_in_a_row_is_obeyed_by_a_terminal(make_recipe, told, tmp_path):
    train = write(tmp_path / "h.jsonl", [HOSTILE])
    recipe = make_recipe(data__train=train, data__max_length=256, **ALL)
    answer = told(recipe)
    assert answer.code == 0
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", answer.out)
    assert "[bold]loud[/bold] [/] :smile: <script>alert('x')</script>" in answer.out
    assert "␛[31mred␛]8;;bad␇ ␈␍ \\u202egnitirw\\u2066 \\⟦fake\\⟧ \\x9b2J" in answer.out
    assert "⟦</mark></div><b onclick=x>&amp; [red]ok[/red] שלום \\⟧ ␛[2J<|im_end|>⟧" in answer.out
    assert answer.out.count("\nsources\n") == 0  # a row cannot pass for a title
    seen = preview.preview(recipe)
    on_terminal = shown_on(seen, force_terminal=True, color_system="standard")
    codes = set(re.findall(r"\x1b.[^m]*.?", on_terminal))
    assert codes <= {"\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[32m"}


class Reader(HTMLParser):
    """The tags of a page, its text inside and outside <mark>, and each row's pieces."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.open: list[str] = []
        self.rows: list[list[tuple[str, bool]]] = []
        self.attributes: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)
        if ("class", "row") in attrs:
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("mark", "span"):
            self.rows[-1].append((data, self.open[-1] == "mark"))


def joined(pieces: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    grouped = groupby(pieces, key=lambda piece: piece[1])
    return [("".join(text for text, _ in group), trains) for trains, group in grouped]


def test_the_page_needs_nothing_else_and_marks_exactly_what_trains(make_recipe, told, tmp_path):
    answer = told(make_recipe(**ALL), "--rows", "5", "--html", "seen.html")
    assert answer.code == 0 and answer.out.endswith("wrote seen.html\n")
    text = (tmp_path / "seen.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    for foreign in ("http:", "https:", "<script", "<link", "<img", "url(", "@import", "src="):
        assert foreign not in text.replace("style-src 'unsafe-inline'", "").replace(
            "default-src", ""
        )
    assert "prefers-color-scheme: dark" in text
    assert str(tmp_path) not in text and "/home" not in text
    reader = Reader(text)
    assert reader.open == []
    assert [joined(row) for row in reader.rows] == [texts(row) for row in ROWS[:5]]
    for part in (
        "rows that train",
        "prompt_completion",
        "computed tokens per useful token",
        "median",
    ):
        assert part in text
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_the_page_says_what_the_terminal_says(mixed, told, tmp_path):
    out = told(mixed, "--html", "seen.html").out
    text = (tmp_path / "seen.html").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    for line in ("m.jsonl:43: completion is empty", "m.jsonl:41 equals m.jsonl:3"):
        assert line in out and f"<li>{line}" in text
    for title in re.findall(r"^\S.*$", out.replace("wrote seen.html", ""), re.M):
        assert f"<h2>{title}</h2>" in text


def test_hostile_text_stays_text_on_the_page(make_recipe, told, tmp_path):
    train = write(tmp_path / "h.jsonl", [HOSTILE])
    recipe = make_recipe(data__train=train, data__max_length=256, **ALL)
    assert told(recipe, "--html", "seen.html").code == 0
    text = (tmp_path / "seen.html").read_text(encoding="utf-8")
    reader = Reader(text)
    assert not {"script", "b"} & set(reader.tags) and "onclick" not in reader.attributes
    assert reader.tags["mark"] == 1
    ((before, answer, after),) = reader.rows
    assert before[0].startswith(
        "<|im_start|>user\n[bold]loud[/bold] [/] :smile: <script>alert('x')"
    )
    assert answer == ("</mark></div><b onclick=x>&amp; [red]ok[/red] שלום ⟧ ␛[2J<|im_end|>", True)
    assert after == ("\n", False)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("folder", "folder: a folder. Name the file"),
        ("folder.html", "folder.html: a folder"),
        ("rows.jsonl", "whose name ends in .html"),
        ("none/seen.html", "there is no folder none"),
    ],
)
def test_a_page_takes_no_other_files_place(make_recipe, told, tmp_path, where, said, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.html").mkdir()
    monkeypatch.setattr(preview, "preview", None)  # refused before anything slow
    before = (tmp_path / "rows.jsonl").read_text()
    answer = told(make_recipe(), "--html", where)
    assert (answer.code, answer.out) == (2, "") and said in answer.err
    assert (tmp_path / "rows.jsonl").read_text() == before


# --- JSON, the notebook, and a refusal at the end


def test_json_is_all_that_standard_output_holds(make_recipe, tok, told):
    answer = told(make_recipe(**ALL), "--json", "--rows", "2", "--html", "seen.html")
    assert (answer.code, answer.err) == (0, "wrote seen.html\n")
    said = json.loads(answer.out)
    assert said["train"]["rows"] == said["rows_read"] == 40
    assert said["sources"][0]["name"] == "rows.jsonl"
    for n, row in enumerate(said["rows"]):
        tokens, learned = figures(tok, ROWS[n])
        assert row == {
            "label": f"row {n + 1}",
            "address": f"rows.jsonl:{n + 1}",
            "tokens": tokens,
            "supervised": learned,
            "text": [list(piece) for piece in texts(ROWS[n])],
        }
    assert len(said["rows"]) == 2


def test_json_of_one_row_says_what_became_of_it(mixed, told):
    answer = told(mixed, "--json", "--row", "43")
    said = json.loads(answer.out)
    assert said["rows"] == [] and said["asked"]["address"] == "m.jsonl:43"
    assert said["asked"]["remarks"][0].startswith("rejected: completion is empty")


def test_the_ledger_is_seen_before_too_much_loss_is_refused(make_recipe, told, tmp_path):
    rows = [*ROWS[:2], {"prompt": "Why? " * 90, "completion": "Because."}]
    recipe = make_recipe(data__train=write(tmp_path / "l.jsonl", rows), **ALL)
    answer = told(recipe, "--html", "seen.html")
    assert answer.code == 2
    assert cells(answer.out, "rows read") == ["3"] and "l.jsonl:3: " in answer.out
    assert re.search(r"^qlora: data.max_length is 128, and 1 row is longer", answer.err)
    assert "data.max_length=" in answer.err and "data.max_length=" not in answer.out
    assert "training would refuse this" in (tmp_path / "seen.html").read_text()
    answer = told(recipe, "--json")
    assert answer.code == 2 and json.loads(answer.out)["refusal"] in answer.err
    assert answer.err.startswith("qlora: ")


@pytest.mark.parametrize("policy", ["drop", "error"])
def test_a_ledger_without_a_row_left_to_train_is_still_told(make_recipe, told, tmp_path, policy):
    rows = [{"prompt": f"Why {n}? " * 90, "completion": "Because."} for n in range(3)]
    train = write(tmp_path / "l.jsonl", rows)
    answer = told(make_recipe(data__train=train, data__over_length=policy, **ALL))
    assert answer.code == 2 and answer.err.startswith("qlora: data.")
    assert cells(answer.out, "rows that train") == ["0"]
    assert "  3 dropped for their length" in answer.out
    assert "none" in section(answer.out, "rows")


def test_bad_rows_are_refused_as_training_would_refuse_them(make_recipe, told, tmp_path):
    train = write(tmp_path / "b.jsonl", [*ROWS, {"prompt": "And?", "completion": ""}])
    answer = told(make_recipe(data__train=train))
    assert (answer.code, answer.out) == (2, "")
    assert "b.jsonl:41: completion is empty" in answer.err


def test_a_notebook_shows_the_page_and_its_styles_stay_inside(make_recipe, tmp_path):
    recipe = make_recipe(**ALL)
    shown = qlora.show(recipe, rows=2)
    inside = shown._repr_html_()
    assert inside.startswith('<div class="qlora-page">') and inside.endswith("</div>")
    assert [joined(row) for row in Reader(inside).rows] == [texts(row) for row in ROWS[:2]]
    (style,) = re.findall(r"<style>(.*?)</style>", inside, re.S)
    selectors = re.findall(
        r"([^{};]+)\{", style.replace("@media (prefers-color-scheme: dark) {", "")
    )
    assert len(selectors) > 10
    assert all(
        one.strip().startswith(".qlora-page") for all_ in selectors for one in all_.split(",")
    )
    assert "<html" not in inside and "<body" not in inside
    assert repr(shown) == str(shown)
    assert f"⟦{ROWS[0]['completion']}<|im_end|>⟧" in str(shown) and "\x1b" not in str(shown)
    (tmp_path / "mine.yaml").write_text(recipe.dump())
    assert str(qlora.show("mine.yaml", rows=2)) == str(shown)
    assert "    trains\n" in str(qlora.show(recipe, row=7))
    long = make_recipe(data__max_length=12, **ALL)
    assert "training would refuse this\n  data.max_length is 12" in str(qlora.show(long))


def test_rejected_rows_that_are_not_kept_are_not_promised(mixed):
    uncached = mixed.model_copy(update={"data": mixed.data.model_copy(update={"cache": False})})
    assert "they lie in rejected.jsonl of a run (without a cache" in str(preview.preview(uncached))
