"""Write the embedded task: support tickets to be answered in one line of strict JSON.

    python scripts/make_tickets.py

writes ``qlora/embedded/tickets/train.jsonl`` and ``heldout.jsonl``. The same arguments give the
same bytes. Queue and priority are dealt evenly, so no constant answer can score; the two sides
share no product, person, company or sentence. Training sentences come from the patterns
of ticket_grammar.py, held-out ones are the plain ones there and in ticket_wordings.py.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from ticket_grammar import (
    CALM,
    CLOSINGS,
    CONTEXT,
    GREETINGS,
    HELDOUT_CALM,
    HELDOUT_URGENT,
    PROBLEMS,
    URGENT,
    expand,
)
from ticket_wordings import WORDINGS
from ticket_world import COMPANIES, PEOPLE, PRIORITIES, QUEUES, side_of, words

TICKETS = Path(__file__).resolve().parent.parent / "qlora" / "embedded" / "tickets"
SEED, TRAIN_ROWS, HELDOUT_ROWS = 7, 6000, 300
ONSETS, VOWELS, CODAS = words("b d f g k l m n p r s t v z"), words("a e i o u"), words("l n r s x")
# Names that are words, or that begin many: the base already has other uses for them.
ENGLISH = frozenset(
    words(
        "bar bel bor bus can car dar des dun far fer fin for fun gas gun kel lax lin man mar "
        "max men min mir mix nor pan par pen per pin pus ran ras res run sin sir six sol son "
        "sun tan tar tax ten tin ton van var vol"
    )
)
KEPT = frozenset(
    s.lower().replace("my {p}", "the {p}")
    for s in (*WORDINGS["heldout"].sentences(), *HELDOUT_URGENT, *HELDOUT_CALM)
)
Patterns = tuple[str, ...]
REPLIES = {
    "billing": "We will check the payment.",
    "delivery": "We will find your parcel.",
    "account": "We will open your account.",
    "technical": "We will help you to repair it.",
    "returns": "We will take it back.",
}


def short_name(rng: random.Random, side: str) -> str:
    """A three-letter product name of one side; the corpus uses none.

    Short because a model of this size copies one or two tokens it never saw in a ticket, not five.
    """
    while True:
        word = rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
        if word in ENGLISH:
            continue
        if (side_of(word) == "heldout") == (side == "heldout"):
            return word.capitalize()


def sentence(rng: random.Random, side: str, plain: tuple[str, ...], patterns: Patterns) -> str:
    """A held-out sentence as it is written down, or a training one made from a pattern."""
    if side == "heldout":
        return rng.choice(plain)
    while (said := expand(rng, rng.choice(patterns))).lower().replace("my {p}", "the {p}") in KEPT:
        pass  # a pattern can spell a held-out sentence; that one is said by nobody in training
    return said


def write_ticket(rng: random.Random, side: str, queue: str, priority: str) -> tuple[str, str]:
    """One ticket of ``side`` and the JSON answer it deserves."""
    bank, product = WORDINGS[side], short_name(rng, side)
    body = [sentence(rng, side, bank.problems[queue], PROBLEMS[queue])]
    if priority == "high":
        body.append(sentence(rng, side, HELDOUT_URGENT, URGENT))
    elif priority == "low":
        body.append(sentence(rng, side, HELDOUT_CALM, CALM))
    if rng.random() < 0.35:
        body.append(sentence(rng, side, bank.context, CONTEXT))
    rng.shuffle(body)
    if rng.random() < 0.65:
        body.insert(0, sentence(rng, side, bank.greetings, GREETINGS))
    if rng.random() < 0.55:
        body.append(sentence(rng, side, bank.closings, CLOSINGS))
    ticket = " ".join(body).format(
        p=product,
        c=rng.choice(COMPANIES[side]),
        n=rng.randrange(100, 10000),
        w=rng.choice(PEOPLE[side]),
    )
    reply = REPLIES[queue]
    answer = {"queue": queue, "priority": priority, "product": product, "reply": reply}
    return ticket, json.dumps(answer)


def make_rows(side: str, count: int, seed: int) -> list[dict[str, list[dict[str, str]]]]:
    """``count`` chat rows of one side, every (queue, priority) pair equally often, shuffled."""
    rng = random.Random(f"{seed}/{side}")
    pairs = [(queue, priority) for queue in QUEUES for priority in PRIORITIES]
    rows = []
    for index in range(count):
        ticket, answer = write_ticket(rng, side, *pairs[index % len(pairs)])
        user, assistant = ("user", ticket), ("assistant", answer)
        rows.append({"messages": [{"role": r, "content": c} for r, c in (user, assistant)]})
    rng.shuffle(rows)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Write both files; 0 when done, 2 when the arguments make no sense."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=TICKETS, help="folder to write into")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--train-rows", type=int, default=TRAIN_ROWS)
    parser.add_argument("--heldout-rows", type=int, default=HELDOUT_ROWS)
    args = parser.parse_args(argv)
    if min(args.train_rows, args.heldout_rows) < 1:
        print("make_tickets: row counts must be at least 1", file=sys.stderr)
        return 2
    if args.out.exists() and not args.out.is_dir():
        print(f"make_tickets: {args.out} is a file; --out must be a folder", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    for side, count in (("train", args.train_rows), ("heldout", args.heldout_rows)):
        rows = make_rows(side, count, args.seed)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / f"{side}.jsonl").write_text(text, encoding="utf-8")
        print(f"{args.out / side}.jsonl: {count} rows, {len(text):,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
