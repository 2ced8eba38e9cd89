"""A sheet of sections as plain or coloured text, and as one HTML page that needs nothing else.

What rows hold is hostile until shown otherwise: nothing in it is interpreted as markup, as HTML or by a
terminal, and no row can pass for a line of ours.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Union

from rich.cells import cell_len
from rich.text import Text

from qlora import chart
from qlora.chart import Chart
from qlora.screen import flat, visible

BAR = 40  # characters of the longest bar
Mark = Literal["good", "note", "bad", "unknown"]
MARKS: dict[Mark, str] = {"good": "✓", "note": "!", "bad": "✗", "unknown": "·"}
Piece = tuple[str, bool | None]  # text, and whether it trains; None: about what is not shown


@dataclass(frozen=True)
class Listing:
    """A heading, and lines below it; either may be missing."""

    heading: str = ""
    lines: Sequence[str] = ()


@dataclass(frozen=True)
class Grid:
    """Figures in columns; the first one names the lines. ``head`` names the others."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False  # not figures: they begin at the left


@dataclass(frozen=True)
class Bars:
    """A histogram: a name and a count for each bar."""

    bars: Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Sample:
    """One rendered row: ``short`` for a terminal, ``long`` for a page."""

    title: str
    remarks: Sequence[str]
    short: Sequence[Piece]
    long: Sequence[Piece]


@dataclass(frozen=True)
class Legend:
    """Says how text that trains is told from text that does not."""


@dataclass(frozen=True)
class Verdict:
    """What came out of one question about a run, in a sentence."""

    mark: Mark
    about: str
    said: str


@dataclass(frozen=True)
class Answers:
    """One question, and texts beside each other with their names and, where one was judged, a mark."""

    title: str
    question: str
    texts: Sequence[tuple[str, str, Mark | None]]


@dataclass(frozen=True)
class Commands:
    """What to type."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Fold:
    """Blocks that a page shows when they are asked for; as text they stand under their heading."""

    heading: str
    blocks: Sequence[Block]


Block = Union[
    Listing, Grid, Bars, Sample, Legend, Verdict, Answers, Commands, Chart, "Fold"
]  # fmt: skip


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


# --- text


def text(sections: Sequence[Section], *, width: int = 100, coloured: bool = False) -> Text:
    """The sheet as text; without colours, what trains stands between ⟦ and ⟧."""
    out = Text()
    for section in sections:
        out.append(section.title, style="bold")
        out.append("\n")
        for block in section.blocks:
            _append(out, block, width, coloured)
        out.append("\n")
    return out


def _append(out: Text, block: Block, width: int, coloured: bool) -> None:
    match block:
        case Listing():
            if block.heading:
                out.append(f"  {flat(block.heading)}\n")
            indent = "    " if block.heading else "  "
            out.append("".join(f"{indent}{flat(line)}\n" for line in block.lines))
        case Grid():
            out.append("".join(f"{line}\n" for line in _columns(block, width)))
        case Bars():
            most = max((count for _, count in block.bars), default=1) or 1
            names = max((cell_len(name) for name, _ in block.bars), default=0)
            for name, count in block.bars:
                length = max(1, round(BAR * count / most)) if count else 0
                out.append(f"  {name:>{names}}  {'█' * length}{' ' * bool(length)}{count:,}\n")
        case Legend():
            if coloured:
                out.append("  green", style="green").append(" trains, ").append("dim", style="dim")
                out.append(" does not\n")
            else:
                out.append("  ⟦text in such brackets⟧ trains, the rest does not (")
                out.append("a bracket of the text itself is written \\⟦ or \\⟧)\n")
        case Verdict():
            colour = {"good": "green", "note": "yellow", "bad": "red", "unknown": "dim"}[block.mark]
            out.append(f"  {MARKS[block.mark]} ", style=colour if coloured else "")
            out.append(f"{flat(block.about)}: {flat(block.said)}\n")
        case Chart():
            out.append(f"  {flat(block.title)}\n")
            out.append("".join(f"    {line}\n" for line in chart.told(block)))
        case Answers():
            out.append(f"\n  {flat(block.title)}\n")
            for name, said, mark in [("asked", block.question, None), *block.texts]:
                out.append(f"    {name}{' ' + MARKS[mark] if mark else ''}: {flat(said)}\n")
        case Commands():
            out.append("".join(f"    {flat(line)}\n" for line in block.lines))
        case Fold():
            out.append(f"  {flat(block.heading)}\n")
            for inner in block.blocks:
                _append(out, inner, width, coloured)
        case Sample():
            out.append(f"\n  {flat(block.title)}\n")
            out.append("".join(f"    {flat(remark)}\n" for remark in block.remarks))
            _append_pieces(out, block.short, coloured)


def _append_pieces(out: Text, pieces: Sequence[Piece], coloured: bool) -> None:
    """A row's text behind a line of its own, so that nothing in it looks like ours."""
    gutter, frame = "  │ ", "dim" if coloured else ""
    begun = False
    for said, trains in pieces:
        if trains is None:
            out.append(f"{chr(10) * begun}  ⋮ {said}\n")
            begun = False
            continue
        if not begun:
            out.append(gutter, style=frame)
            begun = True
        shown = visible(said)
        if not coloured:
            shown = shown.replace("⟦", "\\⟦").replace("⟧", "\\⟧")
            shown = f"⟦{shown}⟧" if trains else shown
        style = ("green not bold" if trains else "dim not bold") if coloured else ""
        for number, line in enumerate(shown.split("\n")):
            if number:
                out.append("\n").append(gutter, style=frame)
            out.append(line, style=style)
    out.append("\n" * begun)


