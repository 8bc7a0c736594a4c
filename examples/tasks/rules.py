"""A system prompt of ten rules, and a transcript in which one is broken: which? Each rule is checked by a pattern."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from tasks.item import Draw, Item

__all__ = ["PROMPTED", "Rule", "broken", "drawn_rules"]

PROMPTED = 10


@dataclass(frozen=True)
class Rule:
    """What a system prompt says, and how one sees in a reply that it was kept.

    `pattern` must be found in a reply if `wanted`, else it must not. `kept` and `lapse` are what a reply holds when the
    rule is kept or broken, `place` where: its opening, its body or its closing.
    """

    text: str
    pattern: str
    wanted: bool
    place: str
    kept: str
    lapse: str

    def holds(self, reply: str) -> bool:
        """Whether a reply keeps the rule."""
        return (re.search(self.pattern, reply) is not None) == self.wanted


NAMES = ["Mira", "Jonas", "Tess", "Ravi", "Noor", "Pavel"]
BRANDS = ["Northwind", "Bluefern", "Oakline", "Silverbay"]
PLACES = ["Lisbon", "Oslo", "Turin", "Ghent"]
WORDS = ["splendid", "marvellous", "fabulous", "terrific"]
BODIES = [
    "Your parcel left our warehouse this morning and should be with you soon.",
    "The blue lamp is in stock, and we can put one aside for you.",
    "We have changed the address of your order as you wished.",
    "The chair comes with all the screws and a small tool.",
    "Your refund was sent to the same account that you paid from.",
]
QUESTIONS = [
    "Where is my order?",
    "Can you help me with what I bought?",
    "What happens next with my order?",
    "Is there any news for me?",
]


def drawn_rules(rng: random.Random) -> list[Rule]:
    """Ten rules in random order, out of more, with names and numbers of their own."""
    name, brand, place, word = (rng.choice(of) for of in (NAMES, BRANDS, PLACES, WORDS))
    ticket = f"{rng.randrange(1000, 10000)}"
    phone = f"555-{rng.randrange(1000, 10000)}"
    every = [
        Rule(f"Begin every reply with the name {name}.", rf"^{name}\b", True, "opening", f"{name},", "Hello there,"),
        Rule("End every reply with the words Kind regards.", r"Kind regards\.$", True, "closing",
             "Kind regards.", "Goodbye."),
        Rule(f"Name the ticket {ticket} in every reply.", rf"\b{ticket}\b", True, "body",
             f"This is about ticket {ticket}.", "This is about your ticket."),
        Rule("Thank the customer in every reply.", r"[Tt]hank you", True, "body",
             "Thank you for writing to us.", "We read your message."),
        Rule(f"Say in every reply that our shop is in {place}.", rf"\bin {place}\b", True, "body",
             f"Our shop is in {place}.", "Our shop is in the old town."),
        Rule(f"Never mention the company {brand}.", rf"\b{brand}\b", False, "body", "", f"You may also ask {brand}."),
        Rule(f"Never use the word {word}.", rf"\b{word}\b", False, "body", "", f"That is a {word} choice."),
        Rule("Never use an exclamation mark.", r"!", False, "body", "", "That is good news!"),
        Rule("Never ask the customer a question.", r"\?", False, "body", "", "Is there anything else?"),
        Rule("Never give a telephone number.", r"\d{3}-\d{4}", False, "body", "", f"Our number is {phone}."),
        Rule("Never say sorry.", r"\b[Ss]orry\b", False, "body", "", "We are sorry for the wait."),
        Rule("Never write a price in dollars.", r"\$|dollar", False, "body", "", "It was 20 dollars in all."),
        Rule("Never put anything in brackets.", r"[()]", False, "body", "", "It weighs little (two pounds)."),
    ]  # fmt: skip
    return rng.sample(every, PROMPTED)


def reply_of(rules: list[Rule], lapse: Rule | None, body: str, rng: random.Random) -> str:
    """A reply that keeps all rules but one."""
    said = {place: [one.lapse if one is lapse else one.kept for one in rules if one.place == place] for place in
            ("opening", "body", "closing")}  # fmt: skip
    middle = [body, *filter(None, said["body"])]
    rng.shuffle(middle)
    return " ".join(filter(None, [*said["opening"], *middle, *said["closing"]]))


def broken(draw: Draw, index: int) -> Item:
    """The number of the rule that the transcript's last reply breaks; the reply before it keeps all."""
    rng = draw.rng("rules", index)
    rules = drawn_rules(rng)
    lapse = rng.choice(rules)
    first, second = (
        reply_of(rules, one, body, rng) for one, body in zip((None, lapse), rng.sample(BODIES, 2), strict=True)
    )
    asked = rng.sample(QUESTIONS, 2)
    prompt = "\n".join(f"{place}. {rule.text}" for place, rule in enumerate(rules, start=1))
    return Item(
        id=f"{index}",
        context=f"You answer the customers of a furniture shop. Keep these {PROMPTED} rules:\n{prompt}",
        question=second,
        tail=f"\n\nCustomer: {asked[0]}\nShop: {first}\nCustomer: {asked[1]}\nShop: {second}\n\n"
        "Question: Which rule does the shop's last reply break?\nAnswer: Rule number",
        answers=(str(rules.index(lapse) + 1),),
        scores=("chosen",),
        new_tokens=4,
    )
