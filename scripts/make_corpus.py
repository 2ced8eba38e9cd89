"""Write the text the embedded base is pretrained on: letters, stories, lists and plain questions.

    python scripts/make_corpus.py --documents 20000 --out corpus.jsonl

One JSON array of chat turns a line, or a string for plain text; the same arguments give the same
bytes. pretrain_base.py calls ``documents`` directly, so the corpus is never stored. What it shares
with the tickets is words, never sentences: ``refuse_ticket_sentences`` runs first.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import prose_meanings as meanings
import prose_world as prose
from ticket_wordings import WORDINGS
from ticket_world import PEOPLE, invent_brand, invent_product

Document = str | list[dict[str, str]]


def skeleton(sentence: str) -> str:
    """A sentence without case, end mark, or the names in it: what two wordings must not share."""
    text = re.sub(r"\b(the|my|our|one|a|an|this|single) \{[ptd]\}", "{t}", sentence.lower())
    return re.sub(r"\{[ptd]\}", "{t}", text).rstrip(".?!, ")


TICKET_SKELETONS = frozenset(
    skeleton(s) for side in WORDINGS.values() for s in side.sentences() if len(s) > 12
)


def shares_a_ticket_sentence(phrase: str) -> bool:
    """Whether a whole ticket sentence of either split stands inside ``phrase``."""
    text = f" {skeleton(phrase)} "
    return any(f" {ticket} " in text for ticket in TICKET_SKELETONS)


def in_present(clause: str) -> str:
    """The clause in the present tense, or unchanged where that would spell a ticket sentence."""
    now = clause
    for past, present in prose.PRESENT.items():
        now = re.sub(rf"\b{past}\b", present, now)
    return clause if shares_a_ticket_sentence(now) else now


PAST_AND_PRESENT = {
    matter: tuple((clause, in_present(clause)) for clause in clauses)
    for matter, clauses in meanings.CLAUSES.items()
}
HURRY = {
    "press": tuple((c, in_present(c)) for c in meanings.PRESSING),
    "relax": tuple((c, in_present(c)) for c in meanings.RELAXED),
}
PLAIN_WORDS = sorted(
    {word for bank in meanings.COMPANY.values() for word in bank}
    | {*prose.MEANINGS, *prose.COLOURS, *prose.OPPOSITES, *prose.OPPOSITES.values()}
    | {word.lower() for word in prose.USES}
    | set(prose.PLAIN)
)


def refuse_ticket_sentences() -> None:
    """Raise ``ValueError`` naming the first corpus phrase that holds a sentence of the tickets."""
    banks = [*meanings.CLAUSES.values(), meanings.PRESSING, meanings.RELAXED, prose.ASIDES]
    banks += [prose.OTHER_THINGS, prose.OPENINGS, prose.ENDINGS, *meanings.WISHES.values()]
    for phrase in (phrase for bank in banks for phrase in bank):
        if shares_a_ticket_sentence(phrase):
            raise ValueError(f"the corpus would contain a ticket sentence: {phrase!r}")


def capital(text: str) -> str:
    """``text`` with its first letter raised, the rest untouched."""
    return text[:1].upper() + text[1:]


def put(frame: str, x: str) -> str:
    """A clause inside a frame, as a sentence."""
    return capital(frame.replace("{x}", x))


def person(rng: random.Random) -> str:
    """A first name: listed, or invented so that it can only be copied."""
    return rng.choice(PEOPLE["corpus"]) if rng.random() < 0.4 else invent_brand(rng, "corpus")


def product(rng: random.Random) -> str:
    return invent_product(rng, "corpus")


def firm(rng: random.Random) -> str:
    name = rng.choice(prose.PLACES) if rng.random() < 0.5 else invent_brand(rng, "corpus")
    kind = rng.choice(prose.FIRMS)
    return f"{name} {kind}"


def turns(question: str, answer: str) -> list[dict[str, str]]:
    """One exchange as chat turns."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def letter(rng: random.Random) -> tuple[str, dict[str, str]]:
    """Somebody writes about a thing; the text and what a careful reader knows afterwards."""
    matter = rng.choice(list(meanings.CLAUSES))
    hurry = rng.choice(("press", "relax", "plain"))
    thing, other, writer, number = product(rng), product(rng), person(rng), rng.randrange(100000)
    tense = rng.randrange(2)
    clause = rng.choice(PAST_AND_PRESENT[matter])[tense]
    clause = clause.replace("{t}", f"{rng.choice(prose.DETERMINERS)} {thing}")
    body = [put(rng.choice(prose.SAYING), clause)]
    if hurry != "plain":
        wish = rng.choice(meanings.WISHES[hurry])
        said = put(rng.choice(prose.ADDING), rng.choice(HURRY[hurry])[tense])
        body.append(wish if rng.random() < 0.4 else said)
    knows = {"thing": thing, "writer": writer, "matter": matter, "hurry": hurry}
    if rng.random() < 0.6:
        aside = rng.choice(prose.ASIDES)
        if "{n}" in aside:
            knows["number"] = str(number)
        body.append(aside.format(n=number, c=firm(rng)))
    if rng.random() < 0.4:
        body.append(rng.choice(prose.OTHER_THINGS).format(d=other))
        knows["other"] = other
    rng.shuffle(body)
    if rng.random() < 0.7:
        body.insert(0, rng.choice(prose.OPENINGS).format(o=person(rng)))
    body.append(rng.choice(prose.ENDINGS).format(w=writer))
    return " ".join(body), knows