def _columns(grid: Grid, width: int) -> Iterator[str]:
    """Aligned lines; columns that do not fit beside the others follow below them."""
    cells = [[flat(cell) for cell in row] for row in [("", *grid.head), *grid.rows]]
    wide = [max(cell_len(row[i]) for row in cells) for i in range(len(cells[0]))]
    start = 1
    while start < len(wide):
        end, room = start, 2 + wide[0]
        while end < len(wide) and (end == start or room + 2 + wide[end] <= width):
            room += 2 + wide[end]
            end += 1
        if start > 1:
            yield ""
        for row in cells:
            line = f"  {row[0]}{' ' * (wide[0] - cell_len(row[0]))}"
            for i in range(start, end):
                gap = " " * (wide[i] - cell_len(row[i]))
                line += f"  {row[i]}{gap}" if grid.words else f"  {gap}{row[i]}"
            if line.strip():
                yield line.rstrip()
        start = end


# --- HTML

STYLE = f"""
.qlora-page {{ {chart.palette(chart.LIGHT)} --good: #1b7f3b; --note: #97650b; --bad: #c02b2b; }}
@media (prefers-color-scheme: dark) {{ .qlora-page {{ {chart.palette(chart.DARK)}
  --good: #62c48a; --note: #e0b04c; --bad: #f47c7c; }} }}
"""
STYLE += """
.qlora-page {
  --back: #fff; --text: #1c1e21; --faint: #5f6570; --line: #d9dce1; --green: #b7ebc1; --bar: #6a9fd8;
  background: var(--back); color: var(--text); padding: 1rem; box-sizing: border-box;
  font: 15px/1.45 system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { .qlora-page {
  --back: #16181c; --text: #e4e6ea; --faint: #a0a6b0; --line: #363a42; --green: #1d5c2e; --bar: #4878ab; } }
.qlora-page section { max-width: 72rem; margin: 0 auto 1.5rem; }
.qlora-page h2 { font-size: 1.15em; margin: 0 0 .4rem; color: inherit; }
.qlora-page h3 { font-size: 1em; margin: .9rem 0 .3rem; color: inherit; }
.qlora-page p { margin: .3rem 0; color: inherit; }
.qlora-page ul { margin: .2rem 0 .6rem; padding-left: 1.4rem; color: var(--faint); }
.qlora-page .wide { overflow-x: auto; }
.qlora-page table { border-collapse: collapse; margin: .3rem 0; color: inherit; background: none; }
.qlora-page th, .qlora-page td { padding: .15rem .7rem; border-bottom: 1px solid var(--line);
  text-align: right; font-variant-numeric: tabular-nums; font-weight: normal; background: none; }
.qlora-page thead th { color: var(--faint); }
.qlora-page .words td, .qlora-page .words thead th { text-align: left; overflow-wrap: anywhere; }
.qlora-page tbody th { text-align: left; white-space: pre; }
.qlora-page td.bar { width: 24rem; }
.qlora-page td.bar div { background: var(--bar); height: .8em; }
.qlora-page .row { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext;
  font: 13px/1.5 ui-monospace, monospace; color: var(--faint); border-left: 3px solid var(--line);
  padding: .3rem .7rem; }
.qlora-page mark { background: var(--green); color: var(--text); unicode-bidi: isolate; }
.qlora-page em { color: var(--faint); }
.qlora-page .verdict { display: flex; gap: .6rem; margin: .25rem 0; }
.qlora-page .verdict b { flex: none; width: 1.1em; text-align: center; }
.qlora-page .good { color: var(--good); } .qlora-page .note { color: var(--note); }
.qlora-page .bad { color: var(--bad); } .qlora-page .unknown { color: var(--faint); }
.qlora-page .beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr));
  gap: .5rem 1rem; margin: .4rem 0 1.2rem; }
.qlora-page .beside h4 { font-size: .92em; font-weight: normal; margin: 0 0 .2rem; color: var(--faint); }
.qlora-page .said { color: var(--text); }
.qlora-page pre { overflow-x: auto; border: 1px solid var(--line); border-radius: 4px; padding: .5rem .7rem;
  font: 13px/1.5 ui-monospace, monospace; margin: .4rem 0; }
.qlora-page details { margin: .3rem 0; } .qlora-page summary { cursor: pointer; }
"""
STYLE += chart.STYLE


