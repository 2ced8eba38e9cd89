"""What people mean: complaints by kind of matter, and ways to press or not to press.

The base has to know *what people mean* before it is ever shown a ticket: that being debited two
times is a money matter, that "by noon" presses and "no hurry" does not. So these clauses use the
key words of both ticket banks, inside other sentences: ``{t}`` is the thing talked about. No ticket
sentence stands here, and no answer in the ticket format; make_corpus.py refuses to run otherwise.
It has no command of its own.
"""

from __future__ import annotations

from ticket_world import lines, words

# What can happen to a thing, by the kind of matter it is.
CLAUSES = {
    "money": lines("""
        the card was charged two times over for {t}
        someone was charged twice for {t}
        the bank statement had two debits where one was due, both for {t}
        the same sum was billed twice for {t}
        the invoice of {t} had the wrong amount on it
        the receipt of {t} had a wrong sum, and nobody wanted to correct it
        a surcharge was put on the bill of {t} that nobody agreed to
        an extra fee stood on the bill of {t} and nobody explained it
        the refund for {t} never reached the bank
        the voucher was not taken off the total of {t}
        the discount code did not lower the price of {t}
        the shop demanded payment for {t} although it was settled long ago
        a reminder came to pay again for {t} which was already paid
        there was an unknown payment for {t} on the credit card
        the monthly payment for {t} was still taken after it was cancelled
        the card was declined at the desk and yet the money for {t} was gone
        the shop asked too much for {t} and the difference had to be repaid
        the tax number was missing on the invoice of {t}
        the extra cost of {t} was not explained on the bill
        the shop took more than the agreed price for {t}
        the debit for {t} was too high
        the receipt for {t} listed a tax that was not owed
        the bill for {t} was too high
        the price of {t} was debited from the bank two times
        a payment for {t} was asked that was never agreed
        an invoice for {t} had to be corrected
        a letter demanded money for {t} again
        the shop did not explain the fee for {t}
        the total for {t} was wrong and the voucher was forgotten
    """),
    "parcel": lines("""
        a parcel was sent with {t} and never came
        {t} was due last week and was still on its way
        the tracking page of {t} did not change for days
        the driver left {t} at a wrong address
        the courier dropped {t} at the door of a stranger
        {t} was sent to an old street
        the carrier called {t} delivered though nobody had seen it
        only half of the shipment of {t} had arrived
        one of the packages of {t} was missing and the other came alone
        the box with {t} got lost in transit
        the package with {t} was absent from the van
        nobody rang the bell when {t} should have arrived
        the postman took {t} away again because nobody was in
        {t} had not turned up and nobody knew where it was
        nobody could tell when {t} would reach the house
        someone kept waiting for {t} that should have come on Monday
        someone asked whether {t} was already shipped
        the delivery day of {t} had to be moved
        the van with {t} drove past the house
        {t} seemed to be missing somewhere on the road
        people asked where {t} was
        {t} should have arrived long ago
        {t} went to a stranger by mistake
        the tracking of the shipment with {t} stood still
        the postman and the driver never brought {t}
        one box arrived and the other box of {t} did not
        somebody was out when the courier came with {t}
    """),
    "entry": lines("""
        nobody could log in to the profile of {t}
        the login of {t} refused the password
        someone forgot the password of {t}
        someone no longer knew the secret word for the login of {t}
        the app of {t} did not know the user name
        the account of {t} was locked
        the owner was shut out of the account of {t}
        the owner could not remember the secret word to open {t}
        the email address in the profile of {t} was old and needed an update
        the new email had to be put into the account of {t}
        the code to sign in to {t} never reached the phone
        the app of {t} did not send the sign-in code
        the link to reset the password of {t} had expired
        the account of {t} had to be deleted with all its data
        the profile of {t} had to be closed and the details erased
        a stranger got into the account of {t}
        somebody else was using the profile of {t}
        a second user had to be added to the app of {t}
        the name in the profile of {t} had to be changed
        the website did not accept the password of {t}
        the password for {t} was refused
        a new password was needed for the app of {t}
        the app of {t} refused to let the user sign in
        a new name and email were needed for the profile of {t}
        the user was locked out of {t} and its app
        the details of the user of {t} should be erased
        the user name for {t} was not accepted
    """),
    "fault": lines("""
        {t} did not switch on any more
        {t} was dead and would not start
        {t} made a loud noise and then stopped
        a strange rattling came from the inside of {t}
        the screen of {t} stayed black
        the display of {t} went dark after it had flickered
        {t} overheated after a short while
        {t} got far too hot to touch
        {t} showed an error and restarted
        {t} crashed all the time
        {t} kept freezing since the last update
        a part of {t} broke off in use
        there was a crack in {t} and water dripped out
        {t} leaked all over the floor
        the battery of {t} was empty within the hour
        {t} lost its wireless connection again and again
        nobody knew how to connect {t} to the network
        smoke came out of {t}
        the button of {t} was stuck
        {t} rattled, flickered and went silent
        somebody asked how to connect {t}
        {t} broke and nobody could repair it
        the wireless connection of {t} failed
        {t} was hot and smelled of smoke
        {t} stopped working in the middle of the day
        the display of {t} flickered
        a crack ran through {t}
    """),
    "undoing": lines("""
        the buyer wanted to send {t} back
        the family wanted to give {t} back as they had no use for it
        {t} was the wrong size and had to be swapped
        {t} was too small and a larger one was wanted
        somebody wanted a bigger one in exchange for {t}
        somebody changed their mind and did not need {t}
        somebody regretted buying {t}
        {t} was blue, but a red one was ordered
        the colour of {t} was not the one that was chosen
        a label was needed to return {t}
        {t} was a gift for people who already had one
        {t} came twice as a present and one had to go back
        {t} was not like the picture, and the shop should take it back
        the last day to give {t} back was near
        somebody wished to trade {t} for another model
        {t} was unwanted and should be collected from the house
        somebody asked where to post {t} which was unwanted
        somebody asked if they may hand {t} back
        the shop should take {t} off their hands
        nobody wanted to keep {t}
        somebody asked how to return {t}
        {t} had the wrong colour and another was chosen
        the buyer had no use for {t}
        somebody would rather have a larger one than {t}
        somebody got {t} twice and had to return one
        {t} was unwanted and had to go back to the shop
        {t} should be exchanged for one of another size
    """),
}

