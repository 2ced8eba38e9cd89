"""What tickets say: two banks of sentences, ``TRAIN`` and ``HELDOUT``, that share none.

Both say the same kinds of things in different words, so a held-out score shows whether a model
understood them. Used by make_tickets.py and make_corpus.py; it has no command of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from ticket_world import QUEUES, lines


@dataclass(frozen=True)
class Wordings:
    """One side's sentences. ``{p}`` product, ``{d}`` decoy, ``{c}`` company, ``{n}`` number."""

    greetings: tuple[str, ...]
    context: tuple[str, ...]
    decoys: tuple[str, ...]
    problems: dict[str, tuple[str, ...]]
    urgent: tuple[str, ...]
    calm: tuple[str, ...]
    closings: tuple[str, ...]

    def sentences(self) -> tuple[str, ...]:
        """Every sentence template of this side, in a fixed order."""
        problems = [self.problems[queue] for queue in QUEUES]
        banks = [self.greetings, self.context, self.decoys, *problems]
        banks += [self.urgent, self.calm, self.closings]
        return tuple(sentence for bank in banks for sentence in bank)


TRAIN = Wordings(
    greetings=lines("""
        Hello,
        Hi there,
        Good morning,
        Dear team,
        Hello support,
        Dear Sir or Madam,
        Hi,
        Good day,
    """),
    context=lines("""
        My order number is {n}.
        This is about order {n}.
        I am writing for {c}.
        I work at {c}.
        A friend told me about your shop.
        I bought from you last year as well.
        I found your address on the box.
        We moved to the countryside in May.
        My daughter helps me write this.
        I have been a customer since 2019.
        The weather here is lovely at the moment.
        I hope this message finds the right person.
    """),
    decoys=lines("""
        My old {d} works fine.
        I also own a {d} and I love it.
        The {d} I bought before was perfect.
        There is no problem with my {d}.
        This is not about the {d}, which is great.
        My neighbour is happy with her {d}.
        I also looked at the {d} in your shop.
        We have had a {d} for years without any trouble.
    """),
    problems={
        "billing": lines("""
            You charged my card twice for the {p}.
            I was billed two times for one {p}.
            The invoice for the {p} shows the wrong amount.
            I paid for the {p}, yet you sent a reminder to pay again.
            My refund for the {p} has not reached my bank.
            There is a fee on the bill of the {p} that nobody explained.
            The discount code was not taken off the price of the {p}.
            I need a corrected invoice for the {p} with our tax number.
            You took {n} instead of the agreed price for the {p}.
            Why is the monthly payment for the {p} still taken after I cancelled it?
            My card was declined for the {p}, but the money is gone.
            Please explain the extra cost on my {p} bill.
        """),
        "delivery": lines("""
            The parcel with my {p} never came.
            My {p} was due last week and is still not here.
            The tracking page for the {p} has not changed for days.
            The driver left the {p} at the wrong address.
            Where is my {p}?
            The {p} was sent to my old street.
            The carrier says the {p} was delivered, but I have nothing.
            Only half of the {p} shipment arrived.
            Nobody rang the bell when the {p} should have come.
            Has the {p} already been shipped?
            The box of the {p} got lost on the way.
            I would like to change the delivery day of my {p}.
        """),
        "account": lines("""
            I cannot log in to register my {p}.
            I forgot the password for my {p} profile.
            The {p} app says my user name is unknown.
            My {p} account has been locked.
            Please change the email address of my {p} account.
            The code to sign in to the {p} app never reaches my phone.
            The link to reset my {p} password has expired.
            Please delete my {p} account and all my data.
            Somebody else has got into my {p} account.
            I want to add my wife as a user of the {p} app.
            How do I change my name in the {p} profile?
            The website does not accept my {p} password.
        """),
        "technical": lines("""
            The {p} does not switch on any more.
            My {p} makes a loud noise and then stops.
            The screen of the {p} stays black.
            The {p} overheats after ten minutes.
            The {p} shows an error and restarts.
            A part of the {p} broke off while I was using it.
            The battery of the {p} is empty after an hour.
            Since the update the {p} keeps freezing.
            How do I connect the {p} to the network?
            There is smoke coming out of the {p}.
            The button on the {p} is stuck.
            The {p} leaks when I use it.
        """),
        "returns": lines("""
            I want to send the {p} back.
            The {p} is the wrong size, can I swap it?
            I changed my mind and do not need the {p}.
            You sent a blue {p}, but I ordered a red one.
            How do I return the {p}?
            I need a return label for the {p}.
            Please exchange the {p} for a bigger one.
            The {p} was a gift and we already have one.
            The {p} is not what the picture showed, please take it back.
            Until when may I give the {p} back?
            I would like to trade the {p} for another model.
            Can you collect the {p} from my house, I do not want to keep it?
        """),
    },
    urgent=lines("""
        I need this solved by tonight.
        This is very urgent.
        Please answer right away.
        We cannot work until this is fixed.
        It cannot wait any longer.
        Please help me as soon as possible.
        I leave tomorrow morning, so please hurry.
        Every hour costs us money.
        This must be settled today.
        It is an emergency.
        I need an answer within the hour.
        Please treat this before anything else.
    """),
    calm=lines("""
        There is no rush.
        Take your time.
        It can wait until next month.
        Please answer whenever it suits you.
        This is not urgent at all.
        I am in no hurry.
        Next week is early enough.
        It is only a small thing.
        Any time this year is fine.
        Do not worry if it takes a while.
        Please deal with the others first.
        I can live with it for now.
    """),
    closings=lines("""
        Thank you, {w}
        Regards, {w}
        Best wishes, {w}
        Thanks, {w}
        Kind regards, {w}
        Yours, {w}
        Many thanks, {w}
        Greetings, {w}
    """),
)