def body(sections: Sequence[Section]) -> str:
    """The sheet as HTML that can stand in another page: its styles reach nothing outside it."""
    inside = "\n".join(_section(section) for section in sections)
    return f'<div class="qlora-page"><style>{STYLE}</style>\n{inside}\n</div>'


def document(title: str, sections: Sequence[Section]) -> str:
    """The sheet as a whole page: no scripts, and nothing is fetched."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_escaped(title)}</title></head>\n"
        f'<body style="margin: 0">\n{body(sections)}\n</body></html>\n'
    )


def _escaped(said: str) -> str:
    return html.escape(flat(said))


def _section(section: Section) -> str:
    blocks = "\n".join(_html(block) for block in section.blocks)
    return f"<section><h2>{_escaped(section.title)}</h2>\n{blocks}</section>"


def _html(block: Block) -> str:
    match block:
        case Listing():
            heading = f"<p>{_escaped(block.heading)}</p>" if block.heading else ""
            if not block.heading:
                return "".join(f"<p>{_escaped(line)}</p>" for line in block.lines)
            lines = "".join(f"<li>{_escaped(line)}</li>" for line in block.lines)
            return heading + (f"<ul>{lines}</ul>" if lines else "")
        case Grid():
            head = "".join(f"<th>{_escaped(cell)}</th>" for cell in ["", *block.head])
            rows = "".join(
                f"<tr><th>{_escaped(row[0])}</th>"
                + "".join(f"<td>{_escaped(cell)}</td>" for cell in row[1:])
                + "</tr>"
                for row in block.rows
            )
            head = f"<thead><tr>{head}</tr></thead>" if any(block.head) else ""
            return _table(f"{head}<tbody>{rows}</tbody>", "words" if block.words else "")
        case Bars():
            most = max((count for _, count in block.bars), default=1) or 1
            rows = "".join(
                f'<tr><th>{_escaped(name)}</th><td class="bar">'
                f'<div style="width: {100 * count / most:.1f}%"></div></td><td>{count:,}</td></tr>'
                for name, count in block.bars
            )
            return _table(f"<tbody>{rows}</tbody>")
        case Legend():
            return "<p>Text on green trains, the rest does not.</p>"
        case Verdict():
            return (
                f'<div class="verdict"><b class="{block.mark}" role="img" aria-label="{block.mark}">'
                f"{MARKS[block.mark]}</b><span><strong>{_escaped(block.about)}</strong>: "
                f"{_escaped(block.said)}</span></div>"
            )
        case Chart():
            return chart.svg(block)
        case Answers():
            texts = "".join(_answer(*one) for one in block.texts)
            asked = f'<div class="row said">{html.escape(visible(block.question))}</div>'
            return f'<h3>{_escaped(block.title)}</h3>{asked}<div class="beside">{texts}</div>'
        case Commands():
            return f"<pre>{chr(10).join(map(_escaped, block.lines))}</pre>"
        case Fold():
            inside = "".join(map(_html, block.blocks))
            return f"<details><summary>{_escaped(block.heading)}</summary>{inside}</details>"
        case Sample():
            remarks = "".join(f"<p>{_escaped(remark)}</p>" for remark in block.remarks)
            pieces = f'<div class="row">{"".join(map(_piece, block.long))}</div>'
            return f"<h3>{_escaped(block.title)}</h3>{remarks}{pieces if block.long else ''}"


def _table(inside: str, kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<div class="wide"><table{kind}>{inside}</table></div>'


def _answer(name: str, said: str, mark: Mark | None) -> str:
    shown = f' <b class="{mark}" role="img" aria-label="{mark}">{MARKS[mark]}</b>' if mark else ""
    text = html.escape(visible(said))
    return f'<div><h4>{_escaped(name)}{shown}</h4><div class="row said">{text}</div></div>'


def _piece(piece: Piece) -> str:
    said, trains = piece
    if trains is None:
        return f"<em>\n{_escaped(said)}\n</em>"
    shown = html.escape(visible(said))
    return f"<mark>{shown}</mark>" if trains else f"<span>{shown}</span>"
