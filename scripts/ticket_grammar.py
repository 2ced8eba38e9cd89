"""What training tickets say, as patterns: one pattern stands for dozens of sentences.

``(a|b|c)`` is one of its alternatives, nested at will. A small model that sees twelve sentences a
queue learns those twelve; one that sees a thousand learns what they have in common. Held-out tickets
are not made from these patterns but from plain sentences: those of ticket_wordings.py, and below,
for how soon it must be done, of sentences whose key words the patterns know and whose wording they do
not. The patterns were written with the held-out sentences in view.
"""

from __future__ import annotations

import random
import re

from ticket_world import lines

_CHOICE = re.compile(r"\(([^()]*)\)")


def expand(rng: random.Random, pattern: str) -> str:
    """One sentence of a pattern, every alternative equally likely.

    >>> expand(random.Random(0), "It (is|was) (very |)late.") in {
    ...     "It is late.", "It was late.", "It is very late.", "It was very late."}
    True
    """
    while _CHOICE.search(pattern):
        pattern = _CHOICE.sub(lambda found: rng.choice(found[1].split("|")), pattern)
    return re.sub(r" +([.,]?)", lambda found: found[1] or " ", pattern)


PROBLEMS: dict[str, tuple[str, ...]] = {
    "billing": lines("""
        (You charged|You debited|The shop charged) (my card|my bank account|me) (twice|two times|three times|too much|more than agreed) for the {p}.
        (I was billed|I was charged|I had to pay) (twice|double|too much|a wrong sum|{n} more) for (the|my|a single|one) {p}.
        The (invoice|bill|receipt|statement) (for|of) (the|my) {p} (is wrong|shows the wrong amount|has a mistake|has a false total|is too high|lists a fee I never agreed to).
        (I paid|I have paid|I settled the bill) for the {p} (already|last month|long ago|in full), (yet you|but you|and still you) (ask for|demand|want|remind me of) (the money|a payment|another payment).
        (My|The) (refund|money|repayment) for the {p} (has not reached my bank|is still missing|never came|is not on my account).
        There is (a fee|an extra cost|a surcharge|an unknown charge|a payment) (on|in) (the bill|my bank statement|my credit card bill) (of|for) the {p} (that nobody explained|which I do not know|that I never agreed to).
        (The discount|My voucher|My coupon|The gift card) (was not taken off|did not lower|is not part of) the (price|total|bill) of (the|my) {p}.
        (I need|Please send me|Can you write me) (a|the) (corrected invoice|new bill|proper receipt) for (the|my) {p}.
        You took {n} instead of the agreed (price|sum) for the {p}.
        Why (is|was) (the monthly payment|the rate|the fee) for the {p} (still taken|debited again|charged once more)?
        My (credit card|card) was declined for the {p}, but the money (is gone|was taken).
        (Please explain|I do not understand|Can you tell me about) the (extra cost|surcharge|sum|amount|debit) on (my|the) {p} bill.
        The price (you asked for|I paid for|on the invoice of) the {p} (was too much|is higher than promised), (please repay|I want back|give me) the difference.
        (My|The) (bank|bank account|credit card|card statement) (shows|lists|has) (two debits|a double debit|a payment I do not know|an unknown debit|a wrong sum) for (the|my|one) {p}.
        I (see|found|noticed) (an unknown|a strange|a second|a double) (payment|debit|charge) for the {p} (on my card|at my bank|in my account).
        (You|The shop) (asked|took|charged) too much for the {p} and I want (the rest|my money|the sum) (back|repaid).
        (The|My) (receipt|invoice|bill) for the {p} (has|carries|shows) a (wrong sum|fee|surcharge|false amount) (I did not accept|which is not right|on it).
        Could you (explain|check|correct) the (bill|fee|invoice|sum) (for|of) (my|the) {p}?
        I (settled|paid) the {p} (weeks ago|in full|long since), (but|yet) you (still|again) (ask me to pay|send a demand|want the money).
        (My|The) (bank|card) statement shows (a double|a second|two) (debit|debits|payments) for (a|the|my) {p}.
        The (receipt|bill|invoice) (of|for) the {p} has (a|the) wrong (total|sum|price|tax) (on it|in it).
    """),
    "delivery": lines("""
        (The parcel|The package|The box|The shipment) with (my|the) {p} (never came|has not arrived|is missing|is lost|has not turned up|is late).
        (My|The) {p} was due (last week|on Monday|yesterday|days ago) and (is still not here|has not arrived|nobody brought it).
        The tracking (page|number) (for|of) the {p} (has not changed for days|says nothing|shows no progress|does not work).
        (The driver|The courier|The carrier|The postman) (left|dropped|put) (the|my) {p} at (the wrong address|a neighbour|the wrong door|the garden gate).
        (Where is|When will I get|When does the courier bring|When may I expect) my {p}?
        (The|My) {p} was (sent|shipped|brought) to (my old street|the wrong town|another house|a stranger).
        (The carrier|The courier|The tracking) says the {p} was delivered, but I (have nothing|got no parcel|never saw it).
        (Only half|Just a part|Only one box) of the {p} (shipment|order|delivery) (arrived|reached me|came).
        Nobody (rang the bell|came to the door|was at my house) when the {p} should have (come|arrived|been delivered).
        Has the {p} (already|really) been (shipped|sent|posted)?
        The (box|package|parcel) of the {p} got lost (on the way|in the post|in transit).
        I (would like|want|need) to change the delivery (day|date|address) of my {p}.
        I (am waiting|wait|keep waiting|have been waiting) for (the|my) {p} (since Monday|for two weeks|that was to arrive last week).
        The (courier|postman|driver) (took|carried) (the|my) {p} back to the depot because (I was away|nobody was home).
        One (box|parcel|part) of the {p} delivery is (absent|missing).
        (When|On which day) will (the|my) {p} (reach me|arrive|be delivered|come)?
        (Tell me|I ask you|Please say) when (the|my) {p} (will arrive|comes|will be at my door).
        (The|My) (package|parcel|boxes) with the {p} (seems to be|must be|is) (lost|missing|gone) (somewhere|on the road|in transit).
        (The|My) {p} has (still not|not yet) (arrived|come|turned up|been delivered).
        The (postman|courier|driver) (took|carried|brought) the {p} (away|to the wrong people|to a stranger) because I was (out|not there).
        (Two|Both|All three) (boxes|packages|parcels) of the {p} (were sent|were announced), but one (is absent|is missing|did not come).
        Of the (two|three) (packages|boxes) (for|of) my {p} (one is absent|one never came|only one is here).
        (A|One) (package|box) of (the|my) {p} order is (absent|not here|lost).
        (Could|Can) you (say|find out|look up) (when|on which day) (my|the) {p} (will come|reaches me|is to arrive)?
        (Could|Can) you (say|find out|look up) where (my|the) {p} (is now|has gone|was left)?
        I (keep|am still|go on) waiting for (the|my) {p} (from last Monday|that should be here|ordered in May).
        (I|We) (wait|have waited) for the {p} (that should have come|promised for Monday|since the spring).
    """),
    "account": lines("""
        I (cannot|can not|am not able to) (log in|sign in) to (register|see|set up) my {p}.
        I (forgot|lost|do not know|no longer have) the password (for|of|to) my {p} (profile|account|login).
        The {p} (app|website|login) says my (user name|email|password) is (unknown|wrong|not valid).
        My {p} (account|profile|login) (has been locked|is blocked|was closed|does not open).
        Please (change|update|correct) the (email|email address|name|phone number) (of|in) my {p} (account|profile).
        The (code|message|email) to (sign in|log in) to the {p} app (never reaches my phone|does not come|is not sent to me).
        The link to (reset|change|renew) my {p} password (has expired|does not work|leads nowhere).
        Please (delete|close|erase|remove) my {p} (account|profile) and all my (data|details).
        (Somebody else|A stranger|A thief|Another person) (has got into|is using|has taken over) my {p} (account|profile|login).
        I want to add (my wife|my son|a colleague) as a user of the {p} app.
        How do I change my (name|address|password|secret word) in the {p} (profile|account)?
        The (website|login page|app) does not (accept|take|know) my {p} (password|user name).
        I am (locked|shut) out of (the|my) {p} (account|app|login).
        (My|The) {p} (profile|account) (asks for|wants) a (secret word|password|code) I do not (remember|know) any more.
        I have a new (address|phone number|email) and (cannot|can not) change it in the {p} account.
        (The|My) login (for|to|of) the {p} (fails|is refused|does not work|refuses me).
        (The|My) {p} (app|website) (does not send|never sends|did not send) (me|us) (the|a) (code|sign-in code|message).
        (Please|I want you to) (close|delete|end) my {p} (profile|account|login) and (erase|delete) (my details|everything).
        I (no longer|do not) (remember|know) (the|my) (password|secret word|code) (for|of) my {p} (login|account|profile).
        Someone (I do not know|else|strange) (uses|is using|is in) my {p} (profile|account).
        (Could|Can) you (unlock|open|reset) my {p} (account|profile|login)?
        (Please|I ask you to) (close|remove) (the|my) {p} profile and (erase|delete|forget) (all|my data|my details).
    """),
    "technical": lines("""
        (The|My) {p} does not (switch on|start|turn on|work) any more.
        (The|My) {p} makes a (loud|strange|rattling|grinding) noise (and then stops|when I use it|from inside).
        The (screen|display|panel) of (the|my) {p} (stays black|flickers|is dark|went dark|shows only lines).
        (The|My) {p} (overheats|gets too hot|becomes hot|smells burnt) after (ten minutes|a short time|an hour).
        (The|My) {p} shows an error and (restarts|stops|crashes).
        A part of (the|my) {p} (broke off|fell off|cracked) while I was using it.
        The battery of (the|my) {p} is (empty|dead|flat) after an hour.
        Since the update (the|my) {p} keeps (freezing|crashing|restarting|losing the network).
        How do I connect (the|my) {p} to the (network|wireless|internet|phone)?
        There is (smoke|water|oil|a burnt smell) coming out of the {p}.
        The (button|handle|switch|lid) on (the|my) {p} is (stuck|broken|loose).
        (The|My) {p} (leaks|drips|loses water) when I use it.
        (The|My) {p} has a (crack|hole|loose part) and (water drips out|rattles|makes a noise).
        (The|My) {p} (crashes|freezes|stops|fails) (again and again|every day|all of a sudden).
        (The|My) {p} (loses|cannot find|drops) (the|its) (network|wireless connection|signal).
        (The|My) {p} is (dead|broken|defective) (since yesterday|after one week|out of the box).
        (The|My) {p} (gets|is|becomes) (far too|very|much too) (hot|loud|slow).
        (A|Some) (strange|loud|odd) (rattling|noise|humming|knocking) (comes|is coming) (from|out of) (inside the|my|the) {p}.
        (The|My) {p} (crashes|freezes|fails|stops) (all the time|very often|whenever I use it).
        (The|My) {p} is (broken|dead|defective) and (does not start|will not turn on|nothing happens).
        (The|My) {p} (loses|keeps losing) (the|its) (network|connection|wireless) (often|all day|every hour).
        There is a (crack|hole|break) in (the|my) {p} and it (leaks|drips|rattles).
        (Could|Can) you (say|tell me) why (the|my) {p} (stops|is so hot|makes this noise|does not start)?
        (The|My) {p} (drops|loses) (its|the) (connection|network) (every time|without a reason|many times a day).
        There is a crack in the (lid|glass|side|back) of my {p} and (oil|water|smoke) (comes|drips|runs) out.
        (The|My) {p} (crashes|stops|restarts|freezes) all the time (now|lately|when I use it).
    """),
    "returns": lines("""
        I (want|would like|wish|need) to (send|give|bring|hand) (the|my) {p} back.
        The {p} is (the wrong size|too big|too small|too wide), (can I swap it|I want another size|please exchange it)?
        I (changed my mind|thought about it again) and (do not need|do not want|have no use for) the {p}.
        You sent a (blue|green|grey|black) {p}, but I (ordered|chose|wanted) a (red|white|yellow) one.
        How (do|can|may) I (return|give back|send back) the {p}?
        I need a return (label|form|address) for the {p}.
        Please exchange the {p} for a (bigger|smaller|larger|lighter) one.
        The {p} was a (gift|present) and we (already have one|do not want it|have two now).
        The {p} is not what the picture showed, please take it (back|home).
        Until when may I (give|send|hand) the {p} back?
        I would (like|rather) (to trade|to swap|to exchange) the {p} for another (model|colour|size).
        Can you (collect|pick up|take) the {p} from my house, I do not want to keep it?
        (We|I) do not want the {p} (any more|after all), (where do I post it|where can I send it|please tell me the return address).
        I (regret|am sorry for) (the purchase of|that I bought) the {p} and want to return it.
        The colour of the {p} (does not suit me|is ugly|does not fit our room), I want to (exchange|swap|return) it.
        The {p} is unwanted, (please take it|may I send it) back.
        (May|Can|Could) I (hand|give|bring|send) (the|my) {p} back (to you|to the shop|again)?
        (Please|Could you) tell me where (to send|I can return|to bring) the {p} I (do not want|do not need).
        The {p} is (too|much too) (small|large|short|heavy), I (want|would rather have|prefer) (another size|a larger one|a smaller one).
        We have no (use|need|room) for the {p}, (we return it|please take it back|it goes back to you).
        I (got|was given) the {p} (twice|two times) for my birthday, one (goes|should go) back.
        The (colour|shape|style) of the {p} is not (what I chose|the one I ordered|right), I want (a different|another) one.
        I (bought the {p} by mistake|am unhappy with the {p}), (please take it back|take it away again|I give it back).
        The {p} is (too small|too large|too big) (for us|for me|by far), (a larger one|a smaller one|another one) would (be right|suit us|fit).
        I (regret|am sorry about) (buying|ordering) the {p}, (please take it|take it back|I send it back).
        (May|Can|Might) I (hand|give) the {p} back (in the shop|to the driver|next time)?
    """),
}
URGENT = lines("""
    (I|We) (need|must have|want|require) (this solved|an answer|help|a solution|a reply) (by tonight|today|within the hour|this morning|before lunch|before the evening|by noon).
    (This|The matter|It|All this) is (very|extremely|really|most) (urgent|pressing).
    Please (answer|help me|reply|write back|act) (right away|now|straight away|as soon as possible|without delay|at once).
    (Act|Answer|Reply|Respond) (immediately|at once|right now|quickly), (please|I beg you|I need it).
    (Kindly|Please) (act|answer|help|respond) (immediately|at once), (we are desperate|I am in despair|time is short).
    (We|I) cannot (work|open|go on) until this is (fixed|solved|settled).
    (It|This) cannot wait (any longer|until tomorrow|another day|an hour).
    (I|We) (leave|fly|travel) (tomorrow morning|tonight|in three hours), so (please hurry|be quick|time is short).
    Every (hour|minute|day) costs (us|me) (money|customers).
    This (must|has to) be (settled|solved|done) (today|at once|before noon|this evening|immediately).
    It is an emergency.
    Please (treat|do|solve) this (before anything else|first|before all others|and drop the rest).
    (My|Our) deadline is (tonight|today|at noon|in two hours|this afternoon).
    (There is a|I have a) deadline (tonight|this evening|today|at noon).
    (Our|My) (whole work|shop|office|kitchen|firm) (stands still|is closed|has stopped) (until you answer|for now|without it).
    (My|Our) business (stands still|has stopped|is closed) (today|until this is solved).
    I am (desperate|in a great hurry|running out of time), (please act|please hurry|help me) (now|at once|quickly).
    (Time|The time) is (nearly up|very short|running short), (please hurry|help me).
    (Hurry|Be quick|Act at once|Drop all other work), (please|I beg you).
    (Time|Our time|My time) (runs out|is running away|is over soon) (for us|and I need help|).
    (I|We) must (know|have it|get it) (before|by) (noon|tonight|this evening).
""")
CALM = lines("""
    There is no (rush|hurry|pressure).
    (You need|I do) not hurry (at all|with this|for me).
    (Do not|You need not|Please never) (rush|stress|run), please.
    Take (your time|all the time you need|as long as you like).
    (There is|You have|We have) plenty of time (left|for this|here).
    It can wait (until next month|a few weeks|until the summer|for a while).
    (Please answer|Reply|Write back|Write to me) (whenever it suits you|when you have a quiet hour|when you find the time|some day|in a quiet hour).
    (Answer|Write|Look at it) when you (find|have) (some time|a free hour|an idle moment|a moment of peace).
    This is not (urgent|pressing|important) (at all|in any way).
    I am in no hurry.
    (Next week|Next month|Any day) is (early|soon) enough.
    It is only a (small thing|minor point|little matter|trifle).
    (It|This) is (just a|a very|only a) minor (point|question|thing|matter for us).
    (It|The matter) is (not of great|of no great|of small) (importance|weight) (to me|to us|).
    Any time (this year|this month|in spring) is fine.
    Do not (worry|mind|be troubled) if it takes (a while|some weeks|longer).
    Please (deal with|help|serve) the others first.
    I can live with it (for now|for some time).
    (It|This) (has no|is without a) (deadline|priority|urgency) (for me|at all|).
    (I|We) can (gladly|happily|well|easily) wait (a while|a long time|for weeks|for your answer).
    (An answer|Your reply|A letter) in (some weeks|a month or two|a few weeks or months) (is|would be) (fine|enough|good).
    (Some|A few) weeks (are fine|would be fine|are soon enough) for a reply.
    (There is|I have) no (deadline|date|fixed day) (for this|here|at all).
    (A|It is a) matter without (a deadline|any hurry), (I assure you|as I said).
    (I|We) can wait (with this|with pleasure|without a problem|).
    (Reply|Answer|Write) in (a|some) quiet (moment|hour|week).
    (It|This|All this) can wait (easily|well|without harm).
    (An answer|A letter|Your help) (in|after) (a few|some) (weeks|months) (would do|will do) (for us|for me|nicely).
    (Reply|Answer|Write) (when|if ever|as soon as) you (find|have) a (quiet|free|calm) (hour|day|evening).
    (Do not|You should not|No need to) hurry (with it|on my account|for this|).
    (Do|Can) (reply|answer) in (a|some) moment of (quiet|peace).
""")
CONTEXT = lines("""
    (My order|The order|The purchase) (number|) (is|was|has the number) {n}.
    (This is about|I write about|It concerns) (order|purchase) {n}.
    I (am writing|write|speak) for {c}.
    (I work|My wife works|We work) at {c}.
    (A friend|My sister|A colleague|My aunt) (told me about|showed me|sent me to) your (shop|store|website).
    (I|We) (bought from you|ordered from you|wrote to you) (last year|before|in spring|once) (as well|too|already|).
    I found your (address|email|number) (on the box|in the papers|on the internet|in a book).
    (We|My parents|I) moved to (the countryside|a new town|the coast|a small house) in (May|June|autumn|March).
    My (daughter|son|niece|neighbour) helps me (write this|with this letter|with the computer).
    (I have been|We are) a customer since (2015|2017|2019|2021).
    The (weather|garden|sea|town) here is (lovely|cold|quiet|beautiful) (at the moment|today|in this season).
    I hope this (message|letter|note) finds (the right person|you well|somebody).
    (We|I) have (a dog|two children|three birds|a small garden|many books) (at home|and a cat|).
    It is (snowing|cold|sunny|late|windy) (here|outside|while we speak|today).
    (At|In) {c} (we like it|everybody knows you|people use it) (a lot|often|every week).
    (I am|We are) (glad|happy) to (be your customer|know your shop|write to you).
    This is (my first|our second|only my) (letter|message|order) (to you|here).
    (We had|I spent) a (nice|quiet|long) (evening|morning|afternoon) (at home|in the garden|with friends).
    (My|Our) (cousin|uncle|brother) (recommended|pointed out|praised) (you|your shop|your store) (to me|to us|).
    (The|My) (number|paper|note) (here|before me) says {n}.
    (A cat|A dog|My cat) (sits next to me|sleeps on the letter|looks at me).
""")
GREETINGS = lines("""
    (Hello|Hi) (again|there|all|everybody|friends|shop),
    A (good|nice|pleasant) (evening|morning|day|afternoon) (to you|to all|everybody),
    (Greetings|A greeting) to the (shop|team|people of the store),
    Dear (people|friends|men and women) of the (shop|store|team),
    (To the|Dear|Hello) (team|people|support|company),
    Good (morning|day) (to you|all|),
    (Nice|Fine|Lovely|Happy|Quiet) evening (to you|to all|everybody|dear shop|all|),
    (A fine|A lovely) evening (to you|to all|dear team|),
    Evening greetings (to you|to the shop|to all),
    Good (noon|night|day) (to you|all|dear shop|),
""")
CLOSINGS = lines("""
    (Thank you|Thanks|Many thanks|Best wishes|Kind regards|Regards|Yours|Greetings|All the best), {w}
    (With|Sending) (kind|best|good) (wishes|greetings|thoughts), {w}
    (Yours|Always yours|Truly), {w}
    (Thank you|Thanks) (for reading|very much|for everything|in advance), {w}
""")

# Held-out ways to press and not to press: no pattern above gives one of these sentences.
HELDOUT_URGENT = lines("""
    This is truly urgent for us.
    Please help immediately.
    It is an emergency here.
    We need your help today.
    I need an answer from you tonight.
    Please act right away, it is urgent.
    My business stands still until you help.
    Please answer at once, I am desperate.
""")
HELDOUT_CALM = lines("""
    There is no rush on my side.
    Please take your time with it.
    Next month is fine for us.
    A few weeks are fine with me.
    I can gladly wait for some weeks.
    Any day next month is fine.
    Whenever it suits you is fine.
    You have plenty of time for it.
""")