HELDOUT = Wordings(
    greetings=lines("""
        Good evening,
        To whom it may concern,
        Hey,
        Dear shop,
        Good afternoon,
    """),
    context=lines("""
        You will find me under purchase {n}.
        The number on my paper is {n}.
        I look after the office of {c}.
        At {c} we use it every day.
        My cousin pointed me to your store.
        We have two cats and a garden.
        It is raining while I write this.
        I have never written to you before.
    """),
    decoys=lines("""
        Our earlier {d} still runs without a fault.
        I am very pleased with the {d} from you.
        My brother has a {d} and praises it.
        Please leave the {d} aside, all is well there.
        In spring I bought a {d}, a fine thing.
    """),
    problems={
        "billing": lines("""
            My bank statement shows two debits for a single {p}.
            You asked too much for the {p} and I want the difference repaid.
            The bill for my {p} carries a surcharge I never agreed to.
            My voucher did not lower the total of the {p}.
            I have settled the {p} long ago, but you still demand payment.
            The receipt of the {p} has a wrong sum on it.
            I see an unknown payment for a {p} on my credit card.
        """),
        "delivery": lines("""
            My {p} has not turned up yet.
            The courier dropped the {p} at a stranger's door.
            I keep waiting for the {p} that should have arrived on Monday.
            Could you tell me when the {p} will reach me?
            The package with the {p} seems to be missing in transit.
            One of the two packages of the {p} is absent.
            The postman took the {p} away again because I was out.
        """),
        "account": lines("""
            The login for the {p} refuses my password.
            I am shut out of my {p} profile.
            I no longer remember the secret word for my {p} login.
            A stranger is using my {p} profile.
            I have a new email, please update it in my {p} profile.
            Please close my {p} profile and erase my details.
            The {p} app does not send me the sign-in code.
        """),
        "technical": lines("""
            My {p} is dead and will not start.
            The {p} crashes all the time.
            There is a crack in the {p} and water drips out.
            The {p} gets far too hot.
            The display of my {p} flickers and goes dark.
            A strange rattling comes from inside the {p}.
            The {p} loses its wireless connection again and again.
        """),
        "returns": lines("""
            May I hand the {p} back to you?
            The {p} is too small, I would rather have a larger one.
            The colour of the {p} is not the one I chose, I want another.
            We have no use for the {p} and want to give it back.
            Please tell me where to post the unwanted {p}.
            I regret buying the {p}, please take it off my hands.
            I got the {p} twice as a present, one should go back to you.
        """),
    },
    urgent=lines("""
        Please act immediately.
        I must have a solution before noon.
        Our whole business stands still because of this.
        Time is running out for me.
        Kindly reply at once, I am desperate.
        The deadline is this evening.
        Drop everything else, please.
    """),
    calm=lines("""
        Please do not hurry.
        Reply when you find a quiet moment.
        It has plenty of time.
        A reply in a few weeks would do.
        It is of little importance.
        I can easily wait.
        This is a minor matter with no deadline.
    """),
    closings=lines("""
        Sincerely, {w}
        Warm regards, {w}
        Cheers, {w}
        With thanks, {w}
        Respectfully, {w}
    """),
)

WORDINGS = {"train": TRAIN, "heldout": HELDOUT}

# One house style for replies, the same on both sides: the style is what training should teach.
REPLIES = {
    "billing": "We will check the payment for your {p}.",
    "delivery": "We will find out where your {p} is.",
    "account": "We will open the account of your {p} for you.",
    "technical": "We will help you to repair your {p}.",
    "returns": "We will take your {p} back.",
}
