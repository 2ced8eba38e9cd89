"""Write the table of shipped recipes into recipes/README.md, and each one's peak into its own header.

    python scripts/recipe_table.py            write the table
    python scripts/recipe_table.py --check    exit 1 if the file's table is not the computed one

The predicted peak comes from :mod:`qlora.memory` and the dimensions in ``tests/shapes.py``; no network
is used. A measurement is added to ``MEASURED`` by whoever made it, with commit and date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from shapes import CONFIGS  # noqa: E402

from qlora import cards, cookbook, fitting, memory  # noqa: E402
from qlora.cards import GIB  # noqa: E402
from qlora.recipe import load_recipe  # noqa: E402
from qlora.shape import Shape  # noqa: E402

README = ROOT / "recipes" / "README.md"
BEGIN, END = "<!-- table: scripts/recipe_table.py -->", "<!-- end of table -->"
COLUMNS = (
    "recipe", "card", "max tokens per micro-batch", "predicted peak, GiB", "measured peak, GiB",
    "tokens/s", "loss before / after", "commit, date",
)  # fmt: skip

# recipe name -> (peak GiB, tokens/s, loss before / after, commit and date); a run that ran out of
# memory stays in, as ("out of memory", ...). Empty: nobody has measured anything yet.
MEASURED: dict[str, tuple[str, str, str, str]] = {}


def named() -> list[str]:
    """Recipes made for a card, which is the last part of their name, by family and then by card."""
    return [e.name for e in cookbook.entries() if e.name.endswith(("gb", "-t4"))]


def predict(name: str) -> memory.Plan:
    """The plan of a shipped recipe on the card its name ends with."""
    recipe = load_recipe(str(cookbook.shelf() / f"{name}.yaml"))
    shape = Shape.from_config(CONFIGS[recipe.model.name])
    return fitting.fit(recipe, shape, cards.named_card(name.rpartition("-")[2])).plan


def table() -> str:
    """The Markdown table, one row a recipe."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for name in sorted(named(), key=lambda n: (n.rpartition("-")[0], predict(n).card.total_bytes)):
        plan = predict(name)
        gib = plan.card.free_bytes / GIB
        label = plan.card.name.partition(" card")[0]
        rows.append(
            (
                f"[{name}]({name}.yaml)",
                f"{label} ({gib:.1f} GiB usable)",
                f"{plan.tokens:,}",
                f"{plan.total_bytes / GIB:.1f}",
                *MEASURED.get(name, ("-",) * 4),
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def header(name: str, text: str) -> str:
    """A recipe's text with the peak that is predicted today in its header."""
    peak = predict(name).total_bytes / GIB
    return re.sub(r"(?m)^# Peak: [\d.]+ GiB", f"# Peak: {peak:.1f} GiB", text, count=1)


def rendered(text: str) -> str:
    """The README's text with the computed table between its two marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{README.name}: the marks {BEGIN} and {END} are not both there.")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    text = README.read_text(encoding="utf-8")
    new = rendered(text)
    if "--check" in sys.argv[1:]:
        raise SystemExit(0 if new == text else f"{README.name}: run scripts/recipe_table.py.")
    README.write_text(new, encoding="utf-8")
    for name in named():
        path = cookbook.shelf() / f"{name}.yaml"
        written = path.read_text(encoding="utf-8")
        path.write_text(header(name, written), encoding="utf-8")
    print(f"{README.name}: {len(named())} recipes")


if __name__ == "__main__":
    main()
