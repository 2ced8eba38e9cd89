"""What the pretraining prose is made of besides its meanings: frames, asides, plain knowledge.

Frames take a clause of prose_meanings.py as ``{x}``. It has no command of its own.
"""

from __future__ import annotations

from ticket_world import lines, words


def pairs(text: str) -> dict[str, str]:
    """``left: right`` pairs, separated by semicolons or line ends."""
    entries = (entry.split(":") for line in lines(text) for entry in line.split(";"))
    return {left.strip(): right.strip() for left, right in entries}


# How somebody comes to say a clause, and how somebody adds one about time.
DETERMINERS = ["the"] * 10 + ["my"] * 6 + ["our", "our", "one", "a", "this"]
SAYING = lines("""
    I must tell you that {x}.
    It happened that {x}.
    You see, {x}.
    Sadly, {x}.
    My trouble is that {x}.
    I write because {x}.
    What happened is that {x}.
    I found that {x}.
    To my surprise {x}.
    {x}.
    {x}.
    {x}.
""")
ADDING = lines("""
    I add that {x}.
    For me {x}.
    Know that {x}.
    Let me say that {x}.
    As for the time, {x}.
    Indeed {x}.
    {x}.
    {x}.
    {x}.
""")
# Enough grammar to put a clause in the present tense.
PRESENT = pairs("""
    had been: has been; had to: has to; could: can; would: will; did not: does not; was: is
    were: are; wanted to: wants to; stood: stands; stopped: stops
    came: comes; stayed: stays; made: makes; crashed: crashes; lost its: loses its; leaked: leaks
    asked: asks; forgot: forgets; refused: refuses; got: gets; overheated: overheats
    showed: shows; restarted: restarts; regretted: regrets; kept: keeps
""")
# Sentences that decide nothing; the reader must learn to step over them.
ASIDES = lines("""
    The bakery on the corner has good bread.
    My uncle plays chess on Sundays.
    The number of the paper is {n}.
    I heard of the shop from a friend.
    I speak for {c}.
    I work in the office of {c}.
    We use it at {c}.
    It was sunny all week.
    We moved here two years ago.
    The cat sleeps next to me.
    My son typed this letter.
    I have bought things from the shop before.
    Our house stands near the river.
    The purchase has number {n}.
    I looked after the order {n} myself.
    Never before have I asked for anything.
    I have always liked the people of the shop.
    The garden is full of roses.
""")
OTHER_THINGS = lines("""
    The {d} still runs well.
    With the {d} everything is in order.
    I am glad that I have the {d}.
    Leave the {d} aside, it is fine.
    My brother praises his {d}.
    The {d} of my neighbour works without trouble.
    I have nothing to say against the {d}.
    In summer I bought a {d}, which is perfect.
    I also saw a {d} in the window.
    My old {d} never made trouble.
    I am pleased with the {d}.
    We love our {d}.
    The earlier {d} was a fine thing.
    This has nothing to do with the {d}.
""")
OPENINGS = lines("""
    Good people of the shop,
    Dear friends,
    A good day to you,
    Dear neighbours,
    Hello again,
    My dear {o},
    Dear {o},
    I greet you, {o}.
    To the shop:
    Hey you,
""")
ENDINGS = lines("""
    So long, {w}
    With love, {w}
    Your friend, {w}
    I remain {w}
    That is all. {w}
    Thanks for reading, {w}
    Warm greetings from {w}
    Written by {w}
    Cheers from {w}
    Your {w}
""")

# A thing and what it is for: plain knowledge for plain questions.
USES = pairs("""
    Kettle: boil water; Lamp: light a room; Drill: make holes; Router: share a network
    Scooter: ride to town; Toaster: brown bread; Camera: take pictures
    Printer: put words on paper; Backpack: carry books; Jacket: keep warm
    Blender: mix fruit; Monitor: show pictures; Keyboard: type words; Tent: sleep outdoors
    Guitar: play songs; Heater: warm a room; Projector: show films; Stroller: push a baby
    Mattress: sleep well; Grill: roast meat; Radio: hear music; Helmet: guard the head
    Watch: tell the time; Sofa: rest with friends; Vacuum: clean the floor
    Charger: fill a battery; Fridge: keep food cold; Tablet: read and draw
    Speaker: hear music; Bicycle: ride to work; Armchair: rest by the fire
    Mixer: stir dough; Headset: hear and speak; Suitcase: carry clothes
    Thermostat: set the warmth; Saw: cut wood; Treadmill: run indoors; Desk: write letters
    Piano: play songs; Bench: sit outside; Ladder: reach the roof; Clock: tell the time
    Pump: move water; Stove: cook soup; Mirror: see your face; Boat: cross a lake
    Wagon: carry hay; Violin: play songs; Shelf: store books; Candle: light a room
    Mower: cut grass; Freezer: keep ice; Carpet: cover the floor; Phone: call a friend
    Laptop: write and count; Whistle: call a dog; Bottle: hold water; Umbrella: stay dry
    Hammer: drive nails; Basket: carry apples; Blanket: keep warm; Telescope: see the stars
    Trumpet: play songs
""")
PLACES = words("Arlen Brookford Casten Dunmere Eastvale Fernhill Galloway Highmoor Inverlay Kelton")
PLAIN = words("""normal urgent calm technical billing returns money road house river bread happy
    quiet short long round square simple early never always help question answer""")
FIRMS = words("School Bakery Hotel Clinic Books Design Law Garage Library Kitchen")
COLOURS = words("red blue green white black yellow brown grey")
WEATHER = lines("""
    The rain fell softly on the roof.
    The sun stood high over the hills.
    Snow lay on the fields.
    A cold wind came from the sea.
    The evening was warm and still.
    Fog hung over the river.
""")
DEEDS = lines("""
    baked a cake
    walked along the river
    read an old book
    wrote a long letter
    fed the birds
    painted the fence
    sang a quiet song
    planted two trees
    cooked a pot of soup
    mended a shirt
""")
MEANINGS = pairs("""
    queue: a line in which people wait; priority: what says who comes first
    product: a thing that is made and sold; reply: an answer
    ticket: a note about a wish or a trouble; customer: a person who buys
    team: a group that works together; order: what a customer asked for
""")
OPPOSITES = pairs("""
    hot: cold; big: small; fast: slow; old: new; high: low; early: late; open: closed
    full: empty; loud: quiet; wet: dry; light: dark; near: far; first: last; strong: weak
""")
