"""A sheet of sections as plain or coloured text, and as one HTML page that needs nothing else.

What rows hold is hostile until shown otherwise: nothing in it is interpreted as markup, as HTML or by a
terminal, and no row can pass for a line of ours.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from qlora.screen import flat, visible

BAR = 40  # characters of the longest bar
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


Block = Listing | Grid | Bars | Sample | Legend


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
                line += f"  {' ' * (wide[i] - cell_len(row[i]))}{row[i]}"
            if line.strip():
                yield line.rstrip()
        start = end


# --- HTML

STYLE = """
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
.qlora-page tbody th { text-align: left; white-space: pre; }
.qlora-page td.bar { width: 24rem; }
.qlora-page td.bar div { background: var(--bar); height: .8em; }
.qlora-page .row { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext;
  font: 13px/1.5 ui-monospace, monospace; color: var(--faint); border-left: 3px solid var(--line);
  padding: .3rem .7rem; }
.qlora-page mark { background: var(--green); color: var(--text); unicode-bidi: isolate; }
.qlora-page em { color: var(--faint); }
"""


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
            return _table(f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>")
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
        case Sample():
            remarks = "".join(f"<p>{_escaped(remark)}</p>" for remark in block.remarks)
            pieces = f'<div class="row">{"".join(map(_piece, block.long))}</div>'
            return f"<h3>{_escaped(block.title)}</h3>{remarks}{pieces if block.long else ''}"


def _table(inside: str) -> str:
    return f'<div class="wide"><table>{inside}</table></div>'


def _piece(piece: Piece) -> str:
    said, trains = piece
    if trains is None:
        return f"<em>\n{_escaped(said)}\n</em>"
    shown = html.escape(visible(said))
    return f"<mark>{shown}</mark>" if trains else f"<span>{shown}</span>"
