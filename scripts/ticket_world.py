"""The things, people and firms of the tickets, and who may use which invented word.

Every invented brand belongs to exactly one of three sides, ``train``, ``heldout`` or ``corpus``,
decided by a checksum of the word itself. A brand therefore cannot be in two places, whatever the
seed. In a ticket the brand alone is the product ("my Velmor"); the corpus adds a noun ("Velmor
Kettle"). People and companies are split by hand. Used by the other scripts; no command here.
"""

from __future__ import annotations

import random
import zlib

QUEUES = ("billing", "delivery", "account", "technical", "returns")
PRIORITIES = ("high", "normal", "low")
SIDES = ("train", "heldout", "corpus")


def lines(text: str) -> tuple[str, ...]:
    """The non-empty lines of a block, stripped: one phrase a line keeps the banks readable."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def words(text: str) -> tuple[str, ...]:
    """The words of a block."""
    return tuple(text.split())


ONSETS = words("b br c d dr f fl g gr h j k kl l m n p pl r s sk st t tr v w z")
VOWELS = words("a e i o u")
CODAS = words("l n r s x k m nd rt ck")


def side_of(brand: str) -> str:
    """The one side that may use this brand word.

    >>> side_of("Velmor") == side_of("VELMOR")
    True
    """
    return SIDES[zlib.crc32(brand.lower().encode()) % len(SIDES)]


def invent_brand(rng: random.Random, side: str) -> str:
    """A pronounceable invented word that belongs to ``side``."""
    while True:
        word = rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
        word += rng.choice(ONSETS) + rng.choice(VOWELS)
        if rng.random() < 0.5:
            word += rng.choice(CODAS)
        if side_of(word) == side and word.capitalize() not in LISTED:
            return word.capitalize()


NOUNS = {
    "train": words("""Kettle Lamp Drill Router Scooter Toaster Camera Printer Backpack Jacket Blender
        Monitor Keyboard Tent Guitar Heater Projector Stroller Mattress Grill Radio Helmet Watch
        Sofa Vacuum Charger Piano Bench Ladder Clock Pump Stove Mirror Boat Wagon Violin Shelf Candle
        Mower Freezer Carpet"""),
    "heldout": words("""Fridge Tablet Speaker Bicycle Armchair Mixer Headset Suitcase Thermostat Saw
        Treadmill Desk"""),
    "corpus": words("Phone Laptop Whistle Bottle Umbrella Hammer Basket Blanket Telescope Trumpet"),
}
SUFFIXES = words("Mini Pro Plus Max Air Duo")

PEOPLE = {
    "train": words("""Anna Bruno Carla Daniel Elena Felix Grace Hugo Irene Jonas Karen Lucas Maria Nils
        Olivia Peter Rosa Simon Teresa Victor Wendy Yusuf Zoe Amir Bella Colin Dora Erik Fiona
        Georg Hanna Ivan"""),
    "heldout": words("""Agnes Basil Chloe Dimitri Edith Farid Gemma Henrik Isolde Jasper Kiran Leonora
        Magnus Noor Otto Priya"""),
    "corpus": words("""Mira Tomas Lea Oskar Vera Paul Nina Emil Clara Anton Ida Ruben Sofia Max Edda
        Kurt Alma Boris Celia Dirk Esther Frank Gina Harald"""),
}
COMPANIES = {
    "train": lines("""
        Harbour Cafe
        Northgate School
        Lindner Dental
        Riverside Hotel
        Old Mill Bakery
        Bright Path Clinic
        Castle Street Books
        Maple Design
        Union Garage
        Seaview Hostel
    """),
    "heldout": lines("""
        Pinewood Library
        Summit Law
        Granary Kitchen
        Bluebell Nursery
        Ironbridge Gym
        Vineyard Theatre
    """),
}
# Chance would invent "Bella" one day: listed words are never invented.
LISTED = frozenset(
    word
    for bank in (*NOUNS.values(), *PEOPLE.values(), *COMPANIES.values())
    for entry in bank
    for word in entry.split()
)


def invent_product(rng: random.Random, side: str) -> str:
    """A product name of ``side``: brand and noun, one time in four with a suffix."""
    nouns = NOUNS[side]
    if side == "corpus":  # the bare nouns are plain English, so the prose may use all of them
        nouns = NOUNS["corpus"] + NOUNS["train"] + NOUNS["heldout"]
    name = f"{invent_brand(rng, side)} {rng.choice(nouns)}"
    return f"{name} {rng.choice(SUFFIXES)}" if rng.random() < 0.25 else name