# How the prose names each kind of matter. Ordinary English: no ticket label in ticket form.
MATTERS = {
    "money": lines("""
        a matter of money
        a question of billing and payment
        something for the people who do the billing
    """),
    "parcel": lines("""
        a matter of a parcel on its way
        a question of delivery
        something for the people who bring the delivery
    """),
    "entry": lines("""
        a matter of getting into an account
        a question of the account and its password
        something for the people who look after each account
    """),
    "fault": lines("""
        a technical matter
        a technical fault, something that does not work
        something for the technical people who repair things
    """),
    "undoing": lines("""
        a matter of giving something back
        a question of returns
        something for the people who handle returns
    """),
}

# Clauses that press, and clauses that do not. Both follow "that", "because" or a full stop.
PRESSING = lines("""
    it had to be solved by tonight
    it was very urgent
    it was urgent and could not wait any longer
    somebody had to answer right away
    no one could work until it was fixed
    help was needed as soon as possible
    there was a journey tomorrow morning, and everyone had to hurry
    every hour was costing money
    it must be settled today
    it was an emergency
    an answer was needed within the hour
    it had to be treated before anything else
    somebody had to act immediately
    there must be a solution before noon
    the whole business stood still because of it
    time was running out
    a reply was needed at once
    everyone was desperate
    the deadline was this very evening
    people should drop everything else
    it was pressing and there was no time to lose
    it had to be done immediately or never
""")
RELAXED = lines("""
    there was no rush
    everyone could take their time
    it could wait until next month
    an answer might come whenever it suited
    it was not urgent at all
    nobody was in a hurry
    next week was early enough
    it was only a small thing
    any time this year was fine
    nobody had to worry if it took a while
    the others could be dealt with first
    one could live with it for now
    nobody needed to hurry
    a reply could come in a quiet moment
    it had plenty of time
    a reply in a few weeks was good enough
    it was of little importance
    it could easily wait
    it was a minor matter
    no deadline was set for it
    there was all the time in the world
""")
# The same two meanings as wishes said straight to the reader.
WISHES = {
    "press": lines("""
        Act at once!
        You must act immediately, I beg you.
        We are desperate, be quick.
        I have to have a solution today, before noon.
        Answer me within the hour or I am lost.
        Hurry, please, hurry.
        Be so kind and reply at once.
        Drop everything and help me.
        Let nothing else come before this.
        Our business cannot go on without it.
        My deadline is tonight.
        I have no time left.
        Solve it now, tomorrow is too late.
        Nothing is more urgent for us.
    """),
    "relax": lines("""
        You need not hurry.
        Please feel no hurry.
        I do not need a reply soon.
        Reply in a quiet moment if you like.
        A reply next month would do well.
        A few weeks more or less do not matter.
        Wait as long as it suits you.
        I can wait, easily.
        I have plenty of time.
        My wish is a minor one, without a deadline.
        It is of no great importance to me.
        See to the others before me.
        Do it some time this year.
        Let it take a while, I am not worried.
    """),
}
# Words that keep company.
COMPANY = {
    "money": words("""invoice bill receipt refund voucher discount fee surcharge debit payment price
        tax bank total cost charge sum reminder"""),
    "parcel": words("""parcel package courier driver carrier postman tracking shipment van transit
        address doorbell delivery arrival"""),
    "entry": words("""password login profile account email user code link website stranger
        details"""),
    "fault": words("""battery screen display noise smoke crack leak button error update network
        connection heat rattling freezing crash"""),
    "undoing": words("""return exchange swap size colour trade gift present unwanted label
        regret"""),
}
URGENCIES = {
    "press": lines("""
        It presses: it must be done at once.
        It is urgent and has a high place in the list.
        That is urgent, it comes first.
        The hurry is high.
    """),
    "relax": lines("""
        It does not press: it can wait.
        There is no hurry, it has a low place in the list.
        That is not urgent, it may come last.
        The hurry is low.
    """),
    "plain": lines("""
        Nothing is said about hurry, so it takes its normal turn.
        No word about time, so it has a normal place in the list.
        It is neither urgent nor slow, just normal.
        The hurry is normal.
    """),
}
