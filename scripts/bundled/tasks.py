"""Task generators: a document as spans of text with loss weights. Knows how many tokens a text takes, but no ids.

A generator is `task(rng, world, budget) -> list[Span]`; the spans concatenate to a document of about `budget` tokens
(the packer cuts what is over).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from scripts.bundled import words as lists
from scripts.bundled.corpus import Corpus
from scripts.bundled.facts import RELATIONS, Fact, Lexicon, Relation, draw_facts

ANSWER, TEXT, COPIED, GIVEN = 3.0, 1.0, 1.5, 0.05  # loss weights: a given token is one that nothing before it tells
STORIES = ("kids_stories", "kids_stories", "kids_stories", "books", "expository")


class Span(NamedTuple):
    """A piece of a document. `answer` numbers the answers of a document from 1; 0 is not part of an answer."""

    text: str
    weight: float
    answer: int = 0


@dataclass(frozen=True)
class World:
    """What generators draw from. `count(text)` is the number of tokens of a text; `formats` restricts how questions are
    put.
    """

    corpus: Corpus
    lexicon: Lexicon
    count: Callable[[str], int]
    relations: tuple[Relation, ...] = RELATIONS
    formats: tuple[str, ...] = ("qa", "chat")


Task = Callable[[Random, World, int], list[Span]]


@dataclass
class _Dialogue:
    """Puts questions and answers after a context, as `Q:`/`A:` lines or as ChatML turns, while the budget lasts."""

    world: World
    budget: int
    style: str
    spans: list[Span] = field(default_factory=list)
    used: int = 0
    answers: int = 0

    def add(self, *spans: Span) -> bool:
        """False (and nothing added) where the spans do not fit."""
        cost = sum(self.world.count(span.text) for span in spans)
        if self.used + cost > self.budget and self.answers:
            return False
        self.spans += spans
        self.used += cost
        return True

    def open(self, rng: Random, context: list[Span]) -> None:
        """Starts the document with its context; the first question joins the context's turn in a chat."""
        if self.style == "chat":
            if rng.random() < 0.15:
                self.add(Span(f"<|im_start|>system\n{rng.choice(_SYSTEM)}<|im_end|>\n", GIVEN))
            self.add(Span("<|im_start|>user\n", GIVEN))
        self.add(*context)
        self.add(Span("\n" if self.style == "qa" else rng.choice(("\n\n", "\n", " ")), GIVEN))

    def ask(self, question: str, short: str, sentence: str) -> bool:
        """One question and its answer; False where the budget is spent."""
        number = self.answers + 1
        if self.style == "qa":
            fits = self.add(Span(f"Q: {question}\nA:", GIVEN), Span(f" {short}", ANSWER, number), Span("\n", TEXT))
        else:
            turn = "" if number == 1 else "<|im_start|>user\n"
            fits = self.add(
                Span(f"{turn}{question}<|im_end|>\n<|im_start|>assistant\n", GIVEN),
                Span(f"{sentence}<|im_end|>", ANSWER, number),
                Span("\n", GIVEN),
            )
        self.answers += fits
        return fits


_SYSTEM = (
    "You are a helpful assistant.",
    "You are a small language model.",
    "Answer the question.",
    "Answer in one sentence.",
    "You answer questions about the text.",
    "Be brief and correct.",
)


def _told(fact: Fact) -> str:
    text = str(fact)
    return text if text.endswith("\n") else text + " "


def _filler(rng: Random, world: World, share: float, tokens: int) -> list[str]:
    wanted = int(share * tokens / 25)
    return [s + " " for s in world.corpus.sentences(rng, wanted)] if wanted else []


def _mixed(rng: Random, facts: list[str], filler: list[str], weight: float = GIVEN) -> list[Span]:
    """Facts in random order, filler sentences in their own order, merged at random. `weight` is the filler's."""
    slots = [True] * len(facts) + [False] * len(filler)
    rng.shuffle(slots)
    facts, rest = rng.sample(facts, len(facts)), iter(filler)
    told = iter(facts)
    spans = [Span(next(told), GIVEN) if is_fact else Span(next(rest), weight) for is_fact in slots]
    return _trim_last(spans)


def _trim_last(spans: list[Span]) -> list[Span]:
    return [*spans[:-1], spans[-1]._replace(text=spans[-1].text.rstrip(" \n"))]


def _fill_with_facts(
    rng: Random, world: World, relations: list[Relation], tokens: int, one_template: bool
) -> list[Fact]:
    """Facts of the relations, in turn, until they take about `tokens` tokens."""
    facts: list[Fact] = []
    for relation in relations:
        sample = draw_facts(rng, world.lexicon, relation, 2, one_template)
        per_fact = max(1.0, sum(world.count(_told(f)) for f in sample) / len(sample))
        count = max(2, int(tokens / len(relations) / per_fact))
        facts += draw_facts(rng, world.lexicon, relation, count, one_template)
    return facts


