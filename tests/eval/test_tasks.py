"""Generated tasks: the same seed gives the same document, it has the length asked for, and its answers are in it."""

from __future__ import annotations

from random import Random

import pytest

from jaxserve import bundled
from jaxserve.config import ConfigError
from jaxserve.eval.modes import MODES, waves
from jaxserve.eval.prompts import Chat, Plain, fit
from jaxserve.eval.tasks import RETRIEVAL, Document, Room, TooShort
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer

FOLDER = bundled.path()
TOKENIZER = Tokenizer.from_folder(FOLDER)
PLAIN = Plain(TOKENIZER)


def count(text: str) -> int:
    return len(TOKENIZER.encode(text, add_special_tokens=False))


def chat() -> Chat:
    template = ChatTemplate.from_folder(FOLDER, TOKENIZER.special_tokens)
    return Chat(TOKENIZER, lambda messages: template.render(messages, add_generation_prompt=True))


@pytest.mark.parametrize("name", RETRIEVAL)
def test_a_seed_is_a_document(name: str) -> None:
    first, again, other = (RETRIEVAL[name](Random(seed), Room(400, 5, count)) for seed in ("a", "a", "b"))
    assert first == again
    assert first.context != other.context
    assert len({turn.question for turn in first.turns}) == 5
    assert all(0 <= turn.depth <= 1 for turn in first.turns)


@pytest.mark.parametrize("name", RETRIEVAL)
@pytest.mark.parametrize("length", [384, 2048])
@pytest.mark.parametrize("style", [PLAIN, chat()], ids=["plain", "chat"])
def test_a_document_fills_its_length_and_no_more(name: str, length: int, style: Plain | Chat) -> None:
    document = fit(name, RETRIEVAL[name], style, count, length, 3, "seed")
    taken = len(style.prompt(document, 2, True)) + max(style.max_tokens(document, turn) for turn in range(3))
    assert length - 80 <= taken <= length


def _told(name: str, document: Document) -> None:
    """Each answer is what the context says about the question."""
    facts = document.context.replace("\n", " ").split(". ")
    for turn in document.turns:
        if name == "copy":
            assert f"{turn.question}, {turn.answer}" in document.context
        elif name == "two-hop":
            thing = turn.question.removeprefix("Where is the ").rstrip("?")
            [holder] = [fact.rsplit(" ", 1)[1].rstrip(".") for fact in facts if f"The {thing} is with " in fact]
            [place] = [fact.rsplit(" ", 1)[1].rstrip(".") for fact in facts if fact.startswith(f"{holder} is in ")]
            assert turn.answer == f"with {holder} in the {place}"
        elif name == "variable-tracking":
            person = turn.question.split()[2]
            assert [fact.split()[-1].rstrip(".") for fact in facts if fact.startswith(f"{person} ")][-1] == turn.answer
        else:
            assert document.context.count(turn.sentence) == 1
            at = document.context.index(turn.sentence) / len(document.context)
            assert abs(at - turn.depth) < 0.05


@pytest.mark.parametrize("name", RETRIEVAL)
def test_answers_are_in_the_context(name: str) -> None:
    for seed in range(4):
        _told(name, RETRIEVAL[name](Random(seed), Room(600, 5, count)))


def test_a_context_too_short_for_its_questions_says_so() -> None:
    with pytest.raises(TooShort, match="turns ask for one each"):
        RETRIEVAL["two-hop"](Random(0), Room(40, 5, count))
    with pytest.raises(ConfigError, match="--lengths 64 is too short for two-hop"):
        fit("two-hop", RETRIEVAL["two-hop"], PLAIN, count, 64, 5, "seed")


def test_later_turns_begin_with_the_earlier_ones_and_their_golden_answers() -> None:
    document = fit("kv-recall", RETRIEVAL["kv-recall"], PLAIN, count, 512, 3, "seed")
    first, second = (PLAIN.prompt(document, turn, True) for turn in (0, 1))
    assert second[: len(first)] == first
    assert TOKENIZER.decode(second[len(first) :]).startswith(f" {document.turns[0].answer}\nQ: ")
    alone = PLAIN.prompt(document, 1, False)
    assert document.turns[0].question not in TOKENIZER.decode(alone)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_asks_everything_once(mode: str) -> None:
    asks = [ask for wave in waves(mode, range(2, 5), 4) for ask in wave]
    assert sorted((ask.document, ask.turn) for ask in asks) == [(d, t) for d in range(2, 5) for t in range(4)]
    assert all(ask.history == (mode == "multi-turn") for ask in asks)
    shared = len({ask.scope for ask in asks})
    assert shared == (12 if mode == "single" else 3)


@pytest.mark.parametrize(
    ("output", "right"),
    [(" 7305", True), (" 7305.\nQ: x", True), (" 73052", False), (" 7305 7305", False), ("", False)],
)
def test_a_plain_answer_is_the_whole_line(output: str, right: bool) -> None:
    assert PLAIN.right(output, "7305") is right


@pytest.mark.parametrize(
    ("output", "right"),
    [("The code is 7305.", True), ("It is 73055.", False), ("7305", True), ('"7305", I think', True), ("No.", False)],
)
def test_a_chat_answer_holds_the_golden_one(output: str, right: bool) -> None:
    assert chat().right(output, "7305") is right