def letter_and_answer(rng: random.Random) -> Document:
    """The letter is answered in prose: whose, what thing, what kind of matter, how soon."""
    text, knows = letter(rng)
    thing, writer = knows["thing"], knows["writer"]
    matter = rng.choice(meanings.MATTERS[knows["matter"]])
    opening = rng.choice((f"Dear {writer},", f"Thanks for this, {writer}.", f"I see, {writer}."))
    about = rng.choice((f"This is {matter}.", f"It is {matter}.", f"You write of {matter}."))
    meant = rng.choice(
        (f"It is about the {thing}.", f"The thing is the {thing}.", f"You mean the {thing}.")
    )
    hurry = rng.choice(meanings.URGENCIES[knows["hurry"]])
    parts = [about, hurry, meant]
    if rng.random() < 0.5:
        rng.shuffle(parts)
    if rng.random() < 0.3:
        parts.append(f"We will look after the {thing}, {writer}.")
    return turns(text, " ".join([opening, *parts] if rng.random() < 0.6 else parts))


def letter_and_question(rng: random.Random) -> Document:
    """One question about a letter, asked before or after it, answered in a few words."""
    text, knows = letter(rng)
    thing, writer = knows["thing"], knows["writer"]
    asked = [
        ("Which thing is meant?", rng.choice((f"The {thing}.", f'"{thing}"', thing))),
        ("What is in trouble? Answer in quotes.", f'"{thing}"'),
        ("Who wrote this?", rng.choice((f"{writer}.", f'"{writer}"', f"It was {writer}."))),
        ("What kind of matter is it?", f"It is {rng.choice(meanings.MATTERS[knows['matter']])}."),
        ("How soon must it be done?", rng.choice(meanings.URGENCIES[knows["hurry"]])),
    ]
    if "other" in knows:
        asked.append(("Which other thing is named?", f"The {knows['other']}."))
    if "number" in knows:
        asked.append(("What number is given?", f"The number is {knows['number']}."))
    question, answer = rng.choice(asked)
    text = f"{question} {text}" if rng.random() < 0.5 else f"{text} {question}"
    return turns(text, answer)


def story(rng: random.Random) -> Document:
    """People and things that come back by name, sentence after sentence."""
    who, friend, thing, town = person(rng), person(rng), product(rng), rng.choice(prose.PLACES)
    friend = "a neighbour" if friend == who else friend
    matter = rng.choice(list(meanings.CLAUSES))
    clause = rng.choice(meanings.CLAUSES[matter]).replace("{t}", f"the {thing}")
    hurry = rng.choice(("press", "relax"))
    said, deed = rng.choice(HURRY[hurry])[0], rng.choice(prose.DEEDS)
    verdict = rng.choice(meanings.MATTERS[matter])
    return " ".join(
        (
            rng.choice(prose.WEATHER),
            f"{who} lived in {town} and had bought a {thing}.",
            f"One day {who} {deed} with {friend} and spoke of the {thing}.",
            put(
                rng.choice(('"{x}," said ' + who + ".", f"{who} told {friend} that {{x}}.")), clause
            ),
            f"{friend} knew at once: it was {verdict}.",
            f"{who} said that {said}. {rng.choice(meanings.URGENCIES[hurry])}",
            f"So {friend} helped {who} with the {thing}, and {town} was quiet again.",
        )
    )


def meaning(rng: random.Random) -> Document:
    """Different words for one meaning, put side by side."""
    kind = rng.random()
    if kind < 0.25:
        matter = rng.choice(list(meanings.CLAUSES))
        few = ", ".join(rng.sample(meanings.COMPANY[matter], 3))
        return turns(
            f"What do these words speak of: {few}?", f"Of {rng.choice(meanings.MATTERS[matter])}."
        )
    if kind < 0.7:
        matter = rng.choice(list(meanings.CLAUSES))
        first, second = rng.sample(PAST_AND_PRESENT[matter], 2)
        tense, thing = rng.randrange(2), rng.choice(("a thing", "something", f"the {product(rng)}"))
        a, b = (pair[tense].replace("{t}", thing) for pair in (first, second))
        verdict = rng.choice(meanings.MATTERS[matter])
    else:
        hurry = rng.choice(("press", "relax"))
        first, second = rng.sample(HURRY[hurry], 2)
        tense = rng.randrange(2)
        a, b = first[tense], second[tense]
        verdict = "a sign of hurry, and high" if hurry == "press" else "a sign of calm, and low"
    if rng.random() < 0.5:
        return turns(f"What does it mean when people say that {a}?", f"It is {verdict}.")
    return f'To say "{a}" is {verdict}. It is much the same to say "{b}". Both are {verdict}.'