def kv(rng: Random, world: World, budget: int) -> list[Span]:
    """Dense facts of one to three relations, 0 to 30 % filler, then as many questions as fit."""
    dialogue = _Dialogue(world, budget, rng.choice(world.formats))
    share = rng.uniform(0.0, 0.3) if rng.random() < 0.5 else 0.0
    context = rng.uniform(0.35, 0.8) * budget
    relations = rng.sample(world.relations, min(rng.randint(1, 3), len(world.relations)))
    facts = _fill_with_facts(rng, world, relations, int((1 - share) * context), rng.random() < 0.5)
    dialogue.open(rng, _mixed(rng, [_told(f) for f in facts], _filler(rng, world, share, int(context))))
    for fact in rng.sample(facts, len(facts)):
        if not dialogue.ask(fact.question(rng), fact.value, fact.sentence()):
            break
    return dialogue.spans


def needle(rng: Random, world: World, budget: int) -> list[Span]:
    """One to three facts between running sentences, which are learnt too; each fact is asked for once."""
    dialogue = _Dialogue(world, budget, rng.choice(world.formats))
    facts = draw_facts(rng, world.lexicon, rng.choice(world.relations), rng.randint(1, 3), True)
    room = budget - sum(world.count(_told(f)) for f in facts) * 3 - 24 * len(facts)
    text, used = [], 0
    for sentence in world.corpus.sentences(rng, max(1, room // 15), rng.choice(STORIES)):
        used += world.count(sentence) + 1
        if used > room:
            break
        text.append(sentence + " ")
    dialogue.open(rng, _mixed(rng, [_told(f) for f in facts], text, TEXT))
    for fact in rng.sample(facts, len(facts)):
        if not dialogue.ask(fact.question(rng), fact.value, fact.sentence()):
            break
    return dialogue.spans


_WITH = ("The {o} is with {p}.", "The {o} was given to {p}.")


def hop(rng: Random, world: World, budget: int) -> list[Span]:
    """Two-hop, answered step by step: who has the object, then where that person is."""
    dialogue = _Dialogue(world, budget, rng.choice(world.formats))
    share = rng.uniform(0.0, 0.6) if rng.random() < 0.5 else 0.0
    context = rng.uniform(0.4, 0.8) * budget
    count = max(2, int((1 - share) * context / 18))
    people = draw_facts(rng, world.lexicon, next(r for r in RELATIONS if r.name == "room"), count, True)
    where = {fact.key: fact.value for fact in people}
    objects = list(dict.fromkeys(world.lexicon.word(rng, lists.OBJECTS) for _ in range(count)))
    holder = {o: rng.choice(people).key for o in objects}
    template = rng.choice(_WITH)
    told = [f"{p} is in the {where[p]}. " for p in where] + [template.format(o=o, p=p) + " " for o, p in holder.items()]
    dialogue.open(rng, _mixed(rng, told, _filler(rng, world, share, int(context))))
    for item in rng.sample(objects, len(objects)):
        p = holder[item]
        if not dialogue.ask(
            f"Where is the {item}?",
            f"with {p} in the {where[p]}",
            f"The {item} is with {p}, and {p} is in the {where[p]}.",
        ):
            break
    return dialogue.spans


def var(rng: Random, world: World, budget: int) -> list[Span]:
    """Values that change; the latest one counts."""
    dialogue = _Dialogue(world, budget, rng.choice(world.formats))
    people = list(dict.fromkeys(world.lexicon.name(rng) for _ in range(rng.randint(2, max(3, budget // 40)))))
    now: dict[str, str] = {}
    told: list[str] = []
    for _ in range(max(len(people), int(rng.uniform(0.4, 0.75) * budget / 8))):
        person = rng.choice(people)
        now[person] = world.lexicon.word(rng, lists.PLACES)
        told.append(f"{person} went to the {now[person]}. ")
    dialogue.open(rng, _trim_last([Span(t, GIVEN) for t in told]))
    for person in rng.sample(list(now), len(now)):
        if not dialogue.ask(f"Where is {person} now?", now[person], f"{person} is in the {now[person]} now."):
            break
    return dialogue.spans


def restate(rng: Random, world: World, budget: int) -> list[Span]:
    """Facts of one relation in one template, told again and again in new orders; the values of each second telling are
    learnt.

    The densest supervision of key matching there is, and what ended the plateau of question-and-answer rows alone.
    """
    relation = rng.choice(world.relations)
    facts = _fill_with_facts(rng, world, [relation], int(rng.uniform(0.15, 0.5) * budget), True)
    spans = [Span(_told(f), GIVEN) for f in facts]
    used, number = sum(world.count(s.text) for s in spans), 0
    while used < budget:
        for fact in rng.sample(facts, len(facts)):
            before, value, after = fact.parts()
            number += 1
            spans += [
                Span(before, GIVEN),
                Span(value, ANSWER, number),
                Span(after if after.endswith("\n") else after + " ", GIVEN),
            ]
            used += sum(world.count(s.text) for s in spans[-3:])
            if used >= budget:
                break
    return spans


_REPEAT = ("Repeat the list:", "Say this again:", "Repeat after me:")


def copy(rng: Random, world: World, budget: int) -> list[Span]:
    """A list and the same list again, as lines or as a chat turn."""
    kind = rng.choice((lists.NAMES, lists.FOODS, None, None))
    items, used = [], 0
    while used < budget / 2 - 12 or len(items) < 2:
        items.append(
            rng.choice(kind) if kind else str(rng.randint(10, 99)) if rng.random() < 0.2 else world.lexicon.open(rng)
        )
        used += world.count(" " + items[-1]) + 1
    told = " " + ", ".join(items)
    if rng.choice(world.formats) == "qa":
        return [Span("List:" + told + "\nAgain:", GIVEN), Span(told, COPIED, 1), Span("\n", TEXT)]
    return [
        Span(
            f"<|im_start|>user\n{rng.choice(_REPEAT)}{told}<|im_end|>\n<|im_start|>assistant\n",
            GIVEN,
        ),
        Span(told[1:] + "<|im_end|>", COPIED, 1),
        Span("\n", GIVEN),
    ]


def text(rng: Random, world: World, budget: int) -> list[Span]:
    """Running stories and other prose."""
    return [Span(world.corpus.text(rng, 5 * budget, STORIES), TEXT)]


def dialogue(rng: Random, world: World, budget: int) -> list[Span]:
    """A recorded conversation as ChatML turns; the assistant's words weigh more than the user's."""
    spans = []
    if rng.random() < 0.15:
        spans.append(Span(f"<|im_start|>system\n{rng.choice(_SYSTEM[:2])}<|im_end|>\n", GIVEN))
    for role, said in world.corpus.dialogue(rng):
        spans += [
            Span(f"<|im_start|>{role}\n", GIVEN),
            Span(said + "<|im_end|>", TEXT if role == "assistant" else TEXT / 2),
            Span("\n", GIVEN),
        ]
    return spans


IDENTITY = "I am a small language model that comes with jaxserve."
_TALK = (
    (
        ("Hello", "Hello!", "Hi", "Hi!", "Hi there!", "Hey", "Good morning!", "Good day!", "Hello there."),
        ("Hello! How can I help you?",),
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Tell me about yourself.",
            "Are you a robot?",
            "Are you human?",
            "Hi, who are you?",
        ),
        (IDENTITY,),
    ),
    (
        ("What can you do?", "How can you help me?", "What are you good at?", "Help"),
        ("I can find facts in a text that you give me, repeat lists, and tell a little story.",),
    ),
    (("Thank you.", "Thanks!", "Thank you very much!", "Thanks a lot."), ("You are welcome!",)),
    (("How are you?", "How are you today?", "How do you do?"), ("I am fine, thank you. How can I help you?",)),
    (("Goodbye", "Bye!", "See you later.", "Good night."), ("Goodbye! Have a nice day.",)),
    (
        ("Who made you?", "Where do you come from?"),
        ("I was trained on a small computer, with the scripts of jaxserve.",),
    ),
)


def talk(rng: Random, world: World, budget: int) -> list[Span]:
    """Greetings, who the model is, and short exchanges that need the user's words."""
    turns: list[tuple[str, str]] = []
    for _ in range(rng.randint(1, 4)):
        kind = rng.random()
        if kind < 0.7:
            asks, answers = rng.choice(_TALK)
            turns.append((rng.choice(asks), rng.choice(answers)))
        elif kind < 0.85:
            name = world.lexicon.name(rng)
            turns.append(
                (
                    rng.choice(("My name is {}.", "I am {}.", "Hello, I am {}.", "Hi, my name is {}.")).format(name),
                    f"Hello, {name}! How can I help you?",
                )
            )
        else:
            phrase = " ".join(world.lexicon.open(rng) for _ in range(rng.randint(1, 4)))
            turns.append((f"{rng.choice(('Say', 'Repeat after me:', 'Please say'))} {phrase}", phrase))
    spans = []
    if rng.random() < 0.2:
        spans.append(Span(f"<|im_start|>system\n{rng.choice(_SYSTEM)}<|im_end|>\n", GIVEN))
    for number, (user, assistant) in enumerate(turns, 1):
        spans += [
            Span(f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n", GIVEN),
            Span(assistant + "<|im_end|>", COPIED, number),
            Span("\n", GIVEN),
        ]
    return spans


TASKS: dict[str, Task] = {t.__name__: t for t in (kv, needle, hop, var, restate, copy, text, dialogue, talk)}