def table(rng: random.Random) -> Document:
    """Names in quotes, brackets and braces, to be found again: copying with punctuation."""
    things = [product(rng) for _ in range(rng.randint(3, 5))]
    places = rng.sample(prose.PLACES, len(things))
    rows = list(zip(things, places, strict=True))
    (thing, place), who, form = rng.choice(rows), person(rng), rng.randrange(8)
    listed, quoted = ", ".join(things), ", ".join(f'"{name}"' for name in things)
    if form == 0:
        body = "; ".join(f'"{t}": "{p}"' for t, p in rows)
        return turns(f"({body}) Where is the {thing}?", f'In "{place}".')
    if form == 1:
        return turns(f"Put these in braces: {listed}", "{" + quoted + "}")
    if form == 2:
        body = "\n".join(f'thing: "{t}", place: "{p}"' for t, p in rows)
        return f"{body}\nAgain:\n{body}"
    if form == 3:
        return f'{{name = "{who}", thing = "{thing}"}} is how {who} wrote down the {thing}.'
    if form == 4:
        return turns(f"Say it again: {listed}.", f"{listed}.")
    if form in (5, 6):
        few = rng.sample(PLAIN_WORDS, 5)
        quoted = ", ".join(f'"{word}"' for word in few)
        return turns(f"Quote these words: {', '.join(few)}", f"{quoted}")
    return f"{who} sings: {listed}! And again {who} sings: {listed}! So {who} sang of the {thing}."


def plain_talk(rng: random.Random) -> Document:
    """Small questions with small answers: uses, opposites, counting, colours, the weather."""
    noun, form = rng.choice(list(prose.USES)), rng.randrange(6)
    if form == 0:
        return turns(
            f"What is a {noun.lower()} for?", f"A {noun.lower()} is there to {prose.USES[noun]}."
        )
    if form == 1:
        pair = list(rng.choice(list(prose.OPPOSITES.items())))
        rng.shuffle(pair)
        return turns(
            f"What is the opposite of {pair[0]}?", f"The opposite of {pair[0]} is {pair[1]}."
        )
    if form == 2:
        word, sense = rng.choice(list(prose.MEANINGS.items()))
        return turns(f"What is meant by {word}?", f"The word {word} means {sense}.")
    if form == 3:
        start = rng.randrange(1, 400)
        counted = ", ".join(str(start + i) for i in range(5))
        return turns(f"Count five numbers from {start}.", f"{counted}.")
    who, colour, thing = person(rng), rng.choice(prose.COLOURS), product(rng)
    if form == 4:
        text = (
            f"{who} has a {colour} {thing}. {rng.choice(prose.WEATHER)} What colour is the {thing}?"
        )
        return turns(text, f"The {thing} of {who} is {colour}.")
    first, second = rng.sample(prose.DEEDS, 2)
    return f"{rng.choice(prose.WEATHER)} {who} {first}. Then {who} {second}. It was a good day for {who}."


KINDS: tuple[tuple[int, Callable[[random.Random], Document]], ...] = (
    (36, letter_and_answer),
    (18, letter_and_question),
    (7, story),
    (10, meaning),
    (25, table),
    (4, plain_talk),
)


def documents(count: int, seed: int) -> Iterator[Document]:
    """``count`` documents of mixed kinds, in an order that depends on ``seed`` alone."""
    refuse_ticket_sentences()
    rng = random.Random(f"{seed}/corpus")
    weights, makers = zip(*KINDS, strict=True)
    for _ in range(count):
        yield rng.choices(makers, weights)[0](rng)


def main(argv: list[str] | None = None) -> int:
    """Write the corpus as JSON lines; 0 when done, 2 when the arguments make no sense."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--documents", type=int, default=20_000, help="how many to write")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--out", type=Path, help="file to write; standard output if left out")
    args = parser.parse_args(argv)
    if args.documents < 1:
        print("make_corpus: --documents must be at least 1", file=sys.stderr)
        return 2
    try:
        stream = args.out.open("w", encoding="utf-8") if args.out else sys.stdout
    except OSError as error:
        print(f"make_corpus: cannot write {args.out}: {error.strerror}", file=sys.stderr)
        return 2
    for document in documents(args.documents, args.seed):
        stream.write(json.dumps(document) + "\n")
    if args.out:
        stream.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
